/* SPDX-License-Identifier: Apache-2.0 */
/*
 * iova_map: the mappings of one domain, ordered by I/O virtual address, never overlapping.
 *
 * One MAP request is one entry: neighbours are never merged, because UNMAP may remove a mapping only as
 * a whole (virtio 1.3, 5.13.6.6.2). Ends are inclusive, so a mapping may end at 2^64-1 or be the whole
 * space. Physical addresses and flags are the caller's and may be anything. Used by one thread at a time.
 */
#ifndef VIOMMU_IOVA_MAP_H
#define VIOMMU_IOVA_MAP_H

#include <stdbool.h>
#include <stdint.h>

#include "iova_pool.h"

struct iova_map;

struct iova_mapping {
    uint64_t first; /* I/O virtual address of the first byte */
    uint64_t last;  /* and of the last one */
    uint64_t phys;  /* guest-physical address that first leads to */
    uint32_t flags;
};

/* Makes an empty map, or NULL. The caller owns it; the pool, where its memory comes from, must outlive it. */
struct iova_map *iova_map_new(struct iova_pool *pool);

/* Frees the map with all its mappings. NULL is allowed. */
void iova_map_free(struct iova_map *map);

/*
 * Adds a mapping. 0, or -EINVAL (first > last), -EEXIST (a byte of it is mapped), -ENOMEM; after an
 * error the map is as it was.
 */
int iova_map_insert(struct iova_map *map, const struct iova_mapping *mapping);

/* The mapping that contains iova. False, and *out untouched, if there is none. */
bool iova_map_find(const struct iova_map *map, uint64_t iova, struct iova_mapping *out);

/*
 * The first mapping that ends at or after from: the one that contains it, else the next one. False, and
 * *out untouched, if there is none. To walk a map, go on from out->last + 1 until that wraps to 0.
 */
bool iova_map_next(const struct iova_map *map, uint64_t from, struct iova_mapping *out);

/* True if a byte of first..last is mapped. False too if first > last. */
bool iova_map_overlaps(const struct iova_map *map, uint64_t first, uint64_t last);

/* 0 if iova_map_remove() would succeed, else its error. */
int iova_map_check_remove(const struct iova_map *map, uint64_t first, uint64_t last);

/*
 * Removes every mapping that lies in first..last; there may be none. 0, or -EINVAL (first > last), -ERANGE
 * (a mapping lies there in part only; nothing is removed). Never needs memory. *removed, if not NULL,
 * becomes how many were removed, 0 after an error.
 */
int iova_map_remove(struct iova_map *map, uint64_t first, uint64_t last, uint64_t *removed);

/* How many mappings there are. */
uint64_t iova_map_count(const struct iova_map *map);

#endif
