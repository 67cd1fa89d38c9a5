/*
 * What the back-ends of stage 2 that end in the host's IOMMU share: which pieces of a guest's mapping are memory, and
 * what one state of guest memory has that another lacks.
 *
 * A guest may map more than memory. A doorbell of the interrupt controller is the usual case: the host programs
 * devices with addresses of its own for their interrupts, so that nothing has to be mapped for the guest's. What is
 * no memory therefore stays unmapped in the host, and a device that accesses it is stopped.
 */
#ifndef VIOMMU_HOST_MEMORY_H
#define VIOMMU_HOST_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest_memory.h"
#include "iova_map.h"

/* A part of a mapping that lies in one region of memory. */
struct host_piece {
    uint64_t iova;
    uint64_t length;
    const struct viommu_region *region;
    uint64_t offset; /* from the start of the region */
    uint32_t flags;
};

/* The part of a mapping that lies in a region: false, if none does. */
bool host_piece_of(const struct iova_mapping *mapping, const struct viommu_region *region, struct host_piece *out);

/* A mapping lets devices do something to memory: it is no MMIO, and allows some access. */
bool host_mapping_counts(const struct iova_mapping *mapping);

/* Whether a table (which may be NULL) has the same memory at the same place. */
bool host_memory_has(const struct guest_memory *memory, const struct viommu_region *region);

typedef int (*host_piece_fn)(void *context, const struct host_piece *piece);

/*
 * Calls fn for every piece of a mapping, in order of the regions. When it fails, undo is called for those before, and
 * the error is returned.
 */
int host_pieces_map(const struct guest_memory *memory, const struct iova_mapping *mapping, host_piece_fn fn,
                    host_piece_fn undo, void *context);

/*
 * A domain's mappings follow guest memory: calls remove for every piece in a region that only before has, then add
 * for every piece in a region that only now has. The first error is returned; removing goes on in any case.
 */
int host_pieces_follow(const struct iova_map *map, const struct guest_memory *before, const struct guest_memory *now,
                       host_piece_fn remove, host_piece_fn add, void *context);

#endif
