/*
 * The worker: the one thread of an engine that serves its queues. It waits for kicks, serves in batches, polls an
 * empty ring for a while before it sleeps, and stops at a request boundary when the control plane asks (park).
 * Nothing here is changed by anyone else while the worker runs.
 */
#ifndef VIOMMU_WORKER_H
#define VIOMMU_WORKER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "fault.h"
#include "iommu.h"
#include "records.h"
#include "virtqueue.h"

/* Requests served between two looks at the control plane, and at most published together. */
#define WORKER_BATCH 64u

struct worker_queue {
    bool running;
    struct viommu_ring ring;   /* as it was started; fds are ours */
    uint64_t features;         /* accepted when it was started */
    struct virtqueue vq;
    struct inflight inflight;
    uint32_t base;             /* where it stopped */
};

/* How long to poll: adapted to whether polling has paid lately. */
struct spin {
    uint64_t limit_ns;
    uint64_t window_ns;        /* now: 0 to limit */
    unsigned misses;           /* windows in a row that ended without work */
};

struct worker {
    pthread_t thread;
    bool started;
    struct worker_queue queues[VIOMMU_QUEUES];
    struct iommu *iommu;
    struct guest_memory *memory; /* NULL: none yet */
    struct fault_queue *faults;
    struct records *records;
    struct viommu_stats *stats;
    struct spin spin;
    struct chain chain;        /* scratch of the serving loop */
    atomic_bool needs_reset;
    int epoll;
    int wake;
    atomic_bool park;
    atomic_bool quit;
    bool parked;
    pthread_mutex_t lock;      /* only held around parking */
    pthread_cond_t changed;
};

/* Start the thread; the pointers of *worker to its parts are set. 0 or -errno. */
int worker_start(struct worker *worker, uint32_t spin_us);
void worker_stop(struct worker *worker);

/* Wait until the worker has finished its round and stands still; let it go on. */
void worker_park(struct worker *worker);
void worker_unpark(struct worker *worker);
/* Make it look around. Any thread. */
void worker_wake(struct worker *worker);

/* With the worker parked: watch a queue's kick eventfd, or no more. */
int worker_watch(struct worker *worker, uint32_t queue);
void worker_unwatch(struct worker *worker, uint32_t queue);

/* With the worker parked: note a broken ring, tell the front-end and the control plane. */
void worker_broken(struct worker *worker, uint32_t queue);

#endif
