#include "recording.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* Of 96 bytes each; pages that are never reached are never allocated. */
#define CAPACITY (1u << 16)

struct recording {
    uint64_t gap;               /* dropped since the last entry that fitted; the writer's */
    _Atomic uint64_t dropped;   /* in all */
    uint64_t told;              /* of those, in entries that were taken; the reader's */
    _Atomic uint32_t head;
    _Atomic uint32_t tail;
    struct viommu_recorded ring[CAPACITY];
};

struct recording *recording_new(void)
{
    return calloc(1, sizeof(struct recording));
}

void recording_free(struct recording *recording)
{
    free(recording);
}

void recording_put(struct recording *recording, struct viommu_recorded *entry)
{
    uint32_t tail = atomic_load_explicit(&recording->tail, memory_order_relaxed);
    struct timespec time;

    if (tail - atomic_load_explicit(&recording->head, memory_order_acquire) >= CAPACITY) {
        recording->gap++;
        atomic_fetch_add_explicit(&recording->dropped, 1, memory_order_relaxed);
        return;
    }
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    entry->time_ns = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    entry->lost = recording->gap;
    recording->gap = 0;
    recording->ring[tail % CAPACITY] = *entry;
    atomic_store_explicit(&recording->tail, tail + 1, memory_order_release);
}

size_t recording_take(struct recording *recording, struct viommu_recorded *out, size_t max, uint64_t *lost)
{
    uint32_t head = atomic_load_explicit(&recording->head, memory_order_relaxed);
    /* Read before the ring: what it counts is then told by an entry taken now, or is after all that are there. */
    uint64_t dropped = atomic_load_explicit(&recording->dropped, memory_order_acquire);
    size_t count = 0;

    while (count < max && head != atomic_load_explicit(&recording->tail, memory_order_acquire)) {
        out[count] = recording->ring[head++ % CAPACITY];
        recording->told += out[count++].lost;
    }
    atomic_store_explicit(&recording->head, head, memory_order_release);
    *lost = dropped > recording->told ? dropped - recording->told : 0;
    return count;
}
