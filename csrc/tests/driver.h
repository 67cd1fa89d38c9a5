/*
 * The guest driver's side of a virtqueue, split or packed, for tests: written from the specification (virtio 1.x
 * sections 2.7 and 2.8), not from the engine. It may also do everything wrong, through driver_descriptor() and
 * driver_offer().
 */
#ifndef VIOMMU_TESTS_DRIVER_H
#define VIOMMU_TESTS_DRIVER_H

#include "guest.h"
#include "le.h"

#define DRIVER_NEXT 1u
#define DRIVER_WRITE 2u
#define DRIVER_INDIRECT 4u
#define DRIVER_AVAIL (1u << 7)
#define DRIVER_USED (1u << 15)

/* One buffer of a chain. */
struct piece {
    uint64_t gpa;
    uint32_t len;
    bool write;
};

struct driver {
    struct guest *guest;
    bool packed;
    uint32_t size;
    uint64_t desc;      /* guest-physical */
    uint64_t avail;     /* packed: driver event suppression */
    uint64_t used;      /* packed: device event suppression */
    uint32_t free;      /* descriptors nobody uses */
    uint16_t next;      /* next descriptor to use: they are used in turn, as the engine gives back in order */
    bool wrap;          /* packed */
    uint16_t avail_idx; /* split, and how many chains were offered */
    uint16_t used_idx;  /* split: next used entry; packed: next slot */
    bool used_wrap;
    uint16_t count[VIOMMU_MAX_QUEUE_SIZE]; /* descriptors of a chain, by its ID */
};

static inline uint8_t *driver_slot(const struct driver *driver, uint32_t index)
{
    return guest_at(driver->guest, driver->desc) + 16u * index;
}

/* A ring as a driver hands it over: everything zero. */
static inline void driver_init(struct driver *driver, struct guest *guest, uint32_t size, bool packed)
{
    memset(driver, 0, sizeof(*driver));
    driver->guest = guest;
    driver->packed = packed;
    driver->size = size;
    driver->free = size;
    driver->wrap = driver->used_wrap = true;
    driver->desc = guest_alloc(guest, 16ull * size, 16);
    driver->avail = guest_alloc(guest, packed ? 4 : 6 + 2ull * size, 4);
    driver->used = guest_alloc(guest, packed ? 4 : 6 + 8ull * size, 4);
}

static inline struct viommu_ring driver_ring(const struct driver *driver)
{
    return (struct viommu_ring){
        .size = driver->size,
        .base = driver->packed ? 0x80008000u : 0,
        .desc = driver->desc,
        .avail = driver->avail,
        .used = driver->used,
        .gpa = true,
        .kick = -1,
        .call = -1,
        .err = -1,
    };
}

/* Write a descriptor: a is flags of a split ring, id of a packed one; b is next, or flags. */
static inline void driver_descriptor(const struct driver *driver, uint32_t index, uint64_t addr, uint32_t len,
                                     unsigned a, unsigned b)
{
    uint8_t *at = driver_slot(driver, index);

    le64_put(at, addr);
    le32_put(at + 8, len);
    le16_put(at + 12, (uint16_t)a);
    shared16_put(at + 14, (uint16_t)b, __ATOMIC_RELEASE);
}

/* Split: put a head into the available ring and show it. */
static inline void driver_offer(struct driver *driver, uint16_t head)
{
    uint8_t *avail = guest_at(driver->guest, driver->avail);

    le16_put(avail + 4 + 2u * (driver->avail_idx % driver->size), head);
    driver->avail_idx++;
    shared16_put(avail + 2, driver->avail_idx, __ATOMIC_RELEASE);
}

/* AVAIL and USED as they make a packed descriptor available now. */
static inline unsigned driver_available(bool wrap)
{
    return wrap ? DRIVER_AVAIL : DRIVER_USED;
}

