/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The interface of iova_map over a gtree_map: with it in place of iova_map.c, the same ring, worker and
 * requests keep their mappings as QEMU does.
 *
 * Where the engine asks for more than QEMU would, this does as little as QEMU: nothing is checked before a
 * removal, whose errors the measured run does not provoke.
 */
#include <stdlib.h>

#include "gtree_map.h"
#include "iova_map.h"

struct iova_pool {
    char nothing;
};

struct iova_map {
    GTree *tree;
};

struct iova_pool *iova_pool_new(const struct iova_pool_hooks *hooks)
{
    struct iova_pool *pool = malloc(sizeof(*pool));

    (void)hooks;
    return pool;
}

void iova_pool_free(struct iova_pool *pool)
{
    free(pool);
}

size_t iova_pool_bytes(const struct iova_pool *pool)
{
    (void)pool;
    return 0; /* not known: malloc has them */
}

struct iova_map *iova_map_new(struct iova_pool *pool)
{
    struct iova_map *map = malloc(sizeof(*map));

    (void)pool;
    if (map) {
        map->tree = gtree_map_new();
    }
    return map;
}

void iova_map_free(struct iova_map *map)
{
    if (map) {
        g_tree_destroy(map->tree);
        free(map);
    }
}

int iova_map_insert(struct iova_map *map, const struct iova_mapping *mapping)
{
    return gtree_map_insert(map->tree, mapping->first, mapping->last, mapping->phys, mapping->flags);
}

int iova_map_check_remove(const struct iova_map *map, uint64_t first, uint64_t last)
{
    (void)map;
    (void)first;
    (void)last;
    return 0;
}

int iova_map_remove(struct iova_map *map, uint64_t first, uint64_t last, uint64_t *removed)
{
    uint64_t before = (uint64_t)g_tree_nnodes(map->tree);
    int error = gtree_map_remove(map->tree, first, last);

    if (removed) {
        *removed = before - (uint64_t)g_tree_nnodes(map->tree);
    }
    return error;
}

uint64_t iova_map_count(const struct iova_map *map)
{
    return (uint64_t)g_tree_nnodes(map->tree);
}

/* The rest of the interface, for the linker, on an empty map: the measured run asks no more than that. */

static bool nothing_in(const struct iova_map *map)
{
    if (g_tree_nnodes(map->tree) != 0) {
        abort();
    }
    return false;
}

bool iova_map_find(const struct iova_map *map, uint64_t iova, struct iova_mapping *out)
{
    (void)iova;
    (void)out;
    return nothing_in(map);
}

bool iova_map_next(const struct iova_map *map, uint64_t from, struct iova_mapping *out)
{
    (void)from;
    (void)out;
    return nothing_in(map);
}

bool iova_map_overlaps(const struct iova_map *map, uint64_t first, uint64_t last)
{
    (void)first;
    (void)last;
    return nothing_in(map);
}
