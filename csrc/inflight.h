/*
 * The shared in-flight region of vhost-user (INFLIGHT_SHMFD): which chains a device has taken and not given back,
 * kept where the next device process can find it. The layout is the protocol's "QueueRegionSplit":
 *   features le64, version le16, desc_num le16, last_batch_head le16, used_idx le16,
 *   desc_num x { inflight u8, padding u8[5], next le16, counter le64 }
 * The region is the front-end's to write as well, so nothing read from it is used unchecked, and it is read only
 * when a ring starts. Packed rings are not tracked: their region stays zero, which means "nothing in flight", true
 * whenever a ring is stopped in order.
 */
#ifndef VIOMMU_INFLIGHT_H
#define VIOMMU_INFLIGHT_H

#include <stdbool.h>
#include <stdint.h>

#include "viommu.h"

struct inflight {
    uint8_t *region;     /* of one queue */
    uint16_t size;       /* descriptors it has room for */
    uint64_t counter;    /* order of taking */
    uint16_t batch[VIOMMU_MAX_QUEUE_SIZE]; /* given, not yet published */
    uint16_t batched;
    uint16_t resubmit[VIOMMU_MAX_QUEUE_SIZE]; /* heads of a former process, oldest first */
    uint16_t resubmit_count;
    uint16_t resubmit_next;
};

/* Bytes of one queue's region. */
uint64_t inflight_queue_bytes(uint32_t queue_size);

void inflight_init(struct inflight *inflight, uint8_t *region, uint32_t queue_size);

/* Find what a former process left behind; used_idx is the used index in ring memory. */
void inflight_split_recover(struct inflight *inflight, uint16_t used_idx);
/* The next head to do again: false when there is none. It is taken already. */
bool inflight_split_resubmit(struct inflight *inflight, uint16_t *head);

void inflight_split_take(struct inflight *inflight, uint16_t head);
void inflight_split_give(struct inflight *inflight, uint16_t head);
void inflight_split_publish(struct inflight *inflight, uint16_t used_idx);

#endif
