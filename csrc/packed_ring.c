/*
 * The packed virtqueue (virtio 1.x section 2.8).
 *   descriptor ring: size x { addr le64, len le32, id le16, flags le16 }, rewritten in place by the device
 *   event suppression, driver's and device's: { position le16 (15 bits, wrap bit 15), flags le16 }
 * A descriptor is available when AVAIL equals the driver's wrap counter and USED does not; it is used when both
 * equal the device's. The base of vhost-user is next_avail (15 bits) and its wrap, then next_used and its wrap.
 */
#include <errno.h>

#include "le.h"
#include "virtqueue.h"

#define DESC_SIZE 16u
#define DESC_AVAIL (1u << 7)
#define DESC_USED (1u << 15)
#define EVENT_ENABLE 0u
#define EVENT_DISABLE 1u
#define EVENT_AT 2u
#define WRAP (1u << 15)

int packed_ring_init(struct virtqueue *vq, const struct viommu_ring *ring)
{
    const struct viommu_region *desc_region, *device_region;
    uint32_t size = ring->size;

    if ((ring->desc & 15) != 0 || (ring->avail & 3) != 0 || (ring->used & 3) != 0)
        return -EINVAL;
    vq->desc = guest_memory_span(vq->memory, ring->desc, (uint64_t)size * DESC_SIZE, ring->gpa, &desc_region);
    vq->driver = guest_memory_span(vq->memory, ring->avail, 4, ring->gpa, NULL);
    vq->device = guest_memory_span(vq->memory, ring->used, 4, ring->gpa, &device_region);
    if (vq->desc == NULL || vq->driver == NULL || vq->device == NULL)
        return -EFAULT;
    if (((uintptr_t)vq->desc & 1) != 0 || ((uintptr_t)vq->driver & 1) != 0 || ((uintptr_t)vq->device & 1) != 0)
        return -EINVAL;
    /* ring->log_addr is an address for one area, made for the used ring of a split queue; here two are written. */
    vq->desc_gpa = desc_region->gpa + (uint64_t)(vq->desc - desc_region->host);
    vq->device_gpa = device_region->gpa + (uint64_t)(vq->device - device_region->host);
    vq->next_avail = (uint16_t)(ring->base & 0x7fff);
    vq->avail_wrap = (ring->base & WRAP) != 0;
    vq->next_used = (uint16_t)(ring->base >> 16 & 0x7fff);
    vq->used_wrap = (ring->base >> 31) != 0;
    if (vq->next_avail >= size || vq->next_used >= size)
        return -EINVAL;
    vq->signalled = vq->next_used;
    return 0;
}

static uint8_t *slot_at(const struct virtqueue *vq, uint32_t slot)
{
    return vq->desc + (size_t)slot * DESC_SIZE;
}

static bool is_available(const struct virtqueue *vq, uint32_t slot, bool wrap)
{
    uint16_t flags = shared16_get(slot_at(vq, slot) + 14, __ATOMIC_ACQUIRE);

    return ((flags & DESC_AVAIL) != 0) == wrap && ((flags & DESC_USED) != 0) != wrap;
}

static bool available(const struct virtqueue *vq)
{
    return is_available(vq, vq->next_avail, vq->avail_wrap);
}

/* An indirect table: entries in sequence, each one buffer; only WRITE has a meaning in their flags. */
static int take_indirect(struct virtqueue *vq, struct chain *chain, uint64_t addr, uint32_t len)
{
    if (!vq->indirect || len == 0 || len % DESC_SIZE != 0)
        return virtqueue_break(vq, VIOMMU_BROKEN_INDIRECT);
    if (!guest_memory_covers(vq->memory, addr, len))
        return virtqueue_break(vq, VIOMMU_BROKEN_ADDRESS);
    for (uint32_t at = 0; at < len; at += DESC_SIZE) {
        uint8_t copy[DESC_SIZE];

        if (guest_memory_read(vq->memory, addr + at, copy, sizeof(copy)) != 0)
            return virtqueue_break(vq, VIOMMU_BROKEN_ADDRESS);
        if (chain_add(vq, chain, le64_get(copy), le32_get(copy + 8), (le16_get(copy + 14) & DESC_WRITE) != 0) != 0)
            return -EPROTO;
    }
    return 0;
}

static void advance(const struct virtqueue *vq, uint16_t *slot, bool *wrap, uint16_t by)
{
    uint32_t next = (uint32_t)*slot + by;

    if (next >= vq->size) {
        next -= vq->size;
        *wrap = !*wrap;
    }
    *slot = (uint16_t)next;
}

