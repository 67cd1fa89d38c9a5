#include "worker.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "counters.h"
#include "request.h"

#define WAKE_TOKEN VIOMMU_QUEUES
/* Windows that may end without work before polling is given up until it would have paid again. */
#define SPIN_PATIENCE 3u
/* Looks at the ring between two looks at the clock: a look is about 2 ns, the clock about 25 ns. */
#define SPIN_LOOKS 32

static uint64_t now_ns(void)
{
    struct timespec time;

    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void signal_eventfd(int fd)
{
    uint64_t one = 1;

    if (fd >= 0)
        (void)!write(fd, &one, sizeof(one)); /* a full counter is signalled already */
}

void worker_broken(struct worker *worker, uint32_t index)
{
    struct worker_queue *queue = &worker->queues[index];
    struct viommu_record record = {.kind = VIOMMU_RECORD_BROKEN, .type = index, .code = queue->vq.broken};

    worker->needs_reset = true;
    count_add(&worker->stats->rings_broken, 1);
    signal_eventfd(queue->ring.err);
    records_put(worker->records, &record);
}

static bool memory_shrunk(const struct worker *worker)
{
    return worker->memory != NULL && atomic_load_explicit(&worker->memory->shrunk, memory_order_relaxed);
}

/* Serve a broken queue no more; stop and start brings it back. */
static void give_up(struct worker *worker, uint32_t index)
{
    struct worker_queue *queue = &worker->queues[index];

    if (memory_shrunk(worker)) /* what is not there reads as zeroes: no wonder, whatever was wrong with it */
        (void)virtqueue_break(&queue->vq, VIOMMU_BROKEN_MEMORY);
    queue->running = false;
    worker_broken(worker, index);
}

static void notify(struct worker *worker, struct worker_queue *queue)
{
    if (virtqueue_publish(&queue->vq) && queue->ring.call >= 0) {
        count_add(&worker->stats->notifications, 1);
        signal_eventfd(queue->ring.call);
    }
}

static void account(struct worker *worker, const struct request_outcome *outcome)
{
    struct viommu_record record = {
        .type = outcome->type,
        .code = outcome->status,
        .endpoint = outcome->endpoint,
        .domain = outcome->domain,
        .value = outcome->flags,
        .first = outcome->first,
        .last = outcome->last,
    };

    count_add(&worker->stats->requests[outcome->type][outcome->status], 1);
    if (outcome->status != STATUS_OK)
        record.kind = VIOMMU_RECORD_REFUSED;
    else if (outcome->type == REQUEST_ATTACH)
        record.kind = VIOMMU_RECORD_ATTACHED;
    else if (outcome->type == REQUEST_DETACH)
        record.kind = VIOMMU_RECORD_DETACHED;
    else
        return;
    records_put(worker->records, &record);
}

/* Serve what is there, up to a batch. True when something was done. */
static bool serve_requests(struct worker *worker)
{
    struct worker_queue *queue = &worker->queues[VIOMMU_REQUESTQ];
    unsigned served = 0;
    int rc = 0;

    if (!queue->running)
        return false;
    while (served < WORKER_BATCH) {
        struct request_outcome outcome;
        int64_t length;

        rc = virtqueue_take(&queue->vq, &worker->chain);
        if (rc <= 0)
            break;
        length = request_serve(worker->iommu, worker->memory, &worker->chain, &outcome);
        if (length < 0) {
            rc = virtqueue_break(&queue->vq, VIOMMU_BROKEN_ADDRESS);
            break;
        }
        virtqueue_give(&queue->vq, &worker->chain, (uint32_t)length);
        account(worker, &outcome);
        served++;
    }
    if (served != 0) {
        count_add(&worker->stats->batches, 1);
        notify(worker, queue);
    }
    if (rc < 0 && queue->running)
        give_up(worker, VIOMMU_REQUESTQ);
    return served != 0;
}

/* Give waiting fault reports to the guest, as far as it has posted buffers. True when something was done. */
static bool serve_faults(struct worker *worker)
{
    struct worker_queue *queue = &worker->queues[VIOMMU_EVENTQ];
    uint32_t personality = worker->iommu->settings.personality;
    uint32_t bytes = fault_report_bytes(personality);
    struct fault fault;
    unsigned served = 0;
    int rc = 0;

    if (!fault_waiting(worker->faults))
        return false;
    while (served < WORKER_BATCH && queue->running && fault_peek(worker->faults, now_ns(), &fault)) {
        uint8_t report[FAULT_REPORT_MAX];

        rc = virtqueue_take(&queue->vq, &worker->chain);
        if (rc <= 0)
            break;
        served++;
        if (worker->chain.writable_bytes < bytes) { /* never spread over several: give it back empty */
            virtqueue_give(&queue->vq, &worker->chain, 0);
            continue;
        }
        fault_report_encode(personality, fault.reason, fault.flags, fault.endpoint, fault.address, report);
        if (chain_write(worker->memory, &worker->chain, 0, report, bytes) != 0) {
            rc = virtqueue_break(&queue->vq, VIOMMU_BROKEN_ADDRESS);
            break;
        }
        virtqueue_give(&queue->vq, &worker->chain, bytes);
        fault_done(worker->faults);
        count_add(&worker->stats->faults_sent, 1);
        records_put(worker->records, &(struct viommu_record){.kind = VIOMMU_RECORD_FAULT,
                                                             .code = fault.reason,
                                                             .endpoint = fault.endpoint,
                                                             .value = fault.flags,
                                                             .first = fault.address,
                                                             .last = fault.address});
    }
    if (served != 0)
        notify(worker, queue);
    if (rc < 0 && queue->running)
        give_up(worker, VIOMMU_EVENTQ);
    return served != 0;
}

/* A file behind guest memory shrank: what the rings say can no longer be believed. */
static void check_memory(struct worker *worker)
{
    for (uint32_t i = 0; memory_shrunk(worker) && i < VIOMMU_QUEUES; i++) {
        if (worker->queues[i].running)
            give_up(worker, i);
    }
}

static bool serve(struct worker *worker)
{
    bool worked = serve_requests(worker);

    worked |= serve_faults(worker);
    check_memory(worker);
    return worked;
}

static bool queue_ready(const struct worker *worker, uint32_t index)
{
    const struct worker_queue *queue = &worker->queues[index];

    return queue->running && virtqueue_available(&queue->vq);
}

/* Something to do: requests, or a report and a buffer for it. */
static bool ready(const struct worker *worker)
{
    return queue_ready(worker, VIOMMU_REQUESTQ) ||
           (fault_waiting(worker->faults) && queue_ready(worker, VIOMMU_EVENTQ));
}

static bool interrupted(const struct worker *worker)
{
    return atomic_load_explicit(&worker->park, memory_order_relaxed);
}

/*
 * Poll for a while. True when there is work, or the control plane asks. No clock is read between seeing work and
 * serving it: it would be a tenth of a polled request.
 */
static bool spin(struct worker *worker, uint64_t idle_since)
{
    uint64_t now = idle_since;

    while (now - idle_since < worker->spin.window_ns) {
        for (int i = 0; i < SPIN_LOOKS; i++) {
            if (ready(worker)) {
                worker->spin.misses = 0;
                return true;
            }
            if (interrupted(worker))
                return true;
            relax();
        }
        now = now_ns();
    }
    if (worker->spin.window_ns != 0 && ++worker->spin.misses >= SPIN_PATIENCE)
        worker->spin.window_ns = 0;
    count_add(&worker->stats->spin_ns, now - idle_since);
    return false;
}

/* Ask for kicks, make sure that none was missed, and wait. Returns the time. */
static uint64_t wait(struct worker *worker, uint64_t idle_since)
{
    struct worker_queue *requests = &worker->queues[VIOMMU_REQUESTQ];
    struct worker_queue *events = &worker->queues[VIOMMU_EVENTQ];
    struct epoll_event event;
    uint64_t now;
    int count;

    if (requests->running)
        virtqueue_want_kick(&requests->vq, true);
    if (events->running)
        virtqueue_want_kick(&events->vq, fault_waiting(worker->faults)); /* buffers alone are no news */
    if (!ready(worker) && !interrupted(worker)) {
        count_add(&worker->stats->sleeps, 1);
        __atomic_store_n(&worker->stats->asleep, true, __ATOMIC_RELEASE);
        do
            count = epoll_wait(worker->epoll, &event, 1, -1);
        while (count < 0 && errno == EINTR);
        __atomic_store_n(&worker->stats->asleep, false, __ATOMIC_RELEASE);
        if (count == 1 && event.data.u32 != WAKE_TOKEN)
            count_add(&worker->stats->kicks, 1);
    }
    if (requests->running)
        virtqueue_want_kick(&requests->vq, false);
    now = now_ns();
    /* Would polling have paid? Then it is worth trying again. */
    if (worker->spin.window_ns < worker->spin.limit_ns && queue_ready(worker, VIOMMU_REQUESTQ) &&
        now - idle_since < worker->spin.limit_ns) {
        worker->spin.window_ns = worker->spin.limit_ns;
        worker->spin.misses = 0;
    }
    return now;
}

static void stand_still(struct worker *worker)
{
    (void)pthread_mutex_lock(&worker->lock);
    while (atomic_load(&worker->park)) { /* said anew each time: it may be asked again before it has run */
        worker->parked = true;
        (void)pthread_cond_broadcast(&worker->changed);
        (void)pthread_cond_wait(&worker->changed, &worker->lock);
    }
    (void)pthread_mutex_unlock(&worker->lock);
    guest_memory_guard(worker->memory);
}

static void *run(void *arg)
{
    struct worker *worker = arg;
    uint64_t since = now_ns(); /* what comes after is not accounted for yet */

    (void)prctl(PR_SET_NAME, "viommu-worker");
    while (!atomic_load_explicit(&worker->quit, memory_order_relaxed)) {
        uint64_t idle;

        count_add(&worker->stats->heartbeat, 1);
        if (interrupted(worker)) {
            stand_still(worker);
            since = now_ns();
            continue;
        }
        while (serve(worker) && !interrupted(worker))
            count_add(&worker->stats->heartbeat, 1);
        idle = now_ns();
        count_add(&worker->stats->busy_ns, idle - since);
        since = idle;
        if (!spin(worker, idle))
            since = wait(worker, idle);
    }
    return NULL;
}

static uint64_t spin_limit(uint32_t spin_us)
{
    cpu_set_t cpus;

    /* On a single CPU, polling keeps the guest from making the very request that is polled for. */
    if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0 && CPU_COUNT(&cpus) < 2)
        return 0;
    return (uint64_t)spin_us * 1000;
}

