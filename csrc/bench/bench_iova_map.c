/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a mapping costs in iova_map, and beside it in QEMU's way of keeping mappings: gtree_map.
 *
 * With N mappings live, each step unmaps one of them and maps another 4 KiB page: the oldest and the
 * next page (sequential), or any two (random). Prints ns per request, half a step, and bytes per mapping.
 */
#include <inttypes.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "gtree_map.h"
#include "iova_map.h"

#define PAGE UINT64_C(4096)

static double now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
    /* splitmix64 */
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* One of the two, behind the same two functions. */
struct subject {
    struct iova_pool *pool;
    struct iova_map *map;
    GTree *tree;
};

static int subject_map(struct subject *subject, uint64_t first)
{
    if (subject->tree) {
        return gtree_map_insert(subject->tree, first, first + PAGE - 1, first ^ PAGE, 3);
    }
    struct iova_mapping mapping = {.first = first, .last = first + PAGE - 1, .phys = first ^ PAGE, .flags = 3};
    return iova_map_insert(subject->map, &mapping);
}

static int subject_unmap(struct subject *subject, uint64_t first)
{
    return subject->tree ? gtree_map_remove(subject->tree, first, first + PAGE - 1)
                         : iova_map_remove(subject->map, first, first + PAGE - 1, NULL);
}

/* Page address i of a pattern: no two of one pattern are the same. Random ones are scattered over 2^40 pages. */
static uint64_t page_at(uint64_t i, bool random)
{
    const uint64_t mask = (UINT64_C(1) << 40) - 1;

    for (unsigned round = 0; random && round < 3; round++) {
        i = (i * UINT64_C(0x9e3779b97f4a7c15)) & mask; /* odd, so each step can be undone */
        i ^= i >> 21;
    }
    return i * PAGE;
}

static void measure(struct subject *subject, const char *name, unsigned live, bool random, unsigned steps)
{
    uint64_t *page = malloc(live * sizeof(*page));
    uint64_t *gone = malloc(steps * sizeof(*gone));
    uint64_t *fresh = malloc(steps * sizeof(*fresh));
    uint64_t state = 1;
    size_t before = subject->tree ? mallinfo2().uordblks : 0;
    double start;
    double spent;

    if (!page || !gone || !fresh) {
        abort();
    }
    for (unsigned i = 0; i < live; i++) {
        page[i] = page_at(i, random);
        if (subject_map(subject, page[i])) {
            abort();
        }
    }
    size_t bytes = subject->tree ? mallinfo2().uordblks - before : iova_pool_bytes(subject->pool);
    for (unsigned i = 0; i < steps; i++) {
        uint64_t which = random ? next_random(&state) % live : i % live;
        gone[i] = page[which];
        fresh[i] = page[which] = page_at((uint64_t)live + i, random);
    }
    start = now_ns();
    for (unsigned i = 0; i < steps; i++) {
        if (subject_unmap(subject, gone[i]) || subject_map(subject, fresh[i])) {
            abort();
        }
    }
    spent = now_ns() - start;
    size_t after = subject->tree ? mallinfo2().uordblks - before : iova_pool_bytes(subject->pool);
    printf("%-8s %8u %-10s %8.1f ns/request  %6.1f bytes/mapping when filled, %6.1f after\n", name, live,
           random ? "random" : "sequential", spent / (2.0 * steps), (double)bytes / live, (double)after / live);
    fflush(stdout);
    /* What is held when most of it has gone again, in no order. */
    if (!subject->tree && random) {
        for (unsigned left = live; left > live / 16; left--) {
            unsigned i = (unsigned)(next_random(&state) % left);
            uint64_t last = page[left - 1];
            if (subject_unmap(subject, page[i])) {
                abort();
            }
            page[i] = last;
            if (left - 1 == live / 2 || left - 1 == live / 4 || left - 1 == live / 16) {
                printf("         %8u left: %6.1f bytes/mapping\n", left - 1,
                       (double)iova_pool_bytes(subject->pool) / (left - 1));
            }
        }
    }
    free(page);
    free(gone);
    free(fresh);
}

int main(void)
{
    static const unsigned sizes[] = {1000, 64000, 1000000};

    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (unsigned random = 0; random < 2; random++) {
            for (unsigned reference = 0; reference < 2; reference++) {
                struct subject subject = {0};
                if (reference) {
                    subject.tree = gtree_map_new();
                } else {
                    subject.pool = iova_pool_new(NULL);
                    subject.map = iova_map_new(subject.pool);
                }
                measure(&subject, reference ? "gtree" : "iova_map", sizes[i], random, 2000000);
                if (reference) {
                    g_tree_destroy(subject.tree);
                } else {
                    double start = now_ns();
                    uint64_t count = iova_map_count(subject.map);
                    iova_map_free(subject.map);
                    printf("         freed %" PRIu64 " mappings in %.1f us; %zu bytes left\n", count,
                           (now_ns() - start) / 1000, iova_pool_bytes(subject.pool));
                    iova_pool_free(subject.pool);
                }
            }
        }
    }
    return 0;
}
