/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver: a virtio-iommu driver small enough to cost nothing, for benchmarks: a guest of one shared memory file with
 * a split request queue, played from this process against the real engine.
 */
#ifndef VIOMMU_BENCH_DRIVER_H
#define VIOMMU_BENCH_DRIVER_H

#include <stdbool.h>
#include <stdint.h>

#include "viommu.h"

enum {
    RING_SIZE = 256,
    CHAINS = RING_SIZE / 2, /* a request is a readable and a writable descriptor */
};

struct driver;

/* An engine that spins for spin_us and a driver for it, with endpoint 1 attached to domain 1. Exits on failure. */
struct driver *driver_new(uint32_t spin_us);
void driver_free(struct driver *driver);
struct viommu_engine *driver_engine(struct driver *driver);

/* Writes a request for a page at iova into the next free chain; it is not offered yet. At most CHAINS at a time. */
void driver_map(struct driver *driver, uint64_t iova);
void driver_unmap(struct driver *driver, uint64_t iova);

/* Offers what was written since. True if the device asks to be kicked. */
bool driver_offer(struct driver *driver);
void driver_kick(struct driver *driver);

/* Polls the used index until at most `left` of the requests that were offered are unanswered. */
void driver_wait(struct driver *driver, unsigned left);

/* Takes the answers back, and with them their chains. Exits if one is not OK. */
void driver_collect(struct driver *driver);

#endif