int worker_start(struct worker *worker, uint32_t spin_us)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = WAKE_TOKEN};
    sigset_t all, before;
    int rc;

    worker->spin.limit_ns = spin_limit(spin_us);
    worker->epoll = epoll_create1(EPOLL_CLOEXEC);
    worker->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (worker->epoll < 0 || worker->wake < 0 ||
        epoll_ctl(worker->epoll, EPOLL_CTL_ADD, worker->wake, &event) != 0) {
        rc = -errno;
        goto fail;
    }
    (void)pthread_mutex_init(&worker->lock, NULL);
    (void)pthread_cond_init(&worker->changed, NULL);
    /* Signals are for the control plane, but for those that the worker's own accesses raise. */
    (void)sigfillset(&all);
    (void)sigdelset(&all, SIGBUS);
    (void)sigdelset(&all, SIGSEGV);
    (void)sigdelset(&all, SIGFPE);
    (void)sigdelset(&all, SIGILL);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = -pthread_create(&worker->thread, NULL, run, worker);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0) {
        worker->started = true;
        return 0;
    }
    (void)pthread_cond_destroy(&worker->changed);
    (void)pthread_mutex_destroy(&worker->lock);
fail:
    if (worker->epoll >= 0)
        (void)close(worker->epoll);
    if (worker->wake >= 0)
        (void)close(worker->wake);
    return rc;
}

