/*
 * The in-flight region: a process may die between any two steps of take, give and publish; what the next one finds
 * is exactly what was taken and not shown to the driver. And regions that lie.
 */
#include "inflight.h"

#include <string.h>

#include "driver.h"
#include "virtqueue.h"

#define SIZE 8u
#define BYTES 2048u

/* A device that works through an order of heads in batches and stops after so many steps; the region survives it. */
struct life {
    uint8_t region[BYTES];
    uint16_t used_idx;     /* in the ring: what the driver can see */
    bool taken[SIZE];      /* by the device and not shown as used */
    uint16_t order[SIZE];  /* in which they were taken */
    unsigned orders;
};

static void took(struct life *life, uint16_t head)
{
    if (life->taken[head])
        return; /* a former process had taken it already */
    life->taken[head] = true;
    life->order[life->orders++] = head;
}

static void shown(struct life *life, const uint16_t *heads, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        unsigned kept = 0;

        life->taken[heads[i]] = false;
        for (unsigned j = 0; j < life->orders; j++) {
            if (life->order[j] != heads[i])
                life->order[kept++] = life->order[j];
        }
        life->orders = kept;
    }
    life->used_idx = (uint16_t)(life->used_idx + count);
}

/* One process. Dies after `steps` steps; returns how many it would have liked to make. */
static unsigned live(struct life *life, uint64_t *state, unsigned steps)
{
    struct inflight inflight;
    unsigned made = 0;
    uint16_t head, given[SIZE];
    unsigned again = 0;

#define STEP                 \
    do {                     \
        if (made++ == steps) \
            return made;     \
    } while (0)
    inflight_init(&inflight, life->region, SIZE);
    inflight_split_recover(&inflight, life->used_idx);
    CHECK_EQ(inflight.resubmit_count, life->orders);
    while (inflight_split_resubmit(&inflight, &head)) {
        CHECK_EQ(head, life->order[again++]);
        given[again - 1] = head;
    }
    for (unsigned i = 0; i < again; i++) {
        STEP;
        inflight_split_give(&inflight, given[i]); /* it is taken already */
    }
    STEP;
    shown(life, given, again);
    STEP;
    inflight_split_publish(&inflight, life->used_idx);
    for (unsigned round = 0; round < 6; round++) {
        unsigned batch = (unsigned)(check_random(state) % SIZE) + 1, count = 0;

        while (count < batch) {
            uint16_t next = (uint16_t)(check_random(state) % SIZE);

            if (life->taken[next])
                continue;
            STEP;
            inflight_split_take(&inflight, next);
            took(life, next);
            given[count++] = next;
            if (check_random(state) % 2 == 0) { /* taken and given one by one, as the worker does, or all first */
                STEP;
                inflight_split_give(&inflight, next);
                given[count - 1] = (uint16_t)(next | 0x8000u);
            }
        }
        for (unsigned i = 0; i < count; i++) {
            if ((given[i] & 0x8000u) == 0) {
                STEP;
                inflight_split_give(&inflight, given[i]);
            }
            given[i] &= 0x7fffu;
        }
        STEP;
        shown(life, given, count); /* the index in the ring goes first: that is when the driver sees them */
        STEP;
        inflight_split_publish(&inflight, life->used_idx);
    }
#undef STEP
    return made;
}

/* A process dies at every step, its successor too, and so on for many lives in a row. */
static void test_death_at_every_step(void)
{
    for (uint64_t seed = 1; seed <= 300; seed++) {
        struct life life = {.used_idx = (uint16_t)(65536 - seed)};
        uint64_t state = seed;

        for (unsigned lives = 0; lives < 60; lives++)
            (void)live(&life, &state, (unsigned)(check_random(&state) % 60));
    }
}