static int take(struct virtqueue *vq, struct chain *chain)
{
    uint16_t slot = vq->next_avail;
    bool wrap = vq->avail_wrap;
    uint16_t slots = 0;
    uint16_t flags;

    if (!available(vq))
        return 0;
    do {
        uint8_t copy[DESC_SIZE];

        if (slots >= vq->size)
            return virtqueue_break(vq, VIOMMU_BROKEN_LOOP);
        /* The driver makes the first descriptor of a list available last, so the others must be by now. */
        if (slots != 0 && !is_available(vq, slot, wrap))
            return virtqueue_break(vq, VIOMMU_BROKEN_AVAIL);
        memcpy(copy, slot_at(vq, slot), sizeof(copy));
        __asm__ volatile("" ::: "memory");
        flags = le16_get(copy + 14);
        chain->id = le16_get(copy + 12); /* of the last descriptor counts */
        if ((flags & DESC_INDIRECT) != 0) {
            /* not together with chained descriptors (section 2.8.7) */
            if (slots != 0 || (flags & DESC_NEXT) != 0)
                return virtqueue_break(vq, VIOMMU_BROKEN_INDIRECT);
            if (take_indirect(vq, chain, le64_get(copy), le32_get(copy + 8)) != 0)
                return -EPROTO;
        } else if (chain_add(vq, chain, le64_get(copy), le32_get(copy + 8), (flags & DESC_WRITE) != 0) != 0) {
            return -EPROTO;
        }
        slots++;
        advance(vq, &slot, &wrap, 1);
    } while ((flags & DESC_NEXT) != 0);
    chain->slots = slots;
    vq->next_avail = slot;
    vq->avail_wrap = wrap;
    return 1;
}

static void give(struct virtqueue *vq, const struct chain *chain, uint32_t length)
{
    uint8_t *slot = slot_at(vq, vq->next_used);
    /* len counts only where WRITE is set: without it the driver sees that nothing was written */
    uint16_t flags = (uint16_t)((length != 0 ? DESC_WRITE : 0u) | (vq->used_wrap ? DESC_AVAIL | DESC_USED : 0u));

    le32_put(slot + 8, length);
    le16_put(slot + 12, chain->id);
    if (vq->pending == 0) { /* the batch shows when its first descriptor does */
        vq->head_slot = vq->next_used;
        vq->head_flags = flags;
    } else {
        shared16_put(slot + 14, flags, __ATOMIC_RELEASE);
        virtqueue_log(vq, vq->desc_gpa, (uint64_t)vq->next_used * DESC_SIZE, DESC_SIZE);
    }
    vq->pending++;
    advance(vq, &vq->next_used, &vq->used_wrap, chain->slots);
}

static bool publish(struct virtqueue *vq)
{
    uint16_t event, flags, before = vq->signalled, now = vq->next_used;
    bool wrap;

    if (vq->pending == 0)
        return false;
    vq->pending = 0;
    shared16_put(slot_at(vq, vq->head_slot) + 14, vq->head_flags, __ATOMIC_RELEASE);
    virtqueue_log(vq, vq->desc_gpa, (uint64_t)vq->head_slot * DESC_SIZE, DESC_SIZE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    vq->signalled = now;
    flags = shared16_get(vq->driver + 2, __ATOMIC_ACQUIRE) & 3;
    if (flags == EVENT_DISABLE)
        return false;
    if (flags != EVENT_AT || !vq->event_idx)
        return true;
    event = shared16_get(vq->driver, __ATOMIC_RELAXED);
    wrap = (event & WRAP) != 0;
    event &= 0x7fff;
    if (event >= vq->size)
        return true; /* not a position: better a notification too many */
    /* Compare on a line where this round is [0, size) and the one before it negative. */
    {
        int32_t at = now, from = before, want = event;

        if (wrap != vq->used_wrap)
            want -= (int32_t)vq->size;
        if (from >= at)
            from -= (int32_t)vq->size;
        return want >= from && want < at;
    }
}

static void want_kick(struct virtqueue *vq, bool want)
{
    if (!want) {
        shared16_put(vq->device + 2, EVENT_DISABLE, __ATOMIC_RELAXED);
    } else if (vq->event_idx) {
        shared16_put(vq->device, (uint16_t)(vq->next_avail | (vq->avail_wrap ? WRAP : 0u)), __ATOMIC_RELAXED);
        shared16_put(vq->device + 2, EVENT_AT, __ATOMIC_RELEASE);
    } else {
        shared16_put(vq->device + 2, EVENT_ENABLE, __ATOMIC_RELAXED);
    }
    virtqueue_log(vq, vq->device_gpa, 0, 4);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static uint32_t base(const struct virtqueue *vq)
{
    return vq->next_avail | (vq->avail_wrap ? WRAP : 0u) | (uint32_t)vq->next_used << 16 |
           (vq->used_wrap ? 1u << 31 : 0u);
}

/*
 * A fresh slot is zero or available (AVAIL differs from USED); in a used one they agree, and the buffer's address,
 * which the device leaves alone, is still there.
 */
static bool looks_used(const struct virtqueue *vq)
{
    for (uint32_t slot = 0; slot < vq->size; slot++) {
        uint16_t flags = shared16_get(slot_at(vq, slot) + 14, __ATOMIC_ACQUIRE);

        if (((flags & DESC_AVAIL) != 0) == ((flags & DESC_USED) != 0) &&
            (flags != 0 || le64_get(slot_at(vq, slot)) != 0 || le32_get(slot_at(vq, slot) + 8) != 0))
            return true;
    }
    return false;
}

const struct ring_ops packed_ring_ops = {take, available, give, publish, want_kick, base, looks_used};
