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
#define SPIN_PATIENCE 2u
/* Looks at the ring between two looks at the clock: a look is about 2 ns, the clock about 25 ns. */
#define SPIN_LOOKS 32
/* How long polling is given up, and how many polls have to pay before that starts from the beginning again. */
#define SPIN_PENALTY_NS 2000000u
#define SPIN_PENALTY_MAX_NS 256000000u
#define SPIN_TRUST 256u
/* Interrupts a write that blocks. Nothing else here uses it, and by default it is ignored. */
#define NUDGE SIGURG
#define NUDGE_MS 20

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

static void tell(struct worker *worker, int fd)
{
    atomic_store_explicit(&worker->telling, true, memory_order_relaxed);
    signal_eventfd(fd);
    atomic_store_explicit(&worker->telling, false, memory_order_relaxed);
}

void worker_broken(struct worker *worker, uint32_t index)
{
    struct worker_queue *queue = &worker->queues[index];
    struct viommu_record record = {.kind = VIOMMU_RECORD_BROKEN, .type = index, .code = queue->vq.broken};

    worker->needs_reset = true;
    count_add(&worker->stats->rings_broken, 1);
    tell(worker, queue->ring.err);
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
        tell(worker, queue->ring.call);
    }
}

void worker_flush(struct worker *worker)
{
    if (worker->held_until == 0)
        return;
    worker->held_until = 0;
    worker->held = worker->paused;
    notify(worker, &worker->queues[VIOMMU_REQUESTQ]);
}

void worker_pause(struct worker *worker, bool paused)
{
    worker_flush(worker);
    worker->paused = worker->held = paused;
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
    if (outcome->injected != 0) {
        record.kind = VIOMMU_RECORD_INJECTED;
        record.value = outcome->injected;
    } else if (outcome->status != STATUS_OK)
        record.kind = VIOMMU_RECORD_REFUSED;
    else if (outcome->type == REQUEST_ATTACH)
        record.kind = VIOMMU_RECORD_ATTACHED;
    else if (outcome->type == REQUEST_DETACH)
        record.kind = VIOMMU_RECORD_DETACHED;
    else
        return;
    records_put(worker->records, &record);
}

/* Do what was injected for a request that has been carried out. False: it is not answered. */
static bool misbehave(struct worker *worker, struct request_outcome *outcome)
{
    switch (outcome->injected) {
    case VIOMMU_INJECT_DELAY:
        worker->held_until = now_ns() + outcome->delay_ns;
        worker->held = true;
        return true;
    case VIOMMU_INJECT_DROP:
        outcome->status = VIOMMU_STATUS_UNANSWERED;
        return false;
    case VIOMMU_INJECT_HANG:
        for (;;)
            (void)pause();
    default:
        return true;
    }
}

/* Serve what is there, up to a batch. True when something was done. */
static bool serve_requests(struct worker *worker)
{
    struct worker_queue *queue = &worker->queues[VIOMMU_REQUESTQ];
    unsigned served = 0;
    uint64_t began = 0; /* 0: not timed */
    int rc = 0;

    if (!queue->running || worker->held)
        return false;
    while (served < WORKER_BATCH && !worker->held) {
        struct request_outcome outcome;
        int64_t length;

        rc = virtqueue_take(&queue->vq, &worker->chain);
        if (rc <= 0)
            break;
        if (served == 0 && service_time_due(&worker->times))
            began = now_ns();
        length = request_serve_tapped(worker->iommu, worker->memory, &worker->chain, &worker->taps, &outcome);
        if (length < 0) {
            rc = virtqueue_break(&queue->vq, VIOMMU_BROKEN_ADDRESS);
            break;
        }
        if (outcome.injected == 0 || misbehave(worker, &outcome))
            virtqueue_give(&queue->vq, &worker->chain, (uint32_t)length);
        account(worker, &outcome);
        served++;
    }
    if (served != 0) {
        count_add(&worker->stats->batches, 1);
        if (!worker->held) {
            notify(worker, queue);
            if (began != 0)
                service_time_add(&worker->times, served, now_ns() - began);
        }
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
    /* Looked at even where no queue runs: what has waited too long makes room for what has not. */
    while (served < WORKER_BATCH && fault_peek(worker->faults, now_ns(), &fault) && queue->running) {
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
 * Polling does not pay: the guest makes no requests, or it cannot because the CPU that we poll on is the one it would
 * make them on. With more threads than CPUs, requests then take 800 us instead of 80. So sleep, for longer each time
 * until polling has paid for a while.
 */
static void stop_spinning(struct spin *spin, uint64_t now)
{
    spin->penalty_ns = spin->penalty_ns == 0 ? SPIN_PENALTY_NS : spin->penalty_ns * 2;
    if (spin->penalty_ns > SPIN_PENALTY_MAX_NS)
        spin->penalty_ns = SPIN_PENALTY_MAX_NS;
    spin->not_before = now + spin->penalty_ns;
    spin->window_ns = 0;
    spin->hits = 0;
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
                if (++worker->spin.hits >= SPIN_TRUST)
                    worker->spin.penalty_ns = 0;
                return true;
            }
            if (interrupted(worker))
                return true;
            relax();
        }
        now = now_ns();
    }
    if (worker->spin.window_ns != 0 && ++worker->spin.misses >= SPIN_PATIENCE)
        stop_spinning(&worker->spin, now);
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
        now - idle_since < worker->spin.limit_ns && now >= worker->spin.not_before) {
        worker->spin.window_ns = worker->spin.limit_ns;
        worker->spin.misses = 0;
    }
    return now;
}

