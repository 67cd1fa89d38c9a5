/*
 * The split virtqueue (virtio 1.x section 2.7).
 *   descriptor table: size x { addr le64, len le32, flags le16, next le16 }
 *   available ring:   flags le16, idx le16, ring le16[size], used_event le16
 *   used ring:        flags le16, idx le16, ring { id le32, len le32 }[size], avail_event le16
 */
#include <errno.h>

#include "le.h"
#include "virtqueue.h"

#define DESC_SIZE 16u
#define RING_HEAD 4u
#define AVAIL_FLAG_NO_INTERRUPT 1u
#define USED_FLAG_NO_NOTIFY 1u

static uint8_t *used_entry(const struct virtqueue *vq, uint16_t index)
{
    return vq->device + RING_HEAD + 8u * (index & (vq->size - 1));
}

int split_ring_init(struct virtqueue *vq, const struct viommu_ring *ring)
{
    uint32_t size = ring->size;

    if ((size & (size - 1)) != 0 || ring->base > UINT16_MAX)
        return -EINVAL;
    if ((ring->desc & 15) != 0 || (ring->avail & 1) != 0 || (ring->used & 3) != 0)
        return -EINVAL;
    vq->desc = guest_memory_span(vq->memory, ring->desc, (uint64_t)size * DESC_SIZE, ring->gpa, NULL);
    vq->driver = guest_memory_span(vq->memory, ring->avail, RING_HEAD + 2ull * size + 2, ring->gpa, NULL);
    vq->device = guest_memory_span(vq->memory, ring->used, RING_HEAD + 8ull * size + 2, ring->gpa, NULL);
    if (vq->desc == NULL || vq->driver == NULL || vq->device == NULL)
        return -EFAULT;
    /* A region may begin anywhere in a file, so an aligned guest address need not be an aligned one of ours. */
    if (((uintptr_t)vq->driver & 1) != 0 || ((uintptr_t)vq->device & 3) != 0)
        return -EINVAL;
    vq->next_avail = (uint16_t)ring->base;
    /* What has been used is what was taken: nothing is in flight between stop and start. The index in memory would
     * say the same for an honest driver, and must not be trusted from another. */
    vq->next_used = (uint16_t)ring->base;
    if (vq->inflight != NULL) { /* unless a former process died: then the used index and what it had taken */
        uint16_t used = shared16_get(vq->device + 2, __ATOMIC_RELAXED);

        inflight_split_recover(vq->inflight, used);
        if (vq->inflight->resubmit_count != 0) {
            vq->next_used = used;
            vq->next_avail = (uint16_t)(used + vq->inflight->resubmit_count);
        }
    }
    vq->signalled = vq->next_used;
    return 0;
}

static bool again(const struct virtqueue *vq)
{
    return vq->inflight != NULL && vq->inflight->resubmit_next < vq->inflight->resubmit_count;
}

static bool available(const struct virtqueue *vq)
{
    return again(vq) || shared16_get(vq->driver + 2, __ATOMIC_ACQUIRE) != vq->next_avail;
}

static struct descriptor descriptor_at(const struct virtqueue *vq, uint32_t index)
{
    const uint8_t *at = vq->desc + (size_t)index * DESC_SIZE;
    uint8_t copy[DESC_SIZE];

    memcpy(copy, at, sizeof(copy)); /* once: the driver may rewrite it under us */
    __asm__ volatile("" ::: "memory"); /* and the compiler may not read it again */
    return (struct descriptor){le64_get(copy), le32_get(copy + 8), le16_get(copy + 12), le16_get(copy + 14)};
}

/* An indirect table: a chain of its own, inside one buffer. flags of its entries: NEXT and WRITE. */
static int take_indirect(struct virtqueue *vq, struct chain *chain, const struct descriptor *table)
{
    uint32_t entries = table->len / DESC_SIZE;
    uint32_t index = 0;

    if (!vq->indirect || table->len == 0 || table->len % DESC_SIZE != 0 || (table->a & DESC_NEXT) != 0)
        return virtqueue_break(vq, VIOMMU_BROKEN_INDIRECT);
    if (!guest_memory_covers(vq->memory, table->addr, table->len))
        return virtqueue_break(vq, VIOMMU_BROKEN_ADDRESS);
    for (uint32_t steps = 0; steps < vq->size; steps++) {
        uint8_t copy[DESC_SIZE];
        uint16_t flags;

        if (guest_memory_read(vq->memory, table->addr + (uint64_t)index * DESC_SIZE, copy, sizeof(copy)) != 0)
            return virtqueue_break(vq, VIOMMU_BROKEN_ADDRESS);
        flags = le16_get(copy + 12);
        if ((flags & DESC_INDIRECT) != 0)
            return virtqueue_break(vq, VIOMMU_BROKEN_INDIRECT);
        if (chain_add(vq, chain, le64_get(copy), le32_get(copy + 8), (flags & DESC_WRITE) != 0) != 0)
            return -EPROTO;
        if ((flags & DESC_NEXT) == 0)
            return 1;
        index = le16_get(copy + 14);
        if (index >= entries)
            return virtqueue_break(vq, VIOMMU_BROKEN_HEAD);
    }
    return virtqueue_break(vq, VIOMMU_BROKEN_LOOP);
}

