/*
 * A virtqueue as the device sees it: take a chain of descriptors, give it back with a length, say when to notify.
 * Split and packed rings differ behind this interface only (split_ring.c, packed_ring.c).
 *
 * Everything the driver can write is read once into our own memory and checked there. An error that leaves no way
 * to go on (a bad index, a loop, an address outside guest memory) breaks the ring: the reason is kept, nothing more
 * is taken, and a device reset heals it (virtio 1.x section 2.1.2, DEVICE_NEEDS_RESET).
 */
#ifndef VIOMMU_VIRTQUEUE_H
#define VIOMMU_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest_memory.h"
#include "inflight.h"
#include "viommu.h"

#define VIRTIO_RING_F_INDIRECT_DESC (1ull << 28)
#define VIRTIO_RING_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)
#define VIRTIO_F_RING_PACKED (1ull << 34)
#define VIRTIO_F_IN_ORDER (1ull << 35)

struct buffer {
    uint64_t gpa;
    uint32_t length;
};

/* One request or event buffer: first the readable buffers, then the writable ones. */
struct chain {
    uint16_t id;         /* split: head index; packed: buffer ID */
    uint16_t slots;      /* packed: ring slots it takes; split: 1 */
    uint16_t readable;   /* number of buffers */
    uint16_t writable;
    uint64_t readable_bytes;
    uint64_t writable_bytes;
    struct buffer buffers[VIOMMU_MAX_QUEUE_SIZE];
};

struct virtqueue {
    const struct guest_memory *memory;
    uint32_t size;
    bool packed;
    bool event_idx;
    bool indirect;
    bool logged;
    uint64_t log_addr;
    uint8_t *desc;        /* in guest memory */
    uint8_t *driver;      /* avail ring, or driver event suppression */
    uint8_t *device;      /* used ring, or device event suppression */
    uint64_t desc_gpa;    /* packed: where they are, for the log */
    uint64_t device_gpa;
    struct inflight *inflight; /* NULL: none */
    unsigned broken;      /* VIOMMU_BROKEN_*, 0 while it is well */
    /*
     * Cache lines that the next request will likely touch: those of the latest one, since a driver that has one
     * request under way uses the same descriptor and buffers again. Prefetched, never read through: fetching them
     * while the index is looked at takes a polled request from 0.35 to 0.23 us (a bare line transfer: 0.11).
     */
    const void *likely[3];

    /* split: free-running indices; packed: position in the ring */
    uint16_t next_avail;
    uint16_t next_used;
    bool avail_wrap;
    bool used_wrap;
    uint16_t signalled;   /* used position when the driver was last asked about a notification */
    uint16_t pending;     /* split: used entries written, index not yet published; packed: head not yet published */
    /* packed: the first used descriptor of the batch; its flags are written last, which publishes the batch */
    uint16_t head_slot;
    uint16_t head_flags;
};

/*
 * Set up a queue over memory, which must outlive it. -EFAULT: a part of the ring is in no region; -EINVAL: size,
 * alignment or base. features are those the driver accepted.
 */
int virtqueue_init(struct virtqueue *vq, const struct viommu_ring *ring, uint64_t features,
                   const struct guest_memory *memory, struct inflight *inflight);

/* 1 and a chain; 0 when none is available; -EPROTO when the ring is broken. */
int virtqueue_take(struct virtqueue *vq, struct chain *chain);
/* Whether a chain can be taken. A look at one index in memory: cheap enough to poll. */
bool virtqueue_available(const struct virtqueue *vq);

/* Give a chain back, length bytes of its writable part written. Becomes visible with virtqueue_publish(). */
void virtqueue_give(struct virtqueue *vq, const struct chain *chain, uint32_t length);
/* Show the driver everything given. True when it asks for a notification. */
bool virtqueue_publish(struct virtqueue *vq);

/* Whether the memory of a stopped ring shows that a device has given buffers back in it. */
bool virtqueue_looks_used(const struct virtqueue *vq);

/* Ask the driver for kicks, or not. After asking, look at virtqueue_available() again before sleeping. */
void virtqueue_want_kick(struct virtqueue *vq, bool want);

/* The position to hand to GET_VRING_BASE. Nothing may be in flight. */
uint32_t virtqueue_base(const struct virtqueue *vq);

/* Copy the first length readable bytes of a chain: 0 or -EFAULT. */
int chain_read(const struct guest_memory *memory, const struct chain *chain, void *buffer, size_t length);
/* Write into the writable part from byte offset on: 0 or -EFAULT. */
int chain_write(const struct guest_memory *memory, const struct chain *chain, uint64_t offset, const void *buffer,
                size_t length);
int chain_zero(const struct guest_memory *memory, const struct chain *chain, uint64_t offset, uint64_t length);

/* For the two ring formats. */
struct descriptor { /* as in memory, both formats: 16 bytes */
    uint64_t addr;
    uint32_t len;
    uint16_t a; /* split: flags; packed: id */
    uint16_t b; /* split: next; packed: flags */
};
#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u

/* Add one descriptor to a chain after checking it; -EPROTO breaks the ring. */
int chain_add(struct virtqueue *vq, struct chain *chain, uint64_t addr, uint32_t len, bool writable);
int virtqueue_break(struct virtqueue *vq, unsigned reason);
/* Log bytes written to the ring, offset from gpa on. */
void virtqueue_log(const struct virtqueue *vq, uint64_t gpa, uint64_t offset, uint64_t length);

struct ring_ops {
    int (*take)(struct virtqueue *vq, struct chain *chain);
    bool (*available)(const struct virtqueue *vq);
    void (*give)(struct virtqueue *vq, const struct chain *chain, uint32_t length);
    bool (*publish)(struct virtqueue *vq);
    void (*want_kick)(struct virtqueue *vq, bool want);
    uint32_t (*base)(const struct virtqueue *vq);
    bool (*looks_used)(const struct virtqueue *vq);
};
int split_ring_init(struct virtqueue *vq, const struct viommu_ring *ring);
int packed_ring_init(struct virtqueue *vq, const struct viommu_ring *ring);
extern const struct ring_ops split_ring_ops;
extern const struct ring_ops packed_ring_ops;

#endif
