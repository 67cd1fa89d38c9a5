/* SPDX-License-Identifier: Apache-2.0 */
/* iova_map: every edge of its contract, its memory, and a long random run against a sorted array. */
#include "iova_map.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "iova_map_check.h"

struct memory {
    bool limited;
    unsigned left;  /* allocations until they are refused, where limited */
    unsigned asked; /* allocations asked for */
};

static bool refuse(void *context, size_t bytes)
{
    struct memory *memory = context;

    CHECK(bytes > 0);
    memory->asked++;
    if (!memory->limited) {
        return false;
    }
    if (memory->left == 0) {
        return true;
    }
    memory->left--;
    return false;
}

/* What every test works on. */
struct fixture {
    struct memory memory;
    struct iova_pool *pool;
    struct iova_map *map;
    size_t empty; /* bytes of the pool alone */
};

static void set_up(struct fixture *fixture)
{
    struct iova_pool_hooks hooks = {.refuse = refuse, .context = &fixture->memory};

    memset(fixture, 0, sizeof(*fixture));
    fixture->pool = iova_pool_new(&hooks);
    CHECK(fixture->pool);
    fixture->empty = iova_pool_bytes(fixture->pool);
    fixture->map = iova_map_new(fixture->pool);
    CHECK(fixture->map);
}

static void tear_down(struct fixture *fixture)
{
    iova_map_verify(fixture->map);
    iova_map_free(fixture->map);
    CHECK(iova_pool_bytes(fixture->pool) <= fixture->empty + IOVA_CHUNK_BYTES); /* all nodes came back */
    iova_pool_free(fixture->pool);
}

static int map_range(struct iova_map *map, uint64_t first, uint64_t last)
{
    struct iova_mapping mapping = {.first = first, .last = last, .phys = ~first, .flags = (uint32_t)last};

    return iova_map_insert(map, &mapping);
}

static uint64_t unmap_range(struct iova_map *map, uint64_t first, uint64_t last)
{
    uint64_t removed = 12345;

    CHECK(iova_map_check_remove(map, first, last) == 0);
    CHECK(iova_map_remove(map, first, last, &removed) == 0);
    return removed;
}

static void unmap_refused(struct iova_map *map, uint64_t first, uint64_t last, int error)
{
    uint64_t removed = 12345;
    uint64_t count = iova_map_count(map);

    CHECK(iova_map_check_remove(map, first, last) == error);
    CHECK(iova_map_remove(map, first, last, &removed) == error);
    CHECK(removed == 0);
    CHECK(iova_map_count(map) == count);
}

static bool is_mapped(const struct iova_map *map, uint64_t first, uint64_t last)
{
    struct iova_mapping mapping;

    return iova_map_find(map, first, &mapping) && mapping.first == first && mapping.last == last &&
           mapping.phys == ~first && mapping.flags == (uint32_t)last;
}

/* Removes everything between two parts of a test. */
static void start_over(struct fixture *fixture)
{
    unmap_range(fixture->map, 0, UINT64_MAX);
    CHECK(iova_map_count(fixture->map) == 0);
    iova_map_verify(fixture->map);
}

