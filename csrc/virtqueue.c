#include "virtqueue.h"

#include <errno.h>
#include <string.h>

#include "le.h"

static const struct ring_ops *ops_of(const struct virtqueue *vq)
{
    return vq->packed ? &packed_ring_ops : &split_ring_ops;
}

int virtqueue_init(struct virtqueue *vq, const struct viommu_ring *ring, uint64_t features,
                   const struct guest_memory *memory, struct inflight *inflight)
{
    memset(vq, 0, sizeof(*vq));
    if (ring->size == 0 || ring->size > VIOMMU_MAX_QUEUE_SIZE)
        return -EINVAL;
    vq->memory = memory;
    vq->size = ring->size;
    vq->packed = (features & VIRTIO_F_RING_PACKED) != 0;
    vq->event_idx = (features & VIRTIO_RING_F_EVENT_IDX) != 0;
    vq->indirect = (features & VIRTIO_RING_F_INDIRECT_DESC) != 0;
    vq->logged = ring->logged;
    vq->log_addr = ring->log_addr;
    vq->inflight = inflight;
    return vq->packed ? packed_ring_init(vq, ring) : split_ring_init(vq, ring);
}

int virtqueue_break(struct virtqueue *vq, unsigned reason)
{
    vq->broken = reason;
    return -EPROTO;
}

int virtqueue_take(struct virtqueue *vq, struct chain *chain)
{
    if (vq->broken != 0)
        return -EPROTO;
    chain->readable = 0;
    chain->writable = 0;
    chain->readable_bytes = 0;
    chain->writable_bytes = 0;
    return ops_of(vq)->take(vq, chain);
}

bool virtqueue_available(const struct virtqueue *vq)
{
    return vq->broken == 0 && ops_of(vq)->available(vq);
}

void virtqueue_give(struct virtqueue *vq, const struct chain *chain, uint32_t length)
{
    ops_of(vq)->give(vq, chain, length);
}

bool virtqueue_publish(struct virtqueue *vq)
{
    return ops_of(vq)->publish(vq);
}

void virtqueue_want_kick(struct virtqueue *vq, bool want)
{
    ops_of(vq)->want_kick(vq, want);
}

uint32_t virtqueue_base(const struct virtqueue *vq)
{
    return ops_of(vq)->base(vq);
}

bool virtqueue_looks_used(const struct virtqueue *vq)
{
    return ops_of(vq)->looks_used(vq);
}

void virtqueue_log(const struct virtqueue *vq, uint64_t gpa, uint64_t offset, uint64_t length)
{
    uint64_t at;

    if (vq->logged && !__builtin_add_overflow(gpa, offset, &at))
        guest_memory_dirty(vq->memory, at, length);
}

int chain_add(struct virtqueue *vq, struct chain *chain, uint64_t addr, uint32_t len, bool writable)
{
    unsigned count = (unsigned)chain->readable + chain->writable;

    /* Zero-length buffers count: the limit is on descriptors. The array holds the largest ring. */
    if (count >= vq->size || count >= VIOMMU_MAX_QUEUE_SIZE)
        return virtqueue_break(vq, VIOMMU_BROKEN_LOOP);
    if (!guest_memory_covers(vq->memory, addr, len))
        return virtqueue_break(vq, VIOMMU_BROKEN_ADDRESS);
    chain->buffers[count].gpa = addr;
    chain->buffers[count].length = len;
    if (writable) {
        chain->writable++;
        chain->writable_bytes += len;
    } else {
        if (chain->writable != 0)
            return virtqueue_break(vq, VIOMMU_BROKEN_ORDER);
        chain->readable++;
        chain->readable_bytes += len;
    }
    if (chain->readable_bytes + chain->writable_bytes > 1ull << 32)
        return virtqueue_break(vq, VIOMMU_BROKEN_LENGTH);
    return 0;
}

int chain_read(const struct guest_memory *memory, const struct chain *chain, void *buffer, size_t length)
{
    uint8_t *to = buffer;

    for (unsigned i = 0; i < chain->readable && length != 0; i++) {
        size_t part = chain->buffers[i].length < length ? chain->buffers[i].length : length;

        if (guest_memory_read(memory, chain->buffers[i].gpa, to, part) != 0)
            return -EFAULT;
        to += part;
        length -= part;
    }
    return length == 0 ? 0 : -EFAULT;
}

/* Both writers: from == NULL writes zeroes. */
static int put(const struct guest_memory *memory, const struct chain *chain, uint64_t offset, const uint8_t *from,
               uint64_t length)
{
    const struct buffer *buffer = &chain->buffers[chain->readable];

    for (unsigned i = 0; i < chain->writable && length != 0; i++, buffer++) {
        uint64_t part;
        int rc;

        if (offset >= buffer->length) {
            offset -= buffer->length;
            continue;
        }
        part = buffer->length - offset;
        if (part > length)
            part = length;
        rc = from != NULL ? guest_memory_write(memory, buffer->gpa + offset, from, (size_t)part)
                          : guest_memory_zero(memory, buffer->gpa + offset, (size_t)part);
        if (rc != 0)
            return rc;
        if (from != NULL)
            from += part;
        length -= part;
        offset = 0;
    }
    return length == 0 ? 0 : -EFAULT;
}

int chain_write(const struct guest_memory *memory, const struct chain *chain, uint64_t offset, const void *buffer,
                size_t length)
{
    return put(memory, chain, offset, buffer, length);
}

int chain_zero(const struct guest_memory *memory, const struct chain *chain, uint64_t offset, uint64_t length)
{
    return put(memory, chain, offset, NULL, length);
}
