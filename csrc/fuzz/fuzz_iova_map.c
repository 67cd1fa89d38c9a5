/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer target: two iova_maps of one pool against sorted arrays. The input is a program of 8-byte
 * instructions; the answer of each is compared with the model's, the invariants of the tree are
 * checked after it, and the whole contents now and then and at the end.
 */
#include <stdint.h>

#include "../tests/iova_map_check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct instruction {
    uint8_t code;    /* what, on which map, at which end of the address space */
    uint8_t length;  /* in bytes of address space, or instructions to repeat */
    uint16_t at;     /* where */
    uint8_t step;    /* distance of repeated mappings */
    uint8_t refuse;  /* from which allocation on memory is refused; 0: never */
    uint8_t flags;
    uint8_t unused;
};

struct memory {
    unsigned left; /* allocations until they are refused */
    bool limited;
};

static bool refuse(void *context, size_t bytes)
{
    struct memory *memory = context;

    (void)bytes;
    if (!memory->limited) {
        return false;
    }
    if (memory->left == 0) {
        return true;
    }
    memory->left--;
    return false;
}

/* Maps; where memory was refused the model is left alone, and the map must have been as well. */
static void insert(struct iova_map *map, struct iova_model *model, uint64_t first, uint64_t last, uint32_t flags)
{
    struct iova_mapping mapping = {.first = first, .last = last, .phys = first * 3 + 1, .flags = flags};
    int error = iova_map_insert(map, &mapping);

    if (error != -ENOMEM) {
        CHECK(error == iova_model_insert(model, &mapping));
    }
}

static void remove_range(struct iova_map *map, struct iova_model *model, uint64_t first, uint64_t last)
{
    uint64_t expected;
    uint64_t removed;
    int expected_error = iova_model_remove(model, first, last, &expected);

    CHECK(iova_map_check_remove(map, first, last) == expected_error);
    CHECK(iova_map_remove(map, first, last, &removed) == expected_error);
    CHECK(removed == expected);
}

static void run(struct iova_map *map, struct iova_model *model, const struct instruction *now)
{
    /* A few bytes at either end of the address space and somewhere in the middle, so that ranges often meet. */
    static const uint64_t base[] = {0, UINT64_C(0x7ffffffffffff000), UINT64_MAX - 0xffff, UINT64_MAX - 0x1ffff};
    uint64_t first = base[now->code >> 6] + now->at;
    uint64_t last = first + now->length;

    switch (now->code & 7) {
    case 0:
    case 1:
        insert(map, model, first, last, now->flags);
        break;
    case 2: /* a run upwards */
        for (unsigned i = 0; i < now->length; i++) {
            insert(map, model, first + i * (uint64_t)now->step, first + i * (uint64_t)now->step + now->flags % 4, i);
        }
        break;
    case 3: /* a run downwards */
        for (unsigned i = now->length; i > 0; i--) {
            insert(map, model, first + i * (uint64_t)now->step, first + i * (uint64_t)now->step + now->flags % 4, i);
        }
        break;
    case 4:
        remove_range(map, model, first, last);
        break;
    case 5: /* a wide range, up to everything */
        remove_range(map, model, first, now->flags & 1 ? UINT64_MAX : first + (uint64_t)now->length * now->step);
        break;
    case 6: /* mappings one by one, with gaps left between them */
        for (unsigned i = 0; i < now->length; i++) {
            size_t at = iova_model_seek(model, first + i * (uint64_t)now->step);
            if (at < model->count) {
                remove_range(map, model, model->mapping[at].first, model->mapping[at].last);
            }
        }
        break;
    default:
        break;
    }
    iova_model_probe(model, map, first, last);
    iova_model_probe(model, map, last, first + now->step);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct memory memory = {0};
    struct iova_pool_hooks hooks = {.refuse = refuse, .context = &memory};
    struct iova_pool *pool = iova_pool_new(&hooks);
    size_t empty = iova_pool_bytes(pool);
    struct iova_map *map[2] = {iova_map_new(pool), iova_map_new(pool)};
    struct iova_model model[2] = {{0}, {0}};
    struct instruction now;

    CHECK(pool && map[0] && map[1]);
    for (size_t done = 0; size - done >= sizeof(now); done += sizeof(now)) {
        memcpy(&now, data + done, sizeof(now));
        unsigned which = (now.code >> 3) & 1;
        memory = (struct memory){.left = now.refuse - 1u, .limited = now.refuse > 0};
        run(map[which], &model[which], &now);
        memory.limited = false;
        uint64_t nodes = iova_map_verify(map[0]) + iova_map_verify(map[1]);
        /* Idle memory is bounded by that in use, and some chunks. */
        CHECK(iova_pool_bytes(pool) <= empty + 256 + 4 * IOVA_CHUNK_BYTES + nodes * 3 / 2 * IOVA_NODE_BYTES);
        if (now.unused == 0) {
            iova_model_compare(&model[which], map[which]);
        }
    }
    for (unsigned which = 0; which < 2; which++) {
        iova_model_compare(&model[which], map[which]);
        iova_map_free(map[which]);
        free(model[which].mapping);
    }
    CHECK(iova_pool_bytes(pool) <= empty + IOVA_CHUNK_BYTES);
    iova_pool_free(pool);
    return 0;
}
