/* SPDX-License-Identifier: Apache-2.0 */
#include "gtree_map.h"

#include <errno.h>

struct interval {
    uint64_t first;
    uint64_t last;
};

struct value {
    uint64_t phys;
    uint32_t flags;
};

static gint compare(gconstpointer a, gconstpointer b, gpointer unused)
{
    const struct interval *left = a;
    const struct interval *right = b;

    (void)unused;
    if (left->last < right->first) {
        return -1;
    }
    return right->last < left->first ? 1 : 0;
}

GTree *gtree_map_new(void)
{
    return g_tree_new_full(compare, NULL, g_free, g_free);
}

int gtree_map_insert(GTree *tree, uint64_t first, uint64_t last, uint64_t phys, uint32_t flags)
{
    struct interval *key = g_new(struct interval, 1);

    key->first = first;
    key->last = last;
    if (g_tree_lookup(tree, key)) {
        g_free(key);
        return -EEXIST;
    }
    struct value *value = g_new0(struct value, 1);
    value->phys = phys;
    value->flags = flags;
    g_tree_insert(tree, key, value);
    return 0;
}

int gtree_map_remove(GTree *tree, uint64_t first, uint64_t last)
{
    const struct interval range = {first, last};
    gpointer key;
    gpointer value;

    while (g_tree_lookup_extended(tree, &range, &key, &value)) {
        const struct interval *found = key;
        if (found->first < first || found->last > last) {
            return -ERANGE;
        }
        g_tree_remove(tree, found);
    }
    return 0;
}
