/* SPDX-License-Identifier: Apache-2.0 */
/*
 * iova_node: the nodes of iova_map's tree, and what is done to one of them or to two side by side. Only
 * iova_map.c, iova_node.c and the checker of their tests include this.
 */
#ifndef VIOMMU_IOVA_NODE_H
#define VIOMMU_IOVA_NODE_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#include "iova_map.h"

enum {
    LEAF_MAX = 34, /* mappings of a leaf: as many as fit a node at 29 bytes each */
    LEAF_MIN = LEAF_MAX / 2,
    CHILD_MAX = 63, /* children of an inner node */
    CHILD_MIN = (CHILD_MAX + 1) / 2,
    /* 17 mappings a leaf and 32 children a node hold 2^64 one-byte mappings in 13 levels. */
    LEVELS_MAX = 16,
};

/* What a mapping is besides its first address. 20 bytes. */
struct iova_target {
    uint64_t last;
    uint64_t phys;
    uint32_t flags;
} __attribute__((packed, aligned(4)));

/*
 * A node of the B+tree. Leaves are level 0 and hold the mappings: their first addresses in order, each
 * with the number of its target, and the targets wherever there was room. A search reads only addresses, and
 * an insertion moves only them and the numbers, 9 of 29 bytes. Next to a leaf that keeps everything in
 * order (36 mappings) this measured 312 instead of 347 ns a request with a million random mappings, where
 * the cache lines of a leaf come from memory, and 69 instead of 73 ns with a thousand. Nodes of 512
 * bytes were slower: 405 and 81 ns.
 *
 * Child i + 1 of an inner node, and everything below, begins at or after key[i]; child i before it. A
 * mapping may reach over the key at its right: keys part where mappings begin, not where they end.
 */
struct iova_node {
    struct iova_map *owner; /* finds the way to a node that has to be moved */
    uint16_t level;
    uint16_t count; /* mappings, or children */
    uint32_t unused;
    union {
        struct {
            uint64_t idle; /* bit n: target n is not in use */
            uint64_t first[LEAF_MAX];
            uint8_t number[LEAF_MAX];
            struct iova_target target[LEAF_MAX];
        };
        struct {
            uint64_t key[CHILD_MAX - 1];
            struct iova_node *child[CHILD_MAX];
        };
        unsigned char room[IOVA_NODE_BYTES - 16];
    };
};

static_assert(sizeof(struct iova_node) == IOVA_NODE_BYTES, "a node fills its place in the pool");

struct iova_map {
    struct iova_pool *pool;
    struct iova_node *root; /* NULL if the map is empty */
    uint64_t count;
};

/* How many of n ascending keys are at most x. No branch depends on a key: half of them would be mispredicted. */
static inline unsigned iova_upper_bound(const uint64_t *key, unsigned n, uint64_t x)
{
    unsigned base = 0;

    while (n > 1) {
        unsigned half = n / 2;
        base += (0u - (unsigned)(key[base + half - 1] <= x)) & half;
        n -= half;
    }
    return base + (unsigned)(n == 1 && key[base] <= x);
}

static inline uint64_t iova_leaf_last(const struct iova_node *leaf, unsigned slot)
{
    return leaf->target[leaf->number[slot]].last;
}

/* Makes memory an empty node of this map. */
struct iova_node *iova_node_init(struct iova_node *node, struct iova_map *map, unsigned level);

/* Adds a mapping before slot; there is room for it. */
void iova_leaf_add(struct iova_node *leaf, unsigned slot, const struct iova_mapping *mapping);

/* Drops n mappings from slot on. */
void iova_leaf_drop(struct iova_node *leaf, unsigned slot, unsigned n);

/*
 * Adds a mapping before slot of a full leaf, left, that keeps its first `keep` mappings and passes the others on
 * to right, which is empty. Returns the key that parts the two.
 */
uint64_t iova_leaf_split(struct iova_node *left, struct iova_node *right, unsigned keep, unsigned slot,
                         const struct iova_mapping *mapping);

/* Adds a child, and the key before it, before slot; slot is not 0 and there is room. */
void iova_inner_add(struct iova_node *node, unsigned slot, uint64_t key, struct iova_node *child);

/* Drops the child at slot, and the key before it; slot is not 0. */
void iova_inner_drop(struct iova_node *node, unsigned slot);

/*
 * Adds a child like iova_inner_add() to a full node, left, that then keeps its first `keep` children and passes
 * the others on to right, which is empty. Returns the key that parts the two.
 */
uint64_t iova_inner_split(struct iova_node *left, struct iova_node *right, unsigned keep, unsigned slot,
                          uint64_t key, struct iova_node *child);

/*
 * Moves everything from the child of parent at slot + 1 to that at slot, or, if that is too much for one
 * node, evens the two out. True if the right one is empty now; it is still the parent's.
 */
bool iova_node_join(struct iova_node *parent, unsigned slot);

#endif
