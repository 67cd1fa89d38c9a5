/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a request costs in the engine, through a real ring and the real worker. run_engine.py runs it and
 * writes down what it says.
 *
 *   bench_engine mappings N sequential|random
 *       With N mappings live, requests go through the ring in batches of 64, every other one an UNMAP of a
 *       live mapping and a MAP of a new one: the oldest and the next page, or any two. While the worker
 *       serves a batch the next is written. Prints ns per request and bytes per mapping.
 *   bench_engine latency
 *       One request at a time. Prints microseconds from the kick until its answer is seen, with the worker asleep
 *       and spinning, and what is the least either could take on this machine.
 *
 * bench_engine_gtree is the same program with the mappings kept as QEMU keeps them: see gtree_iova_map.c.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "driver.h"
#include "latency.h"

#define PAGE UINT64_C(4096)

enum {
    BATCH = 64,
    SPIN_US = 2000, /* the worker does not sleep between batches, whatever else the machine does */
};

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

static uint64_t next_random(uint64_t *state)
{
    /* xorshift64* */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static void submit(struct driver *driver)
{
    if (driver_offer(driver)) {
        driver_kick(driver);
    }
}

static int run_mappings(uint64_t live, bool random)
{
    const uint64_t steps = 1u << 20; /* of two requests */
    struct driver *driver = driver_new(SPIN_US);
    uint64_t *page = malloc(live * sizeof(*page));
    uint64_t *gone = malloc(steps * sizeof(*gone));
    uint64_t *fresh = malloc(steps * sizeof(*fresh));
    uint64_t state = 88172645463325252u;
    struct viommu_stats stats;

    if (!page || !gone || !fresh) {
        return 1;
    }
    for (uint64_t i = 0; i < live; i++) {
        page[i] = page_at(i, random);
        driver_map(driver, page[i]);
        if (i % BATCH == BATCH - 1 || i + 1 == live) {
            submit(driver);
            driver_wait(driver, 0);
            driver_collect(driver);
        }
    }
    /* All addresses are drawn beforehand, so that the measured loop only reads two arrays from front to back. */
    for (uint64_t i = 0; i < steps; i++) {
        uint64_t which = random ? next_random(&state) % live : i % live;
        gone[i] = page[which];
        fresh[i] = page[which] = page_at(live + i, random);
    }
    double start = monotonic_ns();
    for (uint64_t i = 0; i < steps; i += BATCH / 2) {
        driver_wait(driver, BATCH);
        driver_collect(driver);
        for (uint64_t j = i; j < i + BATCH / 2; j++) {
            driver_unmap(driver, gone[j]);
            driver_map(driver, fresh[j]);
        }
        submit(driver);
    }
    driver_wait(driver, 0);
    driver_collect(driver);
    double spent = monotonic_ns() - start;
    viommu_engine_stats(driver_engine(driver), &stats);
    if (stats.mappings != live) {
        fprintf(stderr, "bench: %" PRIu64 " mappings are live\n", stats.mappings);
        return 1;
    }
    printf("{\"ns\": %.1f, \"bytes_per_mapping\": %.1f}\n", spent / (2.0 * (double)steps),
           (double)stats.mapping_bytes / (double)stats.mappings);
    free(page);
    free(gone);
    free(fresh);
    driver_free(driver);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "mappings") == 0) {
        uint64_t live = strtoull(argv[2], NULL, 10);
        bool random = strcmp(argv[3], "random") == 0;
        if (live >= BATCH && (random || strcmp(argv[3], "sequential") == 0)) {
            return run_mappings(live, random);
        }
    }
    if (argc == 2 && strcmp(argv[1], "latency") == 0) {
        return run_latency();
    }
    fprintf(stderr, "usage: %s mappings N sequential|random (N at least %d)\n       %s latency\n", argv[0], BATCH, argv[0]);
    return 2;
}
