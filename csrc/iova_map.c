/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A B+tree with strict halves: every node but those at the left and right edge of the tree is at least
 * half full, so nodes never cost more than 64 bytes a mapping, whatever a guest does. Leaves fill whole when
 * mappings arrive in ascending or descending order (Linux hands out I/O virtual addresses from the top
 * down), because a full node at the edge is not halved but left as it is beside a new one.
 *
 * A mapping needs one walk from the root: an insertion finds its place and its neighbours together, and
 * overlap can only be with those two.
 */
#include "iova_map.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "iova_node.h"

/* The way from the root to a place in a leaf, indexed by level. */
struct path {
    struct iova_node *node[LEVELS_MAX];
    unsigned slot[LEVELS_MAX]; /* in a leaf: before which mapping; above: which child the way goes through */
};

/* A mapping in its place. */
struct place {
    struct iova_node *leaf; /* NULL: there is none */
    unsigned slot;
};

/* Asks for all cache lines of a node at once, as the lines are needed one after the other. */
static void prefetch_node(const struct iova_node *node)
{
    for (unsigned offset = 0; offset < IOVA_NODE_BYTES; offset += 64) {
        __builtin_prefetch((const char *)node + offset);
    }
}

/* Finds the place of iova: behind every mapping that begins at or before it. The map is not empty. */
static void descend(const struct iova_map *map, uint64_t iova, struct path *path)
{
    struct iova_node *node = map->root;

    while (node->level > 0) {
        unsigned slot = iova_upper_bound(node->key, node->count - 1u, iova);
        path->node[node->level] = node;
        path->slot[node->level] = slot;
        node = node->child[slot];
        prefetch_node(node);
    }
    path->node[0] = node;
    path->slot[0] = iova_upper_bound(node->first, node->count, iova);
}

/* The mapping before the path's place: of all that begin at or before the iova looked for, the last. */
static struct place before(const struct iova_map *map, const struct path *path)
{
    if (path->slot[0] > 0) {
        return (struct place){path->node[0], path->slot[0] - 1};
    }
    for (unsigned level = 1; level <= map->root->level; level++) {
        if (path->slot[level] > 0) {
            struct iova_node *node = path->node[level]->child[path->slot[level] - 1];
            while (node->level > 0) {
                node = node->child[node->count - 1];
            }
            return (struct place){node, node->count - 1u};
        }
    }
    return (struct place){NULL, 0};
}

/* The mapping behind the path's place, the first to begin after the iova looked for, if it does so up to limit. */
static struct place behind(const struct iova_map *map, const struct path *path, uint64_t limit)
{
    struct iova_node *node = path->node[0];
    unsigned slot = path->slot[0];

    for (unsigned level = 1; slot == node->count && level <= map->root->level; level++) {
        unsigned child = path->slot[level];
        if (child + 1u < path->node[level]->count) {
            if (path->node[level]->key[child] > limit) {
                break; /* the common case, and the next leaf is not read for it */
            }
            node = path->node[level]->child[child + 1];
            while (node->level > 0) {
                node = node->child[0];
            }
            slot = 0;
        }
    }
    if (slot < node->count && node->first[slot] <= limit) {
        return (struct place){node, slot};
    }
    return (struct place){NULL, 0};
}

static void read_mapping(struct place place, struct iova_mapping *out)
{
    const struct iova_target *target = &place.leaf->target[place.leaf->number[place.slot]];

    out->first = place.leaf->first[place.slot];
    out->last = target->last;
    out->phys = target->phys;
    out->flags = target->flags;
}

struct iova_map *iova_map_new(struct iova_pool *pool)
{
    struct iova_map *map = iova_pool_calloc(pool, sizeof(*map));

    if (map) {
        map->pool = pool;
    }
    return map;
}

/*
 * Moves nodes out of sparse chunks after `freed` nodes were given back. Four moves for each of them are
 * enough to keep the pool at its bound (see iova_pool_is_sparse()), so a removal pays for what it frees.
 */
