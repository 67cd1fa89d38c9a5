#include "fault.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "id_table.h"

#define NS_PER_S 1000000000ull

/* One endpoint's allowance: a token bucket. */
struct bucket {
    uint64_t tokens;
    uint64_t filled_ns;
    uint64_t raised;
};

struct fault_queue {
    uint32_t capacity;
    uint32_t mask;                /* slots, a power of two, less one: indices run free and wrap at 2^32 */
    uint32_t burst;
    uint32_t rate;
    uint32_t max_endpoints;
    uint64_t wait_ns;
    pthread_mutex_t producers;    /* never taken by the worker */
    struct id_table buckets;
    _Atomic uint64_t dropped;
    _Atomic uint32_t head;        /* next to take; the worker's */
    _Atomic uint32_t tail;        /* next free; the producers' */
    struct fault ring[];
};

struct fault_queue *fault_queue_new(const struct viommu_settings *settings)
{
    struct fault_queue *queue;
    uint32_t slots = 1;

    while (slots < settings->max_faults)
        slots *= 2;
    queue = calloc(1, sizeof(*queue) + slots * sizeof(queue->ring[0]));
    if (queue == NULL)
        return NULL;
    queue->capacity = settings->max_faults;
    queue->mask = slots - 1;
    queue->burst = settings->fault_burst;
    queue->rate = settings->fault_rate;
    queue->max_endpoints = settings->max_endpoints;
    queue->wait_ns = settings->fault_wait_ms * (NS_PER_S / 1000);
    (void)pthread_mutex_init(&queue->producers, NULL);
    return queue;
}

void fault_queue_free(struct fault_queue *queue)
{
    struct bucket *bucket;

    if (queue == NULL)
        return;
    for (size_t slot = 0; (bucket = id_table_each(&queue->buckets, &slot)) != NULL;)
        free(bucket);
    id_table_free(&queue->buckets);
    (void)pthread_mutex_destroy(&queue->producers);
    free(queue);
}

/* The allowance of an endpoint, made at its first fault. NULL: no memory, or more endpoints than there may be. */
static struct bucket *bucket_of(struct fault_queue *queue, uint32_t endpoint, uint64_t now_ns)
{
    struct bucket *bucket = id_table_get(&queue->buckets, endpoint);

    if (bucket != NULL || queue->buckets.count >= queue->max_endpoints)
        return bucket;
    bucket = calloc(1, sizeof(*bucket));
    if (bucket == NULL)
        return NULL;
    if (id_table_put(&queue->buckets, endpoint, bucket) != 0) {
        free(bucket);
        return NULL;
    }
    bucket->tokens = queue->burst;
    bucket->filled_ns = now_ns;
    return bucket;
}

static bool allowed(const struct fault_queue *queue, struct bucket *bucket, uint64_t now_ns)
{
    uint64_t per_token = NS_PER_S / queue->rate;
    /* Producers read their clocks before they queue for the lock, so time may go back a little. */
    uint64_t earned = now_ns > bucket->filled_ns ? (now_ns - bucket->filled_ns) / per_token : 0;

    if (earned != 0) {
        bucket->filled_ns += earned * per_token;
        bucket->tokens = earned >= queue->burst - bucket->tokens ? queue->burst : bucket->tokens + earned;
    }
    if (bucket->tokens == 0)
        return false;
    bucket->tokens--;
    return true;
}

int fault_raise(struct fault_queue *queue, const struct fault *fault)
{
    struct bucket *bucket;
    int rc = -ENOBUFS;

    (void)pthread_mutex_lock(&queue->producers);
    bucket = bucket_of(queue, fault->endpoint, fault->raised_ns);
    if (bucket != NULL)
        bucket->raised++;
    if (bucket != NULL && allowed(queue, bucket, fault->raised_ns)) {
        uint32_t tail = atomic_load_explicit(&queue->tail, memory_order_relaxed);

        rc = -ENOSPC;
        if (tail - atomic_load_explicit(&queue->head, memory_order_acquire) < queue->capacity) {
            queue->ring[tail & queue->mask] = *fault;
            atomic_store_explicit(&queue->tail, tail + 1, memory_order_release);
            rc = 0;
        }
    }
    (void)pthread_mutex_unlock(&queue->producers);
    if (rc != 0)
        atomic_fetch_add_explicit(&queue->dropped, 1, memory_order_relaxed);
    return rc;
}

bool fault_waiting(const struct fault_queue *queue)
{
    return atomic_load_explicit(&queue->head, memory_order_relaxed) !=
           atomic_load_explicit(&queue->tail, memory_order_acquire);
}

bool fault_peek(struct fault_queue *queue, uint64_t now_ns, struct fault *out)
{
    while (fault_waiting(queue)) {
        *out = queue->ring[atomic_load_explicit(&queue->head, memory_order_relaxed) & queue->mask];
        if (out->raised_ns >= now_ns || now_ns - out->raised_ns <= queue->wait_ns)
            return true; /* it may have been raised after the worker looked at its clock */
        fault_done(queue);
        atomic_fetch_add_explicit(&queue->dropped, 1, memory_order_relaxed);
    }
    return false;
}

void fault_done(struct fault_queue *queue)
{
    atomic_store_explicit(&queue->head, atomic_load_explicit(&queue->head, memory_order_relaxed) + 1,
                          memory_order_release);
}

void fault_clear(struct fault_queue *queue)
{
    struct bucket *bucket;

    (void)pthread_mutex_lock(&queue->producers);
    for (size_t slot = 0; (bucket = id_table_each(&queue->buckets, &slot)) != NULL;)
        free(bucket);
    id_table_free(&queue->buckets);
    atomic_store_explicit(&queue->head, atomic_load_explicit(&queue->tail, memory_order_acquire),
                          memory_order_release);
    (void)pthread_mutex_unlock(&queue->producers);
}

uint64_t fault_dropped(const struct fault_queue *queue)
{
    return atomic_load_explicit(&queue->dropped, memory_order_relaxed);
}

uint64_t fault_count(struct fault_queue *queue, uint32_t endpoint)
{
    const struct bucket *bucket;
    uint64_t raised;

    (void)pthread_mutex_lock(&queue->producers);
    bucket = id_table_get(&queue->buckets, endpoint);
    raised = bucket != NULL ? bucket->raised : 0;
    (void)pthread_mutex_unlock(&queue->producers);
    return raised;
}