static uint64_t next_random(uint64_t *state)
{
    /* splitmix64 */
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* An empty map answers every question, and removing from it is no error. */
static void test_empty(struct fixture *f)
{
    struct iova_mapping mapping;

    CHECK(iova_map_count(f->map) == 0);
    CHECK(!iova_map_find(f->map, 0, &mapping));
    CHECK(!iova_map_next(f->map, 0, &mapping));
    CHECK(!iova_map_overlaps(f->map, 0, UINT64_MAX));
    CHECK(unmap_range(f->map, 0, UINT64_MAX) == 0);
    CHECK(iova_map_remove(f->map, 5, 5, NULL) == 0);
}

/* The seven examples of UNMAP in the specification (virtio 1.3, 5.13.6.6), each from an empty domain. */
static void test_unmap_examples(struct fixture *f)
{
    CHECK(unmap_range(f->map, 0, 4) == 0); /* 1: nothing is there */

    CHECK(map_range(f->map, 0, 9) == 0); /* 2 */
    CHECK(unmap_range(f->map, 0, 9) == 1);

    CHECK(map_range(f->map, 0, 4) == 0); /* 3 */
    CHECK(map_range(f->map, 5, 9) == 0);
    CHECK(unmap_range(f->map, 0, 9) == 2);

    CHECK(map_range(f->map, 0, 9) == 0); /* 4: would split */
    unmap_refused(f->map, 0, 4, -ERANGE);
    CHECK(is_mapped(f->map, 0, 9));
    start_over(f);

    CHECK(map_range(f->map, 0, 4) == 0); /* 5 */
    CHECK(map_range(f->map, 5, 9) == 0);
    CHECK(unmap_range(f->map, 0, 4) == 1);
    CHECK(!iova_map_overlaps(f->map, 0, 4));
    CHECK(is_mapped(f->map, 5, 9));
    start_over(f);

    CHECK(map_range(f->map, 0, 4) == 0); /* 6 */
    CHECK(unmap_range(f->map, 0, 9) == 1);

    CHECK(map_range(f->map, 0, 4) == 0); /* 7: a hole in the range */
    CHECK(map_range(f->map, 10, 14) == 0);
    CHECK(unmap_range(f->map, 0, 14) == 2);
    CHECK(iova_map_count(f->map) == 0);
}

/* A range that would split a mapping at either end, or inside one, removes nothing, whole neighbours included. */
static void test_unmap_never_splits(struct fixture *f)
{
    CHECK(map_range(f->map, 0, 4) == 0);
    CHECK(map_range(f->map, 5, 9) == 0);
    CHECK(map_range(f->map, 20, 29) == 0);
    unmap_refused(f->map, 0, 7, -ERANGE);
    unmap_refused(f->map, 2, 9, -ERANGE);
    unmap_refused(f->map, 6, 8, -ERANGE);
    unmap_refused(f->map, 5, 5, -ERANGE);
    unmap_refused(f->map, 9, 9, -ERANGE);
    unmap_refused(f->map, 0, 20, -ERANGE);
    unmap_refused(f->map, 9, 29, -ERANGE);
    unmap_refused(f->map, 29, UINT64_MAX, -ERANGE);
    unmap_refused(f->map, 9, 0, -EINVAL);
    CHECK(is_mapped(f->map, 0, 4) && is_mapped(f->map, 5, 9) && is_mapped(f->map, 20, 29));
    CHECK(unmap_range(f->map, 10, 19) == 0);
    CHECK(unmap_range(f->map, 30, UINT64_MAX) == 0);
    CHECK(unmap_range(f->map, 5, 29) == 2);
}

/* The same where thousands of mappings lie between the two ends. */
static void test_unmap_never_splits_far(struct fixture *f)
{
    const uint64_t n = 5000;

    for (uint64_t i = 0; i < n; i++) {
        CHECK(map_range(f->map, 10 * i, 10 * i + 9) == 0);
    }
    unmap_refused(f->map, 0, 10 * n - 2, -ERANGE);
    unmap_refused(f->map, 1, 10 * n - 1, -ERANGE);
    for (uint64_t i = 0; i < n; i += 7) {
        unmap_refused(f->map, 10, 10 * i + 8, i > 0 ? -ERANGE : -EINVAL);
        unmap_refused(f->map, 10 * i + 1, 10 * n - 1, -ERANGE);
    }
    CHECK(unmap_range(f->map, 10, 10 * n - 11) == n - 2);
    CHECK(is_mapped(f->map, 0, 9) && is_mapped(f->map, 10 * n - 10, 10 * n - 1));
}

/* Every way to overlap is refused and changes nothing; touching is not overlapping, and never merges. */
static void test_overlap(struct fixture *f)
{
    CHECK(map_range(f->map, 100, 199) == 0);
    CHECK(map_range(f->map, 100, 199) == -EEXIST);
    CHECK(map_range(f->map, 50, 100) == -EEXIST);
    CHECK(map_range(f->map, 199, 250) == -EEXIST);
    CHECK(map_range(f->map, 120, 130) == -EEXIST);
    CHECK(map_range(f->map, 100, 100) == -EEXIST);
    CHECK(map_range(f->map, 199, 199) == -EEXIST);
    CHECK(map_range(f->map, 0, UINT64_MAX) == -EEXIST);
    CHECK(map_range(f->map, 300, 299) == -EINVAL);
    CHECK(iova_map_count(f->map) == 1);
    CHECK(map_range(f->map, 50, 99) == 0);
    CHECK(map_range(f->map, 200, 200) == 0);
    CHECK(iova_map_count(f->map) == 3);
    CHECK(is_mapped(f->map, 50, 99) && is_mapped(f->map, 100, 199) && is_mapped(f->map, 200, 200));
    CHECK(iova_map_overlaps(f->map, 0, 50) && iova_map_overlaps(f->map, 200, 300));
    CHECK(!iova_map_overlaps(f->map, 0, 49) && !iova_map_overlaps(f->map, 201, UINT64_MAX));
    CHECK(!iova_map_overlaps(f->map, 100, 99));
}

/* Address 0, address 2^64-1 and the whole space can be mapped, found, walked and unmapped. */
static void test_ends_of_the_space(struct fixture *f)
{
    struct iova_mapping mapping;

    CHECK(map_range(f->map, 0, UINT64_MAX) == 0);
    CHECK(is_mapped(f->map, 0, UINT64_MAX));
    CHECK(iova_map_find(f->map, UINT64_MAX, &mapping) && mapping.first == 0);
    CHECK(iova_map_next(f->map, UINT64_MAX, &mapping) && mapping.first == 0);
    CHECK(map_range(f->map, 5, 5) == -EEXIST);
    unmap_refused(f->map, 0, UINT64_MAX - 1, -ERANGE);
    unmap_refused(f->map, 1, UINT64_MAX, -ERANGE);
    CHECK(unmap_range(f->map, 0, UINT64_MAX) == 1);

    CHECK(map_range(f->map, 0, 0) == 0);
    CHECK(map_range(f->map, UINT64_MAX, UINT64_MAX) == 0);
    CHECK(map_range(f->map, 1, UINT64_MAX - 1) == 0);
    CHECK(iova_map_count(f->map) == 3);
    CHECK(unmap_range(f->map, 1, UINT64_MAX - 1) == 1);
    CHECK(iova_map_next(f->map, 1, &mapping) && mapping.first == UINT64_MAX);
    CHECK(unmap_range(f->map, UINT64_MAX, UINT64_MAX) == 1);
    CHECK(!iova_map_next(f->map, 1, &mapping));
    CHECK(unmap_range(f->map, 0, 0) == 1);
}

/* Physical address and flags come back bit by bit, and what is not found leaves the output alone. */
static void test_payload(struct fixture *f)
{
    struct iova_mapping in = {.first = 16, .last = 31, .phys = UINT64_MAX - 5, .flags = UINT32_MAX - 2};
    struct iova_mapping out = {.first = 1, .last = 2, .phys = 3, .flags = 4};
    struct iova_mapping same = out;

    CHECK(iova_map_insert(f->map, &in) == 0);
    CHECK(!iova_map_find(f->map, 15, &out) && !iova_map_find(f->map, 32, &out));
    CHECK(!iova_map_next(f->map, 32, &out));
    CHECK(iova_mapping_equal(&out, &same));
    CHECK(iova_map_find(f->map, 31, &out) && iova_mapping_equal(&in, &out));
    CHECK(iova_map_next(f->map, 0, &out) && iova_mapping_equal(&in, &out));
}

/* A mapping may reach over addresses that parted two leaves when it was not there yet. */
static void test_mapping_across_leaves(struct fixture *f)
{
    struct iova_mapping mapping;
    const uint64_t n = 2000;

    for (uint64_t wide = 40; wide < 4000; wide += 160) {
        for (uint64_t i = 0; i < n; i++) {
            CHECK(map_range(f->map, 2 * i, 2 * i) == 0);
        }
        /* Where the middle was, one mapping takes the place of many. */
        CHECK(unmap_range(f->map, 20, wide) == (wide - 20) / 2 + 1);
        CHECK(map_range(f->map, 19, wide + 1) == 0);
        iova_map_verify(f->map);
        for (uint64_t at = 19; at <= wide + 1; at++) {
            CHECK(iova_map_find(f->map, at, &mapping) && mapping.first == 19);
            CHECK(map_range(f->map, at, at) == -EEXIST);
            unmap_refused(f->map, at, at, -ERANGE);
            unmap_refused(f->map, 18, at <= wide ? at : wide, -ERANGE);
        }
        CHECK(unmap_range(f->map, 19, wide + 1) == 1);
        start_over(f);
    }
}

/* Mappings in ascending or descending order, or at random, cost at most 64 bytes each, in order about half that. */
static void test_bytes(struct fixture *f)
{
    const uint64_t n = 200000;
    uint64_t state = 7;

    for (uint64_t i = 0; i < n; i++) {
        CHECK(map_range(f->map, i * 4096, i * 4096 + 4095) == 0);
    }
    iova_map_verify(f->map);
    CHECK(iova_pool_bytes(f->pool) <= 32 * n);
    start_over(f);
    for (uint64_t i = n; i > 0; i--) {
        CHECK(map_range(f->map, i * 4096, i * 4096 + 4095) == 0);
    }
    iova_map_verify(f->map);
    CHECK(iova_pool_bytes(f->pool) <= 32 * n);
    start_over(f);
    while (iova_map_count(f->map) < n) {
        uint64_t page = next_random(&state) & ~UINT64_C(0xfff);
        int error = map_range(f->map, page, page + 4095);
        CHECK(error == 0 || error == -EEXIST);
    }
    iova_map_verify(f->map);
    CHECK(iova_pool_bytes(f->pool) <= 50 * n);
}

/* The bound of 64 bytes holds in the worst case too: leaves that were all split and never filled again. */
static void test_bytes_worst_case(struct fixture *f)
{
    const uint64_t n = 200000;

    for (uint64_t i = 0; i < n; i++) {
        CHECK(map_range(f->map, i * 4096, i * 4096) == 0);
    }
    /* One more mapping in the middle of each full leaf splits it in two halves. */
    for (uint64_t i = LEAF_MAX / 2; i < n; i += LEAF_MAX) {
        CHECK(map_range(f->map, i * 4096 + 1, i * 4096 + 1) == 0);
    }
    iova_map_verify(f->map);
    CHECK(iova_pool_bytes(f->pool) > 56 * n); /* or this test does not do what it says */
    CHECK(iova_pool_bytes(f->pool) <= 64 * iova_map_count(f->map));
}

/* Mappings removed at random give their memory back: 64 bytes for each that is left, and 128 KiB. */
static void test_bytes_after_removal(struct fixture *f)
{
    const unsigned n = 200000;
    uint64_t *page = malloc(n * sizeof(*page));
    uint64_t state = 9;

    CHECK(page);
    for (unsigned i = 0; i < n; i++) {
        do {
            page[i] = next_random(&state) & ~UINT64_C(0xfff);
        } while (map_range(f->map, page[i], page[i] + 4095));
    }
    for (unsigned left = n; left > 0; left--) {
        unsigned i = (unsigned)(next_random(&state) % left);
        CHECK(unmap_range(f->map, page[i], page[i] + 4095) == 1);
        page[i] = page[left - 1];
        if (left % 997 == 1) {
            CHECK(iova_pool_bytes(f->pool) <= 64 * (size_t)left + (size_t)2 * IOVA_CHUNK_BYTES);
        }
        if (left % 19997 == 1) {
            iova_map_verify(f->map);
            for (unsigned j = 0; j < left - 1; j++) {
                CHECK(is_mapped(f->map, page[j], page[j] + 4095));
            }
        }
    }
    CHECK(iova_map_count(f->map) == 0);
    free(page);
}

/* Freeing one of two maps that grew together gives its memory back and leaves the other as it was. */
static void test_two_maps(struct fixture *f)
{
    struct iova_map *other = iova_map_new(f->pool);
    size_t empty = iova_pool_bytes(f->pool);
    const uint64_t n = 100000;
    uint64_t state = 3;

    CHECK(other);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t page = next_random(&state) << 12;
        CHECK(map_range(other, page, page) != -ENOMEM);
        if (i % 8 == 0) {
            CHECK(map_range(f->map, page, page + 4095) == 0);
        }
    }
    size_t full = iova_pool_bytes(f->pool);
    iova_map_free(other);
    CHECK(iova_pool_bytes(f->pool) < empty + (full - empty) / 4);
    iova_map_verify(f->map);
    state = 3;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t page = next_random(&state) << 12;
        CHECK(i % 8 != 0 || is_mapped(f->map, page, page + 4095));
    }
    start_over(f);
    CHECK(iova_pool_bytes(f->pool) <= empty + IOVA_CHUNK_BYTES);
}

