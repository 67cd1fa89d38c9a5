/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Chunks are aligned to their size, so a node finds its chunk by masking its address, and giving a node
 * back touches the chunk's header only: a map of a million mappings is freed without reading its leaves.
 *
 * Chunks are listed by how many of their nodes are in use. Nodes are taken from the fullest chunk that has
 * an idle one, which lets sparse chunks run empty by themselves. Random removals leave every chunk equally
 * sparse, though, and then nodes have to be moved: see iova_pool_is_sparse().
 */
#include "iova_pool.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Nodes of a chunk; the header lies where a 64th would. */
#define CHUNK_NODES 63u

static_assert(IOVA_CHUNK_BYTES == (CHUNK_NODES + 1) * IOVA_NODE_BYTES, "header and nodes fill a chunk");

struct chunk {
    struct chunk *next;
    struct chunk **link; /* what points to this chunk: a list head or the next of the one before */
    uint64_t idle;       /* bit n: node n (1 to 63) is not in use */
    unsigned used;
};

static_assert(sizeof(struct chunk) <= IOVA_NODE_BYTES, "the header takes the place of one node");

struct iova_pool {
    struct iova_pool_hooks hooks;
    struct chunk *by_use[CHUNK_NODES + 1]; /* lists of the chunks with n nodes in use */
    uint64_t listed;                       /* bit n: by_use[n] is not empty */
    size_t idle_nodes;
    size_t used_nodes;
    size_t bytes;
};

static void list_add(struct iova_pool *pool, struct chunk *chunk)
{
    struct chunk **head = &pool->by_use[chunk->used];

    chunk->next = *head;
    chunk->link = head;
    if (*head) {
        (*head)->link = &chunk->next;
    }
    *head = chunk;
    pool->listed |= UINT64_C(1) << chunk->used;
}

static void list_remove(struct iova_pool *pool, struct chunk *chunk)
{
    *chunk->link = chunk->next;
    if (chunk->next) {
        chunk->next->link = chunk->link;
    }
    if (!pool->by_use[chunk->used]) {
        pool->listed &= ~(UINT64_C(1) << chunk->used);
    }
}

static struct chunk *chunk_of(const void *node)
{
    return (struct chunk *)((uintptr_t)node & ~(uintptr_t)(IOVA_CHUNK_BYTES - 1));
}

static void *node_at(struct chunk *chunk, unsigned index)
{
    return (char *)chunk + index * (size_t)IOVA_NODE_BYTES;
}

/* Pages of IOVA_CHUNK_BYTES, aligned to as much, or NULL. Straight from the kernel, so that they go back there. */
static void *map_aligned(void)
{
    const int protection = PROT_READ | PROT_WRITE;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    const uintptr_t mask = IOVA_CHUNK_BYTES - 1;
    char *start = mmap(NULL, IOVA_CHUNK_BYTES, protection, flags, -1, 0);

    if (start == MAP_FAILED) {
        return NULL;
    }
    if (((uintptr_t)start & mask) == 0) {
        return start; /* the usual case after the first chunk: the kernel places them side by side */
    }
    munmap(start, IOVA_CHUNK_BYTES);
    start = mmap(NULL, (size_t)2 * IOVA_CHUNK_BYTES, protection, flags, -1, 0);
    if (start == MAP_FAILED) {
        return NULL;
    }
    size_t head = (size_t)(-(uintptr_t)start & mask);
    if (head > 0) {
        munmap(start, head);
    }
    munmap(start + head + IOVA_CHUNK_BYTES, IOVA_CHUNK_BYTES - head);
    return start + head;
}

static struct chunk *chunk_new(struct iova_pool *pool)
{
    struct chunk *chunk = map_aligned();

    if (chunk) {
        chunk->idle = ~UINT64_C(1);
        chunk->used = 0;
        pool->idle_nodes += CHUNK_NODES;
        pool->bytes += IOVA_CHUNK_BYTES;
        list_add(pool, chunk);
    }
    return chunk;
}

