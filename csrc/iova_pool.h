/* SPDX-License-Identifier: Apache-2.0 */
/*
 * iova_pool: the nodes that the IOVA maps of one engine are made of.
 *
 * Nodes have one size and are cut from chunks. The pool counts every byte it holds, and can say which
 * nodes keep a sparsely used chunk alive, so that their owner can move them and the chunk can go back
 * to the operating system. Used by one thread at a time.
 */
#ifndef VIOMMU_IOVA_POOL_H
#define VIOMMU_IOVA_POOL_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of a node; every node is aligned to it. */
#define IOVA_NODE_BYTES 1024u

/* Bytes the pool asks of the operating system at a time: one header and 63 nodes. */
#define IOVA_CHUNK_BYTES 65536u

struct iova_pool;

/*
 * Asked before every allocation, of a node or of anything else, with its size in bytes. True refuses it:
 * the caller sees -ENOMEM just as if memory had run out. For limits, and for tests of that path.
 */
struct iova_pool_hooks {
    bool (*refuse)(void *context, size_t bytes);
    void *context;
};

/* Makes an empty pool; hooks (copied) may be NULL. NULL if there is no memory. The caller owns the pool. */
struct iova_pool *iova_pool_new(const struct iova_pool_hooks *hooks);

/* Frees the pool. Every map made from it must have been freed before. NULL is allowed. */
void iova_pool_free(struct iova_pool *pool);

/* Bytes held now: the pool, its maps and all chunks, whether their nodes are in use or not. */
size_t iova_pool_bytes(const struct iova_pool *pool);

/* The rest is for iova_map.c. */

/* Zeroed memory of a size of the caller's choice, counted, or NULL. Give it back with the same size. */
void *iova_pool_calloc(struct iova_pool *pool, size_t bytes);
void iova_pool_cfree(struct iova_pool *pool, void *memory, size_t bytes);

/* A node with undefined contents, or NULL. */
void *iova_pool_take(struct iova_pool *pool);

/* Gives a node back; the memory of the node itself is not touched. */
void iova_pool_give(struct iova_pool *pool, void *node);

/*
 * True if the pool holds more idle nodes than a quarter of those in use and a chunk, even after it has released
 * the chunks that are all idle: nodes should be moved.
 */
bool iova_pool_is_sparse(struct iova_pool *pool);

/*
 * Where that is true: picks a node in use from the sparsest chunk, *from, and an idle node of the fullest other
 * chunk, *to, now taken. The caller moves the contents and gives *from back.
 */
void iova_pool_pick_move(struct iova_pool *pool, void **from, void **to);

#endif
