/*
 * Recorded requests, played to an engine: from memory of our own, through the code that serves a guest's. Nothing
 * serves a queue meanwhile, so that the worker sleeps and this thread has everything to itself.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"
#include "le.h"

#define READABLE_AT 0u
#define WRITABLE_AT 4096u
#define STAGE_BYTES (WRITABLE_AT + 65536u + 4096u)
/* Room for the longest answer: what is longer is no request, however much longer. */
#define WRITABLE_MAX (STAGE_BYTES - WRITABLE_AT)
#define REGIONS_MAX 512u

struct player {
    struct guest_memory *stage;   /* where a request lies while it is played */
    struct chain chain;
    size_t count;                 /* regions of a table that is not whole yet */
    struct viommu_region *regions[REGIONS_MAX];
};

/* Memory that nobody else has; what is never touched costs nothing. */
static int make_region(uint64_t gpa, uint64_t size, struct viommu_region **out)
{
    int fd = memfd_create("viommud-replay", MFD_CLOEXEC);
    int rc;

    if (fd < 0)
        return -errno;
    rc = size <= INT64_MAX && ftruncate(fd, (off_t)size) == 0 ? viommu_region_map(gpa, size, gpa, 0, fd, out)
                                                              : -ENOMEM;
    (void)close(fd);
    return rc;
}

static void drop_regions(struct player *player)
{
    while (player->count != 0)
        viommu_region_free(player->regions[--player->count]);
}

void player_free(struct player *player)
{
    if (player == NULL)
        return;
    drop_regions(player);
    guest_memory_free(player->stage);
    free(player);
}

static int make_player(struct player **out)
{
    struct player *player = calloc(1, sizeof(*player));
    struct viommu_region *region;
    int rc = player != NULL ? make_region(0, STAGE_BYTES, &region) : -ENOMEM;

    if (rc == 0) {
        rc = guest_memory_new(&region, 1, &player->stage);
        viommu_region_free(region);
    }
    if (rc != 0) {
        free(player);
        return rc;
    }
    player->chain.readable = player->chain.writable = 1;
    player->chain.buffers[0].gpa = READABLE_AT;
    player->chain.buffers[1].gpa = WRITABLE_AT;
    *out = player;
    return 0;
}

static int play_memory(struct viommu_engine *engine, const struct viommu_recorded *entry)
{
    struct player *player = engine->player;
    uint64_t first = le64_get(entry->bytes), size = le64_get(entry->bytes + 8) - first + 1;
    int rc = 0;

    if (entry->readable != 0) {
        if (player->count == REGIONS_MAX || size == 0 || size > INT64_MAX)
            return -EINVAL;
        rc = make_region(first, size, &player->regions[player->count]);
        if (rc != 0)
            return rc;
        player->count++;
        if (le32_get(entry->bytes + 16) != 0)
            return 0;
    }
    rc = viommu_engine_set_memory(engine, player->regions, player->count);
    drop_regions(player);
    return rc;
}

static int play_request(struct viommu_engine *engine, const struct viommu_recorded *entry, uint8_t *status)
{
    struct chain *chain = &engine->player->chain;
    struct request_outcome outcome;

    if (entry->kind >= VIOMMU_REQUEST_TYPES || entry->readable > VIOMMU_RECORDED_BYTES)
        return -EINVAL;
    memcpy(engine->player->stage->regions[0]->host + READABLE_AT, entry->bytes, entry->readable);
    chain->readable_bytes = chain->buffers[0].length = entry->readable;
    chain->writable_bytes = chain->buffers[1].length = entry->writable < WRITABLE_MAX ? entry->writable : WRITABLE_MAX;
    if (request_serve(&engine->iommu, engine->player->stage, chain, &outcome) < 0)
        return -EFAULT;
    *status = outcome.status;
    return 0;
}

static int play(struct viommu_engine *engine, const struct viommu_recorded *entry, uint8_t *status)
{
    *status = entry->status;
    switch (entry->kind) {
    case VIOMMU_RECORDED_RESET:
        viommu_engine_reset(engine);
        return 0;
    case VIOMMU_RECORDED_BYPASS:
        return viommu_engine_set_bypass(engine, (entry->bytes[0] & 1) != 0);
    case VIOMMU_RECORDED_FEATURES:
        return viommu_engine_set_features(engine, le64_get(entry->bytes));
    case VIOMMU_RECORDED_MEMORY:
        return play_memory(engine, entry);
    default:
        return play_request(engine, entry, status);
    }
}

int viommu_engine_play(struct viommu_engine *engine, const struct viommu_recorded *entries, size_t count,
                       uint8_t *statuses)
{
    int rc = engine->player != NULL ? 0 : make_player(&engine->player);

    for (size_t i = 0; i < count && rc == 0; i++)
        rc = play(engine, &entries[i], &statuses[i]);
    return rc;
}