static void chunk_free(struct iova_pool *pool, struct chunk *chunk)
{
    list_remove(pool, chunk);
    pool->idle_nodes -= CHUNK_NODES;
    pool->bytes -= IOVA_CHUNK_BYTES;
    munmap(chunk, IOVA_CHUNK_BYTES);
}

static bool refused(const struct iova_pool *pool, size_t bytes)
{
    return pool->hooks.refuse && pool->hooks.refuse(pool->hooks.context, bytes);
}

struct iova_pool *iova_pool_new(const struct iova_pool_hooks *hooks)
{
    struct iova_pool *pool = calloc(1, sizeof(*pool));

    if (pool) {
        if (hooks) {
            pool->hooks = *hooks;
        }
        pool->bytes = sizeof(*pool);
    }
    return pool;
}

void iova_pool_free(struct iova_pool *pool)
{
    if (!pool) {
        return;
    }
    while (pool->by_use[0]) {
        chunk_free(pool, pool->by_use[0]);
    }
    assert(pool->bytes == sizeof(*pool)); /* else a map outlives its pool */
    free(pool);
}

size_t iova_pool_bytes(const struct iova_pool *pool)
{
    return pool->bytes;
}

void *iova_pool_calloc(struct iova_pool *pool, size_t bytes)
{
    void *memory = refused(pool, bytes) ? NULL : calloc(1, bytes);

    if (memory) {
        pool->bytes += bytes;
    }
    return memory;
}

void iova_pool_cfree(struct iova_pool *pool, void *memory, size_t bytes)
{
    if (memory) {
        pool->bytes -= bytes;
        free(memory);
    }
}

/* An idle node of the fullest chunk that has one, or NULL. */
static void *take_idle(struct iova_pool *pool)
{
    uint64_t not_full = pool->listed & ~(UINT64_C(1) << CHUNK_NODES);

    if (not_full == 0) {
        return NULL;
    }
    struct chunk *chunk = pool->by_use[63 - __builtin_clzll(not_full)];
    unsigned index = (unsigned)__builtin_ctzll(chunk->idle);

    list_remove(pool, chunk);
    chunk->idle &= chunk->idle - 1;
    chunk->used++;
    list_add(pool, chunk);
    pool->idle_nodes--;
    pool->used_nodes++;
    return node_at(chunk, index);
}

void *iova_pool_take(struct iova_pool *pool)
{
    if (refused(pool, IOVA_NODE_BYTES) || (pool->idle_nodes == 0 && !chunk_new(pool))) {
        return NULL;
    }
    return take_idle(pool);
}

void iova_pool_give(struct iova_pool *pool, void *node)
{
    struct chunk *chunk = chunk_of(node);
    uint64_t bit = UINT64_C(1) << (((uintptr_t)node - (uintptr_t)chunk) / IOVA_NODE_BYTES);

    assert((chunk->idle & bit) == 0);
    list_remove(pool, chunk);
    chunk->idle |= bit;
    chunk->used--;
    list_add(pool, chunk);
    pool->idle_nodes++;
    pool->used_nodes--;
}

/*
 * The quarter bounds the work: where this is true the sparsest chunk is at most four fifths full, so
 * at most four moves win back one idle node. The chunk beside it keeps a map that shrinks and grows by a
 * node from asking the kernel each time.
 */
bool iova_pool_is_sparse(struct iova_pool *pool)
{
    while (pool->idle_nodes > pool->used_nodes / 4 + CHUNK_NODES) {
        if (!pool->by_use[0]) {
            return true;
        }
        chunk_free(pool, pool->by_use[0]);
    }
    return false;
}

void iova_pool_pick_move(struct iova_pool *pool, void **from, void **to)
{
    /* More than a chunk's nodes are idle and no chunk is empty, so two chunks at least are neither full nor empty. */
    *to = take_idle(pool);
    uint64_t candidates = pool->listed & ~(UINT64_C(1) | UINT64_C(1) << CHUNK_NODES);
    struct chunk *sparsest = pool->by_use[__builtin_ctzll(candidates)];
    assert(sparsest != chunk_of(*to));
    *from = node_at(sparsest, (unsigned)__builtin_ctzll(~sparsest->idle & ~UINT64_C(1)));
}
