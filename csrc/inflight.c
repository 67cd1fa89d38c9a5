#include "inflight.h"

#include <string.h>

#include "le.h"

#define HEADER 16u
#define ENTRY 16u
#define PACKED_HEADER 32u
#define PACKED_ENTRY 32u
#define VERSION 1u

uint64_t inflight_queue_bytes(uint32_t queue_size)
{
    /* Room for either format: which one it will be is not known when the front-end asks. Packed is the larger. */
    uint64_t bytes = PACKED_HEADER + (uint64_t)PACKED_ENTRY * queue_size;

    return (bytes + 63) & ~63ull;
}

/*
 * Whoever reads the region does so after this process has died, so it is the compiler alone that could put a later
 * store first.
 */
static void in_order(void)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static uint8_t *entry_at(const struct inflight *inflight, uint16_t head)
{
    return inflight->region + HEADER + (size_t)ENTRY * head;
}

void inflight_init(struct inflight *inflight, uint8_t *region, uint32_t queue_size)
{
    memset(inflight, 0, sizeof(*inflight));
    inflight->region = region;
    inflight->size = (uint16_t)queue_size;
}

static uint64_t counter_of(const struct inflight *inflight, uint16_t head)
{
    return le64_get(entry_at(inflight, head) + 8);
}

void inflight_split_recover(struct inflight *inflight, uint16_t used_idx)
{
    uint64_t counters[VIOMMU_MAX_QUEUE_SIZE];
    uint16_t published;

    inflight->resubmit_count = inflight->resubmit_next = 0;
    inflight->batched = 0;
    if (le16_get(inflight->region + 8) == 0) { /* a region as it was made */
        memset(inflight->region, 0, HEADER + (size_t)ENTRY * inflight->size);
        le16_put(inflight->region + 8, VERSION);
        le16_put(inflight->region + 10, inflight->size);
        le16_put(inflight->region + 14, used_idx);
        return;
    }
    /* The process may have died between publishing a batch and saying so here: finish that batch. */
    published = (uint16_t)(used_idx - le16_get(inflight->region + 14));
    if (published <= inflight->size) {
        uint16_t head = le16_get(inflight->region + 12);

        for (; published != 0 && head < inflight->size; published--) {
            entry_at(inflight, head)[0] = 0;
            head = le16_get(entry_at(inflight, head) + 6);
        }
    }
    le16_put(inflight->region + 14, used_idx);
    for (uint16_t head = 0; head < inflight->size; head++) {
        uint64_t counter = counter_of(inflight, head);
        uint16_t at;

        if (entry_at(inflight, head)[0] != 1)
            continue;
        if (counter >= inflight->counter)
            inflight->counter = counter + 1;
        for (at = inflight->resubmit_count; at > 0 && counters[at - 1] > counter; at--) {
            counters[at] = counters[at - 1];
            inflight->resubmit[at] = inflight->resubmit[at - 1];
        }
        counters[at] = counter;
        inflight->resubmit[at] = head;
        inflight->resubmit_count++;
    }
}

bool inflight_split_resubmit(struct inflight *inflight, uint16_t *head)
{
    if (inflight->resubmit_next >= inflight->resubmit_count)
        return false;
    *head = inflight->resubmit[inflight->resubmit_next++];
    return true;
}

void inflight_split_take(struct inflight *inflight, uint16_t head)
{
    uint8_t *entry;

    if (head >= inflight->size)
        return;
    entry = entry_at(inflight, head);
    le64_put(entry + 8, inflight->counter++);
    __atomic_store_n(entry, 1, __ATOMIC_RELEASE);
}

void inflight_split_give(struct inflight *inflight, uint16_t head)
{
    if (head >= inflight->size || inflight->batched >= VIOMMU_MAX_QUEUE_SIZE)
        return;
    le16_put(entry_at(inflight, head) + 6, le16_get(inflight->region + 12));
    in_order();
    le16_put(inflight->region + 12, head);
    inflight->batch[inflight->batched++] = head;
}

void inflight_split_publish(struct inflight *inflight, uint16_t used_idx)
{
    for (uint16_t i = 0; i < inflight->batched; i++)
        __atomic_store_n(entry_at(inflight, inflight->batch[i]), 0, __ATOMIC_RELEASE);
    inflight->batched = 0;
    in_order();
    le16_put(inflight->region + 14, used_idx);
}