/* Requests are done again in the order they came in, also when the second process dies while it does them. */
static void test_order_over_deaths(void)
{
    struct guest guest;
    struct guest_memory *memory;
    struct driver driver;
    struct viommu_ring ring;
    uint8_t region[BYTES] = {0};
    uint64_t buffer;

    guest_init(&guest, 1u << 20);
    CHECK_EQ(guest_memory_new(&guest.region, 1, &memory), 0);
    driver_init(&driver, &guest, SIZE, false);
    buffer = guest_alloc(&guest, 64, 8);
    ring = driver_ring(&driver);
    for (unsigned i = 0; i < 4; i++)
        (void)driver_add(&driver, &(struct piece){buffer, 4, true}, 1);
    for (unsigned death = 0; death < 6; death++) { /* each process takes one more, and gives nothing back */
        struct inflight inflight;
        struct virtqueue vq;
        struct chain chain;

        inflight_init(&inflight, region, SIZE);
        CHECK_EQ(virtqueue_init(&vq, &ring, VIRTIO_F_VERSION_1, memory, &inflight), 0);
        for (unsigned i = 0; i < 4 && i <= death; i++) {
            CHECK_EQ(virtqueue_take(&vq, &chain), 1);
            CHECK_EQ(chain.id, i);
        }
        inflight_init(&inflight, region, SIZE);
        CHECK_EQ(virtqueue_init(&vq, &ring, VIRTIO_F_VERSION_1, memory, &inflight), 0);
        CHECK_EQ(virtqueue_take(&vq, &chain), 1); /* the one that dies having begun again */
        CHECK_EQ(chain.id, 0);
    }
    guest_memory_free(memory);
    guest_fini(&guest);
}

/* A fresh region is made ready; the size asked for holds either format. */
static void test_fresh(void)
{
    uint8_t region[BYTES];
    struct inflight inflight;
    uint16_t head;

    memset(region, 0, sizeof(region));
    inflight_init(&inflight, region, SIZE);
    inflight_split_recover(&inflight, 77);
    CHECK(!inflight_split_resubmit(&inflight, &head));
    CHECK_EQ(le16_get(region + 8), 1);
    CHECK_EQ(le16_get(region + 10), SIZE);
    CHECK_EQ(le16_get(region + 14), 77);
    for (uint32_t size = 1; size <= VIOMMU_MAX_QUEUE_SIZE; size *= 2) {
        CHECK_EQ(inflight_queue_bytes(size) % 64, 0);
        CHECK(inflight_queue_bytes(size) >= 16 + 16ull * size && inflight_queue_bytes(size) >= 32 + 32ull * size);
    }
    CHECK_EQ(viommu_inflight_size(2, 8), 2 * inflight_queue_bytes(8));
}

/* rule: H2 */
/* Regions filled with anything: heads stay inside the ring, none comes twice, nothing is touched outside. */
static void test_lies(void)
{
    for (uint64_t seed = 1; seed <= 20000; seed++) {
        uint8_t *region = malloc(16 + 16 * SIZE); /* to the byte: a sanitizer sees the rest */
        struct inflight inflight;
        bool seen[SIZE] = {false};
        uint64_t state = seed;
        uint16_t head;

        CHECK(region != NULL);
        for (unsigned i = 0; i < 16 + 16 * SIZE; i++)
            region[i] = check_random(&state) % 3 == 0 ? (uint8_t)(check_random(&state) % 9) : (uint8_t)state;
        if (seed % 2 == 0) {
            for (unsigned i = 0; i < SIZE; i++)
                region[16 + 16 * i] = 1;
        }
        inflight_init(&inflight, region, SIZE);
        inflight_split_recover(&inflight, (uint16_t)check_random(&state));
        while (inflight_split_resubmit(&inflight, &head)) {
            CHECK(head < SIZE && !seen[head]);
            seen[head] = true;
            inflight_split_give(&inflight, head);
        }
        inflight_split_take(&inflight, SIZE); /* not heads of this ring: nothing happens */
        inflight_split_give(&inflight, UINT16_MAX);
        inflight_split_publish(&inflight, 5);
        for (unsigned i = 0; i < SIZE; i++)
            CHECK(!seen[i] || region[16 + 16 * i] == 0);
        free(region);
    }
}

int main(void)
{
    RUN(test_death_at_every_step);
    RUN(test_order_over_deaths);
    RUN(test_fresh);
    RUN(test_lies);
    return 0;
}
