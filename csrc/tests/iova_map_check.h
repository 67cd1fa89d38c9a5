/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the unit tests and the fuzz target of iova_map share: a checker of the tree's invariants, and a
 * model that is too simple to be wrong, a sorted array.
 */
#ifndef VIOMMU_IOVA_MAP_CHECK_H
#define VIOMMU_IOVA_MAP_CHECK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "iova_node.h"

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition); \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

/* What a walk over the tree has seen so far. */
struct iova_walk {
    const struct iova_map *map;
    uint64_t mappings;
    uint64_t nodes;
    bool any;
    uint64_t last; /* of the mapping seen last */
};

/* Checks a subtree whose mappings begin in low..high; edges: whether it touches the left and right edge of the tree. */
static inline void iova_walk_node(struct iova_walk *walk, const struct iova_node *node, unsigned level, uint64_t low,
                                  uint64_t high, bool left_edge, bool right_edge)
{
    bool root = node == walk->map->root;
    bool edge = root || left_edge || right_edge;

    walk->nodes++;
    CHECK(node->owner == walk->map);
    CHECK(node->level == level);
    if (level == 0) {
        CHECK(node->count <= LEAF_MAX);
        CHECK(node->count >= (edge ? 1 : LEAF_MIN));
        uint64_t idle = (UINT64_C(1) << LEAF_MAX) - 1;
        for (unsigned i = 0; i < node->count; i++) {
            uint64_t last = node->target[node->number[i]].last;
            CHECK(idle & UINT64_C(1) << node->number[i]);
            idle &= ~(UINT64_C(1) << node->number[i]);
            CHECK(node->first[i] <= last);
            CHECK(node->first[i] >= low && node->first[i] <= high);
            CHECK(!walk->any || node->first[i] > walk->last);
            walk->any = true;
            walk->last = last;
            walk->mappings++;
        }
        CHECK(node->idle == idle);
        return;
    }
    CHECK(node->count <= CHILD_MAX);
    CHECK(node->count >= (edge ? 2 : CHILD_MIN));
    for (unsigned i = 0; i < node->count; i++) {
        uint64_t from = i > 0 ? node->key[i - 1] : low;
        uint64_t to = i + 1u < node->count ? node->key[i] - 1 : high;
        CHECK(from <= to && from >= low && to <= high);
        iova_walk_node(walk, node->child[i], level - 1, from, to, left_edge && i == 0,
                       right_edge && i + 1u == node->count);
    }
}

/* Aborts if the tree breaks a rule of its own. Returns its number of nodes. */
static inline uint64_t iova_map_verify(const struct iova_map *map)
{
    struct iova_walk walk = {.map = map};

    if (map->root) {
        iova_walk_node(&walk, map->root, map->root->level, 0, UINT64_MAX, true, true);
    }
    CHECK(walk.mappings == map->count);
    return walk.nodes;
}

struct iova_model {
    struct iova_mapping *mapping;
    size_t count;
    size_t room;
};

/* How many mappings end before iova: the index of the first that does not. */
static inline size_t iova_model_seek(const struct iova_model *model, uint64_t iova)
{
    size_t low = 0;
    size_t high = model->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (model->mapping[middle].last < iova) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static inline int iova_model_insert(struct iova_model *model, const struct iova_mapping *mapping)
{
    if (mapping->first > mapping->last) {
        return -EINVAL;
    }
    size_t at = iova_model_seek(model, mapping->first);
    if (at < model->count && model->mapping[at].first <= mapping->last) {
        return -EEXIST;
    }
    if (model->count == model->room) {
        model->room = model->room > 0 ? 2 * model->room : 64;
        model->mapping = realloc(model->mapping, model->room * sizeof(*mapping));
        CHECK(model->mapping);
    }
    memmove(&model->mapping[at + 1], &model->mapping[at], (model->count - at) * sizeof(*mapping));
    model->mapping[at] = *mapping;
    model->count++;
    return 0;
}

static inline int iova_model_remove(struct iova_model *model, uint64_t first, uint64_t last, uint64_t *removed)
{
    *removed = 0;
    if (first > last) {
        return -EINVAL;
    }
    size_t start = iova_model_seek(model, first);
    size_t end = start;
    while (end < model->count && model->mapping[end].first <= last) {
        if (model->mapping[end].first < first || model->mapping[end].last > last) {
            return -ERANGE;
        }
        end++;
    }
    if (end > start) {
        memmove(&model->mapping[start], &model->mapping[end], (model->count - end) * sizeof(model->mapping[0]));
    }
    model->count -= end - start;
    *removed = end - start;
    return 0;
}

static inline bool iova_mapping_equal(const struct iova_mapping *a, const struct iova_mapping *b)
{
    return a->first == b->first && a->last == b->last && a->phys == b->phys && a->flags == b->flags;
}

/* Aborts unless a walk over the map yields exactly the model. */
static inline void iova_model_compare(const struct iova_model *model, const struct iova_map *map)
{
    struct iova_mapping mapping;
    uint64_t from = 0;
    size_t seen = 0;

    CHECK(iova_map_count(map) == model->count);
    while (iova_map_next(map, from, &mapping)) {
        CHECK(seen < model->count);
        CHECK(iova_mapping_equal(&mapping, &model->mapping[seen]));
        seen++;
        from = mapping.last + 1;
        if (from == 0) {
            break;
        }
    }
    CHECK(seen == model->count);
}

/* Aborts unless both answer every question about iova and iova..last alike. */
static inline void iova_model_probe(const struct iova_model *model, const struct iova_map *map, uint64_t iova,
                                    uint64_t last)
{
    size_t at = iova_model_seek(model, iova);
    const struct iova_mapping *expected = at < model->count ? &model->mapping[at] : NULL;
    struct iova_mapping mapping;

    CHECK(iova_map_next(map, iova, &mapping) == (expected != NULL));
    CHECK(!expected || iova_mapping_equal(&mapping, expected));
    CHECK(iova_map_find(map, iova, &mapping) == (expected && expected->first <= iova));
    CHECK(!(expected && expected->first <= iova) || iova_mapping_equal(&mapping, expected));
    CHECK(iova_map_overlaps(map, iova, last) == (iova <= last && expected && expected->first <= last));
}

#endif