/* Whichever allocation of an insertion is refused, the map stays as it was and the insertion works later. */
static void test_no_memory(struct fixture *f)
{
    struct iova_model model = {0};
    uint64_t state = 5;
    unsigned most = 0;

    f->memory.limited = true;
    f->memory.left = 0;
    CHECK(!iova_map_new(f->pool));
    for (unsigned i = 0; i < 60000; i++) {
        uint64_t first = i < 20000 ? i * UINT64_C(16) : next_random(&state) % (UINT64_C(1) << 40);
        struct iova_mapping mapping = {.first = first, .last = first + 3, .phys = i, .flags = i};
        unsigned allocations = 0;
        int error;
        do {
            f->memory.left = allocations++;
            error = iova_map_insert(f->map, &mapping);
            if (error == -ENOMEM) {
                if (allocations > 1) {
                    iova_map_verify(f->map);
                    iova_model_compare(&model, f->map);
                }
                iova_model_probe(&model, f->map, mapping.first, mapping.last);
                CHECK(iova_map_count(f->map) == model.count);
            }
        } while (error == -ENOMEM);
        CHECK(error == iova_model_insert(&model, &mapping));
        most = allocations > most ? allocations : most;
    }
    CHECK(most >= 4); /* a leaf, an inner node and a new root at once */
    iova_map_verify(f->map);
    iova_model_compare(&model, f->map);
    free(model.mapping);
}