/* Make descriptors with these flags (NEXT is added) the next chain. Returns its ID. */
static inline uint16_t driver_chain(struct driver *driver, const struct piece *pieces, unsigned count, unsigned flags)
{
    uint16_t head = driver->next;
    uint16_t first_flags = 0;
    bool wrap = driver->wrap;

    CHECK(count != 0 && count <= driver->free);
    for (unsigned i = 0; i < count; i++) {
        uint16_t at = driver->next;
        unsigned mine = flags | (pieces[i].write ? DRIVER_WRITE : 0u) | (i + 1 < count ? DRIVER_NEXT : 0u);
        bool mine_wrap = driver->wrap;

        if (++driver->next == driver->size) {
            driver->next = 0;
            driver->wrap = !driver->wrap;
        }
        if (!driver->packed) {
            driver_descriptor(driver, at, pieces[i].gpa, pieces[i].len, mine, driver->next);
            continue;
        }
        mine |= driver_available(mine_wrap);
        if (i == 0) { /* the first becomes available last */
            first_flags = (uint16_t)mine;
            mine = driver_available(!wrap);
        }
        driver_descriptor(driver, at, pieces[i].gpa, pieces[i].len, head, mine);
    }
    driver->free -= count;
    driver->count[head] = (uint16_t)count;
    if (driver->packed) {
        shared16_put(driver_slot(driver, head) + 14, first_flags, __ATOMIC_RELEASE);
        driver->avail_idx++;
    } else {
        driver_offer(driver, head);
    }
    return head;
}

static inline uint16_t driver_add(struct driver *driver, const struct piece *pieces, unsigned count)
{
    return driver_chain(driver, pieces, count, 0);
}

/* Write an indirect table. */
static inline void driver_table(const struct driver *driver, uint64_t table, const struct piece *pieces, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        uint8_t *at = guest_at(driver->guest, table + 16u * i);
        unsigned flags = (pieces[i].write ? DRIVER_WRITE : 0u);

        le64_put(at, pieces[i].gpa);
        le32_put(at + 8, pieces[i].len);
        if (driver->packed) {
            le16_put(at + 12, 0xdead); /* has no meaning here */
            le16_put(at + 14, (uint16_t)flags);
        } else {
            le16_put(at + 12, (uint16_t)(flags | (i + 1 < count ? DRIVER_NEXT : 0u)));
            le16_put(at + 14, (uint16_t)(i + 1));
        }
    }
}

static inline uint16_t driver_add_indirect(struct driver *driver, uint64_t table, const struct piece *pieces,
                                           unsigned count)
{
    struct piece whole = {table, 16 * count, false};

    driver_table(driver, table, pieces, count);
    return driver_chain(driver, &whole, 1, DRIVER_INDIRECT);
}

/* The next buffer that came back, in order. */
static inline bool driver_used(struct driver *driver, uint32_t *id, uint32_t *len)
{
    if (driver->packed) {
        const uint8_t *at = driver_slot(driver, driver->used_idx);
        uint16_t flags = shared16_get(at + 14, __ATOMIC_ACQUIRE);
        uint32_t next;

        if (((flags & DRIVER_AVAIL) != 0) != driver->used_wrap || ((flags & DRIVER_USED) != 0) != driver->used_wrap)
            return false;
        *id = le16_get(at + 12);
        *len = le32_get(at + 8);
        CHECK(((flags & DRIVER_WRITE) != 0) == (*len != 0));
        CHECK(*id < driver->size && driver->count[*id] != 0);
        next = (uint32_t)driver->used_idx + driver->count[*id];
        if (next >= driver->size) {
            next -= driver->size;
            driver->used_wrap = !driver->used_wrap;
        }
        driver->used_idx = (uint16_t)next;
    } else {
        const uint8_t *used = guest_at(driver->guest, driver->used);
        const uint8_t *at = used + 4 + 8u * (driver->used_idx % driver->size);

        if (shared16_get(used + 2, __ATOMIC_ACQUIRE) == driver->used_idx)
            return false;
        *id = le32_get(at);
        *len = le32_get(at + 4);
        CHECK(*id < driver->size && driver->count[*id] != 0);
        driver->used_idx++;
    }
    driver->free += driver->count[*id];
    driver->count[*id] = 0;
    return true;
}

/* Whether the device wants a kick for what was offered since *offered* chains (split) had been. Call with a fence. */
static inline bool driver_wants_kick(const struct driver *driver, uint16_t offered, bool event_idx)
{
    const uint8_t *used = guest_at(driver->guest, driver->used);

    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (driver->packed) /* by position is only for the device to save work: any other value than "disable" is a yes */
        return shared16_get(used + 2, __ATOMIC_ACQUIRE) != 1;
    if (event_idx) {
        uint16_t wanted = shared16_get(used + 4 + 8u * driver->size, __ATOMIC_RELAXED);

        return (uint16_t)(driver->avail_idx - wanted - 1) < (uint16_t)(driver->avail_idx - offered);
    }
    return (shared16_get(used, __ATOMIC_RELAXED) & 1) == 0;
}

#endif
