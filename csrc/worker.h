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
#include "request.h"
#include "service_time.h"
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
    unsigned hits;             /* polls that paid since it was last given up */
    uint64_t penalty_ns;       /* how long it was given up then */
    uint64_t not_before;       /* no polling until then */
};

/* A little work of the control plane that the worker does for it at a request boundary. */
typedef void worker_errand(void *context);

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
    struct service_times times;
    struct request_taps taps;
    struct inject inject;
    bool held;                 /* requests are left alone: one of the next two */
    bool paused;               /* until the control plane says so */
    uint64_t held_until;       /* with answers given but not shown yet; 0: not */
    atomic_bool needs_reset;
    int epoll;
    int wake;
    atomic_bool telling;       /* writing an eventfd, which a hostile front-end can make block */
    atomic_bool park;
    atomic_bool quit;
    bool parked;
    worker_errand *errand;     /* NULL: to park, and no more */
    void *errand_context;
    pthread_mutex_t lock;      /* only held around parking */
    pthread_cond_t changed;
};

/* Start the thread; the pointers of *worker to its parts are set. 0 or -errno. */
int worker_start(struct worker *worker, uint32_t spin_us);
void worker_stop(struct worker *worker);

/* Wait until the worker has finished its round and stands still; let it go on. */
void worker_park(struct worker *worker);
void worker_unpark(struct worker *worker);
/*
 * Have the worker do something at its next request boundary, and wait until it has. It loses a few microseconds,
 * where parking costs it the time this thread takes to be woken and to act.
 */
void worker_run(struct worker *worker, worker_errand *errand, void *context);
/* Make it look around. Any thread. */
void worker_wake(struct worker *worker);

/* With the worker parked: watch a queue's kick eventfd, or no more. */
int worker_watch(struct worker *worker, uint32_t queue);
void worker_unwatch(struct worker *worker, uint32_t queue);

/* With the worker parked, or by the worker: show answers that were held back; a pause stays one. */
void worker_flush(struct worker *worker);
/* The same: serve no request, or go on. */
void worker_pause(struct worker *worker, bool paused);

/* With the worker parked: note a broken ring, tell the front-end and the control plane. */
void worker_broken(struct worker *worker, uint32_t queue);

#endif
