/*
 * How long the guest waited: a histogram of service times, log-linear as in HdrHistogram. Four buckets to every power
 * of two, so that a number read from it is wrong by less than a quarter. One writer, any readers.
 */
#ifndef VIOMMU_SERVICE_TIME_H
#define VIOMMU_SERVICE_TIME_H

#include <stdint.h>

#include "counters.h"
#include "viommu.h"

struct service_times {
    uint32_t every;            /* one batch of so many is timed; 0: none */
    uint32_t until;            /* batches before the next that is */
    uint64_t sum_ns;
    uint64_t counts[VIOMMU_TIME_BUCKETS];
};

/* Which bucket: exact below 4 ns, then four to a power of two; the last takes everything longer. */
static inline unsigned service_time_bucket(uint64_t ns)
{
    unsigned power, bucket;

    if (ns < 4)
        return (unsigned)ns;
    power = 63u - (unsigned)__builtin_clzll(ns);
    bucket = 4 * (power - 1) + (unsigned)(ns >> (power - 2) & 3);
    return bucket < VIOMMU_TIME_BUCKETS ? bucket : VIOMMU_TIME_BUCKETS - 1;
}

/* Whether the batch that begins now is one to be timed. */
static inline bool service_time_due(struct service_times *times)
{
    if (times->every == 0 || --times->until != 0)
        return false;
    times->until = times->every;
    return true;
}

/* A batch of so many requests took ns: each of them waited for its end. */
static inline void service_time_add(struct service_times *times, unsigned requests, uint64_t ns)
{
    count_add(&times->counts[service_time_bucket(ns)], requests);
    count_add(&times->sum_ns, requests * ns);
}

#endif
