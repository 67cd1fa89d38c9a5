/*
 * The guest-physical memory of one vfio-user endpoint, as its client (QEMU) described it by DMA_MAP: ranges with
 * access rights, most of them with a file behind them. And the two questions asked about it: which pieces of which
 * files a mapping of IOVAs leads to, and whether an address may be read or written.
 *
 * Changed by the relay thread, under the lock of the endpoint.
 */
#ifndef VIOMMU_VFIO_USER_MEMORY_H
#define VIOMMU_VFIO_USER_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest_memory.h"
#include "iova_map.h"

/* Ranges one client may make us keep. */
#define VFIO_USER_MAX_RANGES 1024u

struct vfio_user_range {
    uint64_t first;                /* guest-physical, inclusive */
    uint64_t last;
    uint32_t flags;                /* MAP_FLAG_READ, MAP_FLAG_WRITE: the protocol's own bits */
    struct viommu_region *region;  /* NULL: no file, out of a device's reach */
};

struct vfio_user_memory {
    size_t count;
    struct vfio_user_range *ranges; /* by address, never overlapping */
    struct guest_memory *table;     /* those with a file; NULL when there never were any */
    uint64_t bytes;                 /* in ranges with a file */
};

/* Where a mapping leads within one range: what the server is told of it. */
struct vfio_user_piece {
    uint64_t iova;
    uint64_t size;
    uint64_t offset;               /* in the file of region */
    uint32_t flags;
    struct viommu_region *region;
};

void vfio_user_memory_fini(struct vfio_user_memory *memory);

/*
 * Add a range; its region's reference passes to the memory on success. 0, -EEXIST when it overlaps another, -ENOSPC
 * at the limit, -ENOMEM.
 *
 * The table is replaced, here and in remove; the one before is the caller's to free once nothing guards it.
 */
int vfio_user_memory_add(struct vfio_user_memory *memory, const struct vfio_user_range *range,
                         struct guest_memory **before);

/* Indices [*begin, *end) of the ranges in [first, last]. -EINVAL when one lies there in part only. */
int vfio_user_memory_select(const struct vfio_user_memory *memory, uint64_t first, uint64_t last, size_t *begin,
                            size_t *end);
/* Remove the ranges [begin, end). 0 or -ENOMEM. */
int vfio_user_memory_remove(struct vfio_user_memory *memory, size_t begin, size_t end, struct guest_memory **before);

/*
 * Pieces of a mapping, by address: start with *index 0; false at the end. A range without a file, or without an
 * access right in common with the mapping, has none.
 */
bool vfio_user_memory_next_piece(const struct vfio_user_memory *memory, const struct iova_mapping *mapping,
                                 size_t *index, struct vfio_user_piece *out);
/* The piece of a mapping in one range; false when there is none. */
bool vfio_user_piece_in(const struct vfio_user_range *range, const struct iova_mapping *mapping,
                        struct vfio_user_piece *out);

/*
 * Every byte of [gpa, gpa + length) can be accessed as access (MAP_FLAG_*) says. Length is not 0 and the end does not
 * wrap.
 */
bool vfio_user_memory_allows(const struct vfio_user_memory *memory, uint64_t gpa, uint64_t length, uint32_t access);

#endif