static void compact(struct iova_pool *pool, uint64_t freed)
{
    void *from;
    void *to;

    for (uint64_t moves = 4 * freed; moves > 0 && iova_pool_is_sparse(pool); moves--) {
        iova_pool_pick_move(pool, &from, &to);
        struct iova_node *node = from;
        struct iova_map *map = node->owner;
        memcpy(to, from, IOVA_NODE_BYTES);
        if (map->root == node) {
            map->root = to;
        } else {
            /* A key of its own leads to a node: it cannot be left of its first or right of its last child. */
            struct path path;
            descend(map, node->level > 0 ? node->key[0] : node->first[0], &path);
            assert(path.node[node->level] == node);
            path.node[node->level + 1]->child[path.slot[node->level + 1]] = to;
        }
        iova_pool_give(pool, node);
    }
}

/* Gives back a node and all below it; leaves (level 0) without reading them. Returns how many nodes that were. */
static uint64_t free_subtree(struct iova_pool *pool, struct iova_node *node, unsigned level)
{
    uint64_t freed = 1;

    for (unsigned i = 0; level > 0 && i < node->count; i++) {
        freed += free_subtree(pool, node->child[i], level - 1);
    }
    iova_pool_give(pool, node);
    return freed;
}

static uint64_t clear(struct iova_map *map)
{
    uint64_t freed = map->root ? free_subtree(map->pool, map->root, map->root->level) : 0;

    map->root = NULL;
    map->count = 0;
    return freed;
}

void iova_map_free(struct iova_map *map)
{
    if (map) {
        struct iova_pool *pool = map->pool;
        uint64_t freed = clear(map);
        iova_pool_cfree(pool, map, sizeof(*map));
        compact(pool, freed);
    }
}

/* True if the path's node is the last of its level. */
static bool at_right_edge(const struct iova_map *map, const struct path *path, unsigned level)
{
    while (++level <= map->root->level) {
        if (path->slot[level] + 1u < path->node[level]->count) {
            return false;
        }
    }
    return true;
}

/* True if it is the first. */
static bool at_left_edge(const struct iova_map *map, const struct path *path, unsigned level)
{
    while (++level <= map->root->level) {
        if (path->slot[level] > 0) {
            return false;
        }
    }
    return true;
}

/*
 * How much of the path's node, full, stays in it when something is added before slot. Half, but at the edge that
 * a row of mappings grows at, all that can: there, halves would never be filled. An inner node gets two children
 * rather than one, as every node needs a sibling to be joined with.
 */
static unsigned divide(const struct iova_map *map, const struct path *path, unsigned level, unsigned slot)
{
    unsigned count = path->node[level]->count;

    if (slot == count && at_right_edge(map, path, level)) {
        return level > 0 ? CHILD_MAX - 1 : LEAF_MAX;
    }
    if (slot == (level > 0) && at_left_edge(map, path, level)) {
        return level > 0 ? 2 : 0;
    }
    return level > 0 ? CHILD_MIN : LEAF_MIN;
}

/* Adds a mapping where the leaf is full. All memory is taken before anything changes. */
static int insert_splitting(struct iova_map *map, const struct path *path, const struct iova_mapping *mapping)
{
    struct iova_node *spare[LEVELS_MAX + 1];
    unsigned top = map->root->level;
    unsigned full = 1; /* nodes that will be split: the leaf and full ones above it, without a gap */
    unsigned level;

    while (full <= top && path->node[full]->count == CHILD_MAX) {
        full++;
    }
    unsigned needed = full > top ? full + 1 : full;
    for (unsigned i = 0; i < needed; i++) {
        spare[i] = iova_pool_take(map->pool);
        if (!spare[i]) {
            while (i > 0) {
                iova_pool_give(map->pool, spare[--i]);
            }
            return -ENOMEM;
        }
        iova_node_init(spare[i], map, i);
    }

    unsigned keep = divide(map, path, 0, path->slot[0]);
    uint64_t key = iova_leaf_split(path->node[0], spare[0], keep, path->slot[0], mapping);
    for (level = 1; level < full; level++) {
        unsigned slot = path->slot[level] + 1;
        keep = divide(map, path, level, slot);
        key = iova_inner_split(path->node[level], spare[level], keep, slot, key, spare[level - 1]);
    }
    if (level <= top) {
        iova_inner_add(path->node[level], path->slot[level] + 1, key, spare[level - 1]);
    } else {
        struct iova_node *root = spare[level];
        root->child[0] = map->root;
        root->child[1] = spare[level - 1];
        root->key[0] = key;
        root->count = 2;
        map->root = root;
    }
    return 0;
}

