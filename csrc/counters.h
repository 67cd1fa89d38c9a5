/* Counters that one thread writes and any thread reads: relaxed, so that counting costs no more than an addition. */
#ifndef VIOMMU_COUNTERS_H
#define VIOMMU_COUNTERS_H

#include <stdint.h>

static inline void count_set(uint64_t *counter, uint64_t value)
{
    __atomic_store_n(counter, value, __ATOMIC_RELAXED);
}

static inline void count_add(uint64_t *counter, uint64_t by)
{
    count_set(counter, *counter + by);
}

static inline uint64_t count_get(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

#endif
