/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gtree_map: mappings kept as QEMU's virtio-iommu keeps them (hw/virtio/virtio-iommu.c), to measure against.
 *
 * A glib GTree, which is an AVL tree; its keys are intervals that compare as equal where they overlap; key and
 * value are allocated one by one. MAP is a lookup and an insertion, UNMAP looks up and removes until a lookup
 * finds nothing more.
 */
#ifndef VIOMMU_GTREE_MAP_H
#define VIOMMU_GTREE_MAP_H

#include <glib.h>
#include <stdint.h>

/* An empty tree; free it with g_tree_destroy(). */
GTree *gtree_map_new(void);

/* 0, or -EEXIST. */
int gtree_map_insert(GTree *tree, uint64_t first, uint64_t last, uint64_t phys, uint32_t flags);

/* 0, or -ERANGE, by which time some mappings may be gone, as in QEMU. */
int gtree_map_remove(GTree *tree, uint64_t first, uint64_t last);

#endif