int iova_map_insert(struct iova_map *map, const struct iova_mapping *mapping)
{
    struct path path;

    if (mapping->first > mapping->last) {
        return -EINVAL;
    }
    if (!map->root) {
        struct iova_node *root = iova_pool_take(map->pool);
        if (!root) {
            return -ENOMEM;
        }
        map->root = iova_node_init(root, map, 0);
        iova_leaf_add(root, 0, mapping);
        map->count = 1;
        return 0;
    }
    descend(map, mapping->first, &path);
    struct place left = before(map, &path);
    struct place right = behind(map, &path, mapping->last);
    if (right.leaf || (left.leaf && iova_leaf_last(left.leaf, left.slot) >= mapping->first)) {
        return -EEXIST;
    }
    if (path.node[0]->count < LEAF_MAX) {
        iova_leaf_add(path.node[0], path.slot[0], mapping);
    } else {
        int error = insert_splitting(map, &path, mapping);
        if (error) {
            return error;
        }
    }
    map->count++;
    return 0;
}

bool iova_map_find(const struct iova_map *map, uint64_t iova, struct iova_mapping *out)
{
    struct path path;

    if (!map->root) {
        return false;
    }
    descend(map, iova, &path);
    struct place place = before(map, &path);
    if (!place.leaf || iova_leaf_last(place.leaf, place.slot) < iova) {
        return false;
    }
    read_mapping(place, out);
    return true;
}

bool iova_map_next(const struct iova_map *map, uint64_t from, struct iova_mapping *out)
{
    struct path path;

    if (!map->root) {
        return false;
    }
    descend(map, from, &path);
    struct place place = before(map, &path);
    if (!place.leaf || iova_leaf_last(place.leaf, place.slot) < from) {
        place = behind(map, &path, UINT64_MAX);
    }
    if (!place.leaf) {
        return false;
    }
    read_mapping(place, out);
    return true;
}

bool iova_map_overlaps(const struct iova_map *map, uint64_t first, uint64_t last)
{
    struct iova_mapping mapping;

    return first <= last && iova_map_next(map, first, &mapping) && mapping.first <= last;
}

/* Restores the halves along the path after its leaf has lost mappings. Returns how many nodes that freed. */
static uint64_t rebalance(struct iova_map *map, struct path *path)
{
    uint64_t freed = 0;
    bool changed = true;

    for (unsigned level = 0; changed && level < map->root->level; level++) {
        struct iova_node *parent = path->node[level + 1];
        unsigned slot = path->slot[level + 1];
        unsigned least = level > 0 ? CHILD_MIN : LEAF_MIN;

        changed = false;
        /* More than once only at an edge, where the sibling may be nearly empty too. */
        while (parent->child[slot]->count < least && parent->count > 1) {
            slot -= slot > 0;
            if (!iova_node_join(parent, slot)) {
                break;
            }
            iova_pool_give(map->pool, parent->child[slot + 1]);
            iova_inner_drop(parent, slot + 1);
            freed++;
            changed = true;
        }
    }
    while (map->root->level > 0 && map->root->count == 1) {
        struct iova_node *root = map->root;
        map->root = root->child[0];
        iova_pool_give(map->pool, root);
        freed++;
    }
    if (map->root->count == 0) {
        iova_pool_give(map->pool, map->root);
        map->root = NULL;
        freed++;
    }
    return freed;
}