/* Removing works when no memory can be had at all, whatever it joins and moves. */
static void test_removal_needs_no_memory(struct fixture *f)
{
    const uint64_t n = 50000;

    for (uint64_t i = 0; i < n; i++) {
        CHECK(map_range(f->map, i * 7919 % n * 16, i * 7919 % n * 16 + 7) == 0);
    }
    f->memory.limited = true;
    f->memory.left = 0;
    f->memory.asked = 0;
    for (uint64_t i = 0; i < n; i += 2) {
        CHECK(unmap_range(f->map, i * 104729 % n * 16, i * 104729 % n * 16 + 15) == 1);
    }
    iova_map_verify(f->map);
    CHECK(unmap_range(f->map, 16 * 1000, 16 * (n - 1000) - 1) > n / 4);
    iova_map_verify(f->map);
    CHECK(unmap_range(f->map, 0, UINT64_MAX) > 0);
    CHECK(f->memory.asked == 0);
}

/* First in, first out, the order of a ring of buffers, keeps a deep tree in shape at both edges. */
static void test_sliding_window(struct fixture *f)
{
    const uint64_t window = 5000;

    for (unsigned down = 0; down < 2; down++) {
        for (uint64_t i = 0; i < 40000; i++) {
            uint64_t in = down ? UINT64_MAX - 2 * i : 2 * i;
            CHECK(map_range(f->map, in, in) == 0);
            if (i >= window) {
                uint64_t out = down ? in + 2 * window : in - 2 * window;
                CHECK(unmap_range(f->map, out, out) == 1);
            }
            if (i % 1000 == 0) {
                iova_map_verify(f->map);
            }
        }
        CHECK(iova_map_count(f->map) == window);
        start_over(f);
    }
}

