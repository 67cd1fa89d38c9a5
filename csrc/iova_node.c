/* SPDX-License-Identifier: Apache-2.0 */
#include "iova_node.h"

#include <string.h>

struct iova_node *iova_node_init(struct iova_node *node, struct iova_map *map, unsigned level)
{
    node->owner = map;
    node->level = (uint16_t)level;
    node->count = 0;
    node->unused = 0;
    if (level == 0) {
        node->idle = (UINT64_C(1) << LEAF_MAX) - 1;
    }
    return node;
}

static struct iova_target *target_at(struct iova_node *leaf, unsigned slot)
{
    return &leaf->target[leaf->number[slot]];
}

/* Makes room for n mappings before slot; first address and target are the caller's to fill in. */
static void open_gap(struct iova_node *leaf, unsigned slot, unsigned n)
{
    unsigned move = leaf->count - slot;

    memmove(&leaf->first[slot + n], &leaf->first[slot], move * sizeof(leaf->first[0]));
    memmove(&leaf->number[slot + n], &leaf->number[slot], move * sizeof(leaf->number[0]));
    for (unsigned i = slot; i < slot + n; i++) {
        leaf->number[i] = (uint8_t)__builtin_ctzll(leaf->idle);
        leaf->idle &= leaf->idle - 1;
    }
    leaf->count = (uint16_t)(leaf->count + n);
}

void iova_leaf_add(struct iova_node *leaf, unsigned slot, const struct iova_mapping *mapping)
{
    open_gap(leaf, slot, 1);
    leaf->first[slot] = mapping->first;
    *target_at(leaf, slot) = (struct iova_target){mapping->last, mapping->phys, mapping->flags};
}

void iova_leaf_drop(struct iova_node *leaf, unsigned slot, unsigned n)
{
    unsigned move = leaf->count - slot - n;

    for (unsigned i = slot; i < slot + n; i++) {
        leaf->idle |= UINT64_C(1) << leaf->number[i];
    }
    memmove(&leaf->first[slot], &leaf->first[slot + n], move * sizeof(leaf->first[0]));
    memmove(&leaf->number[slot], &leaf->number[slot + n], move * sizeof(leaf->number[0]));
    leaf->count = (uint16_t)(leaf->count - n);
}

/* Moves n mappings from one leaf to another. */
static void move_mappings(struct iova_node *to, unsigned slot, struct iova_node *from, unsigned start, unsigned n)
{
    open_gap(to, slot, n);
    for (unsigned i = 0; i < n; i++) {
        to->first[slot + i] = from->first[start + i];
        *target_at(to, slot + i) = *target_at(from, start + i);
    }
    iova_leaf_drop(from, start, n);
}

uint64_t iova_leaf_split(struct iova_node *left, struct iova_node *right, unsigned keep, unsigned slot,
                         const struct iova_mapping *mapping)
{
    move_mappings(right, 0, left, keep, left->count - keep);
    if (slot <= keep && keep < LEAF_MAX) {
        iova_leaf_add(left, slot, mapping);
    } else {
        iova_leaf_add(right, slot - keep, mapping);
    }
    return right->first[0];
}

void iova_inner_add(struct iova_node *node, unsigned slot, uint64_t key, struct iova_node *child)
{
    unsigned move = node->count - slot;

    memmove(&node->child[slot + 1], &node->child[slot], move * sizeof(node->child[0]));
    memmove(&node->key[slot], &node->key[slot - 1], move * sizeof(node->key[0]));
    node->child[slot] = child;
    node->key[slot - 1] = key;
    node->count++;
}

void iova_inner_drop(struct iova_node *node, unsigned slot)
{
    unsigned move = node->count - slot - 1u;

    memmove(&node->child[slot], &node->child[slot + 1], move * sizeof(node->child[0]));
    memmove(&node->key[slot - 1], &node->key[slot], move * sizeof(node->key[0]));
    node->count--;
}

/* The children of up to two inner nodes, and the keys between them. */
struct fan {
    unsigned count;
    uint64_t key[2 * CHILD_MAX - 1];
    struct iova_node *child[2 * CHILD_MAX];
};

/* Appends n children of a node, `key` going before them if they are not the first. */
static void fan_append(struct fan *fan, uint64_t key, const struct iova_node *node, unsigned start, unsigned n)
{
    if (n == 0) {
        return;
    }
    if (fan->count > 0) {
        fan->key[fan->count - 1] = key;
    }
    memcpy(&fan->child[fan->count], &node->child[start], n * sizeof(fan->child[0]));
    memcpy(&fan->key[fan->count], &node->key[start], (n - 1) * sizeof(fan->key[0]));
    fan->count += n;
}

/* Makes n children the contents of a node. */
static void fan_store(const struct fan *fan, unsigned start, unsigned n, struct iova_node *node)
{
    memcpy(node->child, &fan->child[start], n * sizeof(node->child[0]));
    memcpy(node->key, &fan->key[start], (n - 1) * sizeof(node->key[0]));
    node->count = (uint16_t)n;
}

uint64_t iova_inner_split(struct iova_node *left, struct iova_node *right, unsigned keep, unsigned slot,
                          uint64_t key, struct iova_node *child)
{
    struct fan fan = {.count = 0};

    fan_append(&fan, 0, left, 0, slot);
    fan.key[fan.count - 1] = key;
    fan.child[fan.count++] = child;
    if (slot < left->count) {
        fan_append(&fan, left->key[slot - 1], left, slot, left->count - slot);
    }
    fan_store(&fan, 0, keep, left);
    fan_store(&fan, keep, fan.count - keep, right);
    return fan.key[keep - 1];
}

static bool join_leaves(struct iova_node *left, struct iova_node *right, uint64_t *key)
{
    unsigned total = (unsigned)left->count + right->count;
    unsigned keep = total <= LEAF_MAX ? total : total / 2;

    if (keep > left->count) {
        move_mappings(left, left->count, right, 0, keep - left->count);
    } else {
        move_mappings(right, 0, left, keep, left->count - keep);
    }
    if (right->count == 0) {
        return true;
    }
    *key = right->first[0];
    return false;
}

static bool join_inner(struct iova_node *left, struct iova_node *right, uint64_t *key)
{
    struct fan fan = {.count = 0};

    fan_append(&fan, 0, left, 0, left->count);
    fan_append(&fan, *key, right, 0, right->count);
    if (fan.count <= CHILD_MAX) {
        fan_store(&fan, 0, fan.count, left);
        right->count = 0;
        return true;
    }
    unsigned keep = fan.count / 2;
    fan_store(&fan, 0, keep, left);
    fan_store(&fan, keep, fan.count - keep, right);
    *key = fan.key[keep - 1];
    return false;
}

bool iova_node_join(struct iova_node *parent, unsigned slot)
{
    struct iova_node *left = parent->child[slot];
    struct iova_node *right = parent->child[slot + 1];

    return left->level > 0 ? join_inner(left, right, &parent->key[slot])
                           : join_leaves(left, right, &parent->key[slot]);
}