void worker_stop(struct worker *worker)
{
    if (!worker->started)
        return;
    worker_park(worker);
    atomic_store(&worker->quit, true);
    worker_unpark(worker);
    (void)pthread_join(worker->thread, NULL);
    (void)pthread_cond_destroy(&worker->changed);
    (void)pthread_mutex_destroy(&worker->lock);
    (void)close(worker->epoll);
    (void)close(worker->wake);
    worker->started = false;
}

void worker_wake(struct worker *worker)
{
    signal_eventfd(worker->wake);
}

void worker_park(struct worker *worker)
{
    atomic_store(&worker->park, true);
    worker_wake(worker);
    (void)pthread_mutex_lock(&worker->lock);
    while (!worker->parked)
        (void)pthread_cond_wait(&worker->changed, &worker->lock);
    (void)pthread_mutex_unlock(&worker->lock);
}

void worker_unpark(struct worker *worker)
{
    (void)pthread_mutex_lock(&worker->lock);
    atomic_store(&worker->park, false);
    worker->parked = false;
    (void)pthread_cond_broadcast(&worker->changed);
    (void)pthread_mutex_unlock(&worker->lock);
}

int worker_watch(struct worker *worker, uint32_t queue)
{
    /* Edge-triggered and never read: one system call a kick, and every write is an edge. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = queue};

    return epoll_ctl(worker->epoll, EPOLL_CTL_ADD, worker->queues[queue].ring.kick, &event) == 0 ? 0 : -errno;
}

void worker_unwatch(struct worker *worker, uint32_t queue)
{
    (void)epoll_ctl(worker->epoll, EPOLL_CTL_DEL, worker->queues[queue].ring.kick, NULL);
}