static int take(struct virtqueue *vq, struct chain *chain)
{
    bool resubmitted = again(vq);
    uint32_t index;

    if (resubmitted) {
        uint16_t head;

        (void)inflight_split_resubmit(vq->inflight, &head);
        index = head;
    } else {
        uint16_t ahead = (uint16_t)(shared16_get(vq->driver + 2, __ATOMIC_ACQUIRE) - vq->next_avail);

        if (ahead == 0)
            return 0;
        for (unsigned i = 0; i < sizeof(vq->likely) / sizeof(vq->likely[0]); i++)
            __builtin_prefetch(vq->likely[i]);
        if (ahead > vq->size)
            return virtqueue_break(vq, VIOMMU_BROKEN_AVAIL);
        index = shared16_get(vq->driver + RING_HEAD + 2u * (vq->next_avail & (vq->size - 1)), __ATOMIC_RELAXED);
    }
    if (index >= vq->size)
        return virtqueue_break(vq, VIOMMU_BROKEN_HEAD);
    chain->id = (uint16_t)index;
    chain->slots = 1;
    for (uint32_t steps = 0; steps < vq->size; steps++) {
        struct descriptor desc = descriptor_at(vq, index);

        if ((desc.a & DESC_INDIRECT) != 0) {
            if (take_indirect(vq, chain, &desc) != 1)
                return -EPROTO;
            goto taken;
        }
        if (chain_add(vq, chain, desc.addr, desc.len, (desc.a & DESC_WRITE) != 0) != 0)
            return -EPROTO;
        if ((desc.a & DESC_NEXT) == 0)
            goto taken;
        index = desc.b;
        if (index >= vq->size)
            return virtqueue_break(vq, VIOMMU_BROKEN_HEAD);
    }
    return virtqueue_break(vq, VIOMMU_BROKEN_LOOP);
taken:
    if (resubmitted) /* counted and marked by the process that took it first, in its order */
        return 1;
    vq->next_avail++;
    if (vq->inflight != NULL)
        inflight_split_take(vq->inflight, chain->id);
    return 1;
}

static void give(struct virtqueue *vq, const struct chain *chain, uint32_t length)
{
    uint8_t *entry = used_entry(vq, vq->next_used);

    le32_put(entry, chain->id);
    le32_put(entry + 4, length);
    virtqueue_log(vq, vq->log_addr, (uint64_t)(entry - vq->device), 8);
    if (vq->inflight != NULL)
        inflight_split_give(vq->inflight, chain->id);
    vq->next_used++;
    if (vq->pending++ == 0) {
        vq->likely[0] = vq->desc + (size_t)chain->id * DESC_SIZE;
        vq->likely[1] = guest_memory_span(vq->memory, chain->buffers[0].gpa, 1, true, NULL);
        vq->likely[2] = chain->writable == 0 ? NULL
                                             : guest_memory_span(vq->memory, chain->buffers[chain->readable].gpa, 1,
                                                                 true, NULL);
    }
}

static bool publish(struct virtqueue *vq)
{
    uint16_t before = vq->signalled;

    if (vq->pending == 0)
        return false;
    shared16_put(vq->device + 2, vq->next_used, __ATOMIC_RELEASE);
    virtqueue_log(vq, vq->log_addr, 2, 2);
    if (vq->inflight != NULL)
        inflight_split_publish(vq->inflight, vq->next_used);
    vq->pending = 0;
    /* The driver writes its wish, then looks at the index; we write the index, then look at its wish. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    vq->signalled = vq->next_used;
    if (vq->event_idx) {
        uint16_t wanted = shared16_get(vq->driver + RING_HEAD + 2u * vq->size, __ATOMIC_RELAXED);

        /* wanted lies in [before, next_used), modulo 2^16 (section 2.7.10) */
        return (uint16_t)(vq->next_used - wanted - 1) < (uint16_t)(vq->next_used - before);
    }
    return (shared16_get(vq->driver, __ATOMIC_RELAXED) & AVAIL_FLAG_NO_INTERRUPT) == 0;
}

static void want_kick(struct virtqueue *vq, bool want)
{
    if (vq->event_idx) {
        /* Not wanting is leaving avail_event behind: it is reached again after 65536 requests, a harmless kick. */
        if (want) {
            shared16_put(vq->device + RING_HEAD + 8u * vq->size, vq->next_avail, __ATOMIC_RELAXED);
            virtqueue_log(vq, vq->log_addr, RING_HEAD + 8ull * vq->size, 2);
        }
    } else {
        shared16_put(vq->device, (uint16_t)(want ? 0u : USED_FLAG_NO_NOTIFY), __ATOMIC_RELAXED);
        virtqueue_log(vq, vq->log_addr, 0, 2);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static uint32_t base(const struct virtqueue *vq)
{
    return vq->next_avail;
}

/* A driver hands over a zeroed ring; every answered request has a length. */
static bool looks_used(const struct virtqueue *vq)
{
    return le32_get(vq->device + RING_HEAD + 4) != 0;
}

const struct ring_ops split_ring_ops = {take, available, give, publish, want_kick, base, looks_used};