/* A long random run, growing and shrinking, does everything that a sorted array does. */
static void test_against_a_model(struct fixture *f)
{
    struct iova_model model = {0};
    uint64_t state = 11;

    for (unsigned step = 0; step < 300000; step++) {
        /* Long phases of mostly mapping and of mostly unmapping take the tree from empty to three levels and back. */
        bool grow = next_random(&state) % 8 < (step / 30000 % 2 == 0 ? 7u : 1u);
        uint64_t first = next_random(&state) % 600000;
        uint64_t last = first + next_random(&state) % 24;
        uint64_t removed;
        uint64_t expected;
        if (next_random(&state) % 8 == 0) {
            first = UINT64_MAX - first; /* the other end of the space */
            last = last % 2 ? UINT64_MAX : first;
        }
        if (grow) {
            struct iova_mapping mapping = {.first = first, .last = last, .phys = step, .flags = step};
            CHECK(iova_map_insert(f->map, &mapping) == iova_model_insert(&model, &mapping));
        } else {
            size_t at = iova_model_seek(&model, first);
            if (step % 4 > 0 && at < model.count) { /* hit exactly one, most of the time, and sometimes a few */
                first = model.mapping[at].first;
                at = at + step % 64 / 61 < model.count ? at + step % 64 / 61 : at;
                last = model.mapping[at].last;
            }
            int error = iova_model_remove(&model, first, last, &expected);
            CHECK(iova_map_check_remove(f->map, first, last) == error);
            CHECK(iova_map_remove(f->map, first, last, &removed) == error);
            CHECK(removed == expected);
        }
        iova_model_probe(&model, f->map, first, last);
        iova_model_probe(&model, f->map, last, UINT64_MAX);
        if (step % 5000 == 0) {
            iova_map_verify(f->map);
            iova_model_compare(&model, f->map);
        }
    }
    free(model.mapping);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(struct fixture *fixture);
    } tests[] = {
        {"empty", test_empty},
        {"unmap examples", test_unmap_examples},
        {"unmap never splits", test_unmap_never_splits},
        {"unmap never splits far", test_unmap_never_splits_far},
        {"overlap", test_overlap},
        {"ends of the space", test_ends_of_the_space},
        {"payload", test_payload},
        {"mapping across leaves", test_mapping_across_leaves},
        {"bytes", test_bytes},
        {"bytes, worst case", test_bytes_worst_case},
        {"bytes after removal", test_bytes_after_removal},
        {"two maps", test_two_maps},
        {"no memory", test_no_memory},
        {"removal needs no memory", test_removal_needs_no_memory},
        {"sliding window", test_sliding_window},
        {"against a model", test_against_a_model},
    };

    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        struct fixture fixture;
        set_up(&fixture);
        tests[i].run(&fixture);
        tear_down(&fixture);
        printf("ok: %s\n", tests[i].name);
        fflush(stdout);
    }
    return 0;
}