/* Serve no request for now. Returns the time. */
static uint64_t hold(struct worker *worker)
{
    struct worker_queue *events = &worker->queues[VIOMMU_EVENTQ];
    struct epoll_event event;
    uint64_t now = now_ns();
    uint64_t left = worker->held_until > now ? worker->held_until - now : 0;

    if (worker->held_until != 0 && left == 0) {
        worker_flush(worker);
        return now;
    }
    (void)serve_faults(worker);
    check_memory(worker);
    if (worker->held_until != 0 && left < 2000000) { /* shorter than what epoll can wait for exactly */
        relax();
        return now;
    }
    if (events->running)
        virtqueue_want_kick(&events->vq, fault_waiting(worker->faults));
    if (!interrupted(worker) && !(fault_waiting(worker->faults) && queue_ready(worker, VIOMMU_EVENTQ))) {
        __atomic_store_n(&worker->stats->asleep, true, __ATOMIC_RELEASE);
        (void)epoll_wait(worker->epoll, &event, 1, worker->held_until == 0 ? -1 : (int)(left / 1000000) - 1);
        __atomic_store_n(&worker->stats->asleep, false, __ATOMIC_RELEASE);
    }
    return now_ns();
}

static void stand_still(struct worker *worker)
{
    (void)pthread_mutex_lock(&worker->lock);
    while (atomic_load(&worker->park)) { /* said anew each time: it may be asked again before it has run */
        if (worker->errand != NULL) {
            guest_memory_guard(worker->memory);
            worker->errand(worker->errand_context);
            worker->errand = NULL;
            atomic_store(&worker->park, false);
            (void)pthread_cond_broadcast(&worker->changed);
            break;
        }
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
        if (worker->held) {
            since = hold(worker);
            continue;
        }
        while (serve(worker) && !interrupted(worker))
            count_add(&worker->stats->heartbeat, 1);
        idle = now_ns();
        count_add(&worker->stats->busy_ns, idle - since);
        since = idle;
        if (!worker->held && !spin(worker, idle))
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

static void nudged(int number)
{
    (void)number; /* that the system call returns is all there is to it */
}

/* Let NUDGE interrupt a thread that does not block it, unless the program has a use of its own for it. */
static void install_nudge(void)
{
    struct sigaction action;

    if (sigaction(NUDGE, NULL, &action) != 0 || action.sa_handler != SIG_DFL)
        return;
    memset(&action, 0, sizeof(action));
    action.sa_handler = nudged; /* and no SA_RESTART */
    (void)sigaction(NUDGE, &action, NULL);
}

int worker_start(struct worker *worker, uint32_t spin_us)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = WAKE_TOKEN};
    pthread_condattr_t attributes;
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
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&worker->changed, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    install_nudge();
    /* Signals are for the control plane, but for those that the worker's own accesses raise. */
    (void)sigfillset(&all);
    (void)sigdelset(&all, SIGBUS);
    (void)sigdelset(&all, SIGSEGV);
    (void)sigdelset(&all, SIGFPE);
    (void)sigdelset(&all, SIGILL);
    (void)sigdelset(&all, NUDGE);
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

/* Wait for a sign of the worker, with the lock held. A write of its that blocks is interrupted. */
static void await(struct worker *worker)
{
    struct timespec until;

    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += NUDGE_MS * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    if (pthread_cond_timedwait(&worker->changed, &worker->lock, &until) == ETIMEDOUT &&
        atomic_load_explicit(&worker->telling, memory_order_relaxed))
        (void)pthread_kill(worker->thread, NUDGE);
}

void worker_park(struct worker *worker)
{
    atomic_store(&worker->park, true);
    worker_wake(worker);
    (void)pthread_mutex_lock(&worker->lock);
    while (!worker->parked)
        await(worker);
    (void)pthread_mutex_unlock(&worker->lock);
}

void worker_run(struct worker *worker, worker_errand *errand, void *context)
{
    (void)pthread_mutex_lock(&worker->lock);
    worker->errand_context = context;
    worker->errand = errand;
    atomic_store(&worker->park, true);
    worker_wake(worker);
    while (worker->errand != NULL)
        await(worker);
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