/* For the path to `first`: true if a mapping begins there, which then is the one just before the path's place. */
static bool begins_at(const struct path *path, uint64_t first)
{
    return path->slot[0] > 0 && path->node[0]->first[path->slot[0] - 1] == first;
}

/* The place in the path's leaf behind all mappings that begin at or before last. */
static unsigned end_in_leaf(const struct path *path, uint64_t last)
{
    const struct iova_node *leaf = path->node[0];
    unsigned slot = path->slot[0];

    if (slot == leaf->count || leaf->first[slot] > last) {
        return slot; /* the common case: one mapping, or none, lies in the range */
    }
    return iova_upper_bound(leaf->first, leaf->count, last);
}

/* iova_map_check_remove() for the path to `first`. Only the mappings at the two ends of the range can be split. */
static int check_ends(const struct iova_map *map, const struct path *path, uint64_t first, uint64_t last)
{
    const struct iova_node *leaf = path->node[0];
    struct place left = before(map, path);
    struct iova_mapping right;

    if (left.leaf && iova_leaf_last(left.leaf, left.slot) >= first &&
        (left.leaf->first[left.slot] < first || iova_leaf_last(left.leaf, left.slot) > last)) {
        return -ERANGE;
    }
    unsigned end = end_in_leaf(path, last);
    if (end == leaf->count) { /* the range may go on in further leaves */
        return iova_map_find(map, last, &right) && right.last > last ? -ERANGE : 0;
    }
    return end > path->slot[0] && iova_leaf_last(leaf, end - 1) > last ? -ERANGE : 0;
}

int iova_map_check_remove(const struct iova_map *map, uint64_t first, uint64_t last)
{
    struct path path;

    if (first > last) {
        return -EINVAL;
    }
    if (!map->root) {
        return 0;
    }
    descend(map, first, &path);
    return check_ends(map, &path, first, last);
}

/* True if no mapping begins outside of first..last. */
static bool all_begin_in(const struct iova_map *map, uint64_t first, uint64_t last)
{
    struct iova_mapping least;
    struct path path;

    if (!iova_map_next(map, 0, &least) || least.first < first) {
        return false;
    }
    descend(map, last, &path);
    return !behind(map, &path, UINT64_MAX).leaf;
}

/*
 * Removes every mapping that begins in first..last, leaf by leaf; path leads to first and is of no use
 * afterwards. Adds to *freed the nodes that were given back.
 */
static void remove_range(struct iova_map *map, struct path *path, uint64_t first, uint64_t last, uint64_t *freed)
{
    for (;;) {
        if (!begins_at(path, first)) {
            struct place next = behind(map, path, last);
            if (!next.leaf) {
                return;
            }
            first = next.leaf->first[next.slot];
            descend(map, first, path);
        }
        struct iova_node *leaf = path->node[0];
        unsigned end = end_in_leaf(path, last);
        bool more = end == leaf->count;

        if (more && map->root->level > 0 && all_begin_in(map, first, last)) {
            *freed += clear(map);
            return;
        }
        unsigned n = end - (path->slot[0] - 1);
        iova_leaf_drop(leaf, path->slot[0] - 1, n);
        map->count -= n;
        *freed += rebalance(map, path);
        if (!more || !map->root) {
            return;
        }
        descend(map, first, path);
    }
}

int iova_map_remove(struct iova_map *map, uint64_t first, uint64_t last, uint64_t *removed)
{
    struct path path;
    uint64_t count = map->count;
    uint64_t freed = 0;

    if (removed) {
        *removed = 0;
    }
    if (first > last) {
        return -EINVAL;
    }
    if (!map->root) {
        return 0;
    }
    descend(map, first, &path);
    int error = check_ends(map, &path, first, last);
    if (error) {
        return error;
    }
    remove_range(map, &path, first, last, &freed);
    compact(map->pool, freed);
    if (removed) {
        *removed = count - map->count;
    }
    return 0;
}

uint64_t iova_map_count(const struct iova_map *map)
{
    return map->count;
}
