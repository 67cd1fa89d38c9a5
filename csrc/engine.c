/* The C API: what the control plane may do, and the parking of the worker around it. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "counters.h"
#include "engine.h"
#include "vfio_user.h"

#define PROBE_SIZE_MAX 4096u

/* Which engine's memory this thread touches changes from call to call. */
void engine_quiesce(struct viommu_engine *engine)
{
    worker_park(&engine->worker);
    guest_memory_guard(engine->memory);
}

void engine_resume(struct viommu_engine *engine)
{
    guest_memory_guard(NULL);
    worker_unpark(&engine->worker);
}

unsigned viommu_abi_version(void)
{
    return VIOMMU_ABI;
}

static bool settings_are_sane(const struct viommu_settings *settings)
{
    const uint64_t both = VIRTIO_IOMMU_F_BYPASS | VIRTIO_IOMMU_F_BYPASS_CONFIG;

    return settings->page_size_mask != 0 && settings->input_first <= settings->input_last &&
           settings->domain_first <= settings->domain_last && settings->probe_size <= PROBE_SIZE_MAX &&
           settings->personality <= VIOMMU_PERSONALITY_0_5 && settings->bypass <= 1 &&
           (settings->features & both) != both && settings->max_faults != 0 && settings->fault_rate != 0 &&
           settings->fault_rate <= 1000000000u && settings->fault_burst != 0 && settings->max_faults <= 1u << 20;
}

int viommu_engine_new(const struct viommu_settings *settings, struct viommu_engine **out)
{
    struct viommu_engine *engine;
    int rc;

    if (!settings_are_sane(settings))
        return -EINVAL;
    engine = calloc(1, sizeof(*engine));
    if (engine == NULL)
        return -ENOMEM;
    rc = iommu_init(&engine->iommu, settings, &engine->stats);
    if (rc != 0)
        goto no_iommu;
    rc = guest_memory_new(NULL, 0, &engine->memory);
    if (rc != 0)
        goto no_memory;
    rc = -ENOMEM;
    engine->worker.iommu = &engine->iommu;
    engine->worker.memory = engine->memory;
    engine->iommu.memory = engine->memory;
    engine->worker.stats = &engine->stats;
    engine->worker.times.every = engine->worker.times.until = settings->time_every;
    engine->worker.faults = fault_queue_new(settings);
    engine->worker.records = records_new();
    if (engine->worker.faults == NULL || engine->worker.records == NULL)
        goto no_worker;
    rc = worker_start(&engine->worker, settings->spin_us);
    if (rc != 0)
        goto no_worker;
    *out = engine;
    return 0;
no_worker:
    records_free(engine->worker.records);
    fault_queue_free(engine->worker.faults);
    guest_memory_free(engine->memory);
no_memory:
    iommu_fini(&engine->iommu);
no_iommu:
    free(engine);
    return rc;
}

static void close_ring(struct viommu_ring *ring)
{
    int *fds[] = {&ring->kick, &ring->call, &ring->err};

    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (*fds[i] >= 0)
            (void)close(*fds[i]);
        *fds[i] = -1;
    }
}

void viommu_engine_free(struct viommu_engine *engine)
{
    struct viommu_vfio_user *user;

    if (engine == NULL)
        return;
    for (user = engine->vfio_users; user != NULL; user = user->next)
        viommu_vfio_user_disconnect(user); /* relays wake the worker, and the worker waits for what they bring */
    worker_stop(&engine->worker);
    for (uint32_t i = 0; i < VIOMMU_QUEUES; i++) {
        if (engine->worker.queues[i].ring.size != 0)
            close_ring(&engine->worker.queues[i].ring);
    }
    iommu_fini(&engine->iommu);
    while ((user = engine->vfio_users) != NULL) {
        engine->vfio_users = user->next;
        vfio_user_free(user);
    }
    engine_free_host(engine);
    recording_free(engine->worker.taps.recording);
    records_free(engine->worker.records);
    fault_queue_free(engine->worker.faults);
    player_free(engine->player);
    guest_memory_free(engine->memory);
    dirty_log_unmap(&engine->log);
    shared_map_close(&engine->inflight_map);
    free(engine);
}

int viommu_engine_add_endpoints(struct viommu_engine *engine, uint32_t first, uint32_t last,
                                const struct viommu_reserved *reserved, size_t count)
{
    int rc;

    engine_quiesce(engine);
    rc = iommu_add_endpoints(&engine->iommu, first, last, reserved, count, stage2_none());
    engine_resume(engine);
    return rc;
}

/* Any thread, for an endpoint that exists. */
static int queue_fault(struct viommu_engine *engine, uint32_t endpoint, uint32_t reason, uint32_t flags,
                       uint64_t address)
{
    struct fault fault = {endpoint, reason, flags, address, 0};
    struct timespec time;
    int rc;

    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    fault.raised_ns = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    rc = fault_raise(engine->worker.faults, &fault);
    if (rc != -ENOBUFS)
        worker_wake(&engine->worker);
    return rc == -ENOSPC ? -ENOBUFS : rc;
}

static void raise_fault(void *context, uint32_t endpoint, enum fault_reason reason, uint32_t flags, uint64_t address)
{
    (void)queue_fault(context, endpoint, reason, flags, address);
}

int viommu_vfio_user_new(struct viommu_engine *engine, const struct viommu_vfio_user_settings *settings,
                         const struct viommu_reserved *reserved, size_t count, struct viommu_vfio_user **out)
{
    const struct vfio_user_faults faults = {.raise = raise_fault, .context = engine};
    struct viommu_vfio_user *user;
    int rc = vfio_user_new(settings, &faults, &user);

    if (rc != 0)
        return rc;
    engine_quiesce(engine);
    rc = iommu_add_endpoints(&engine->iommu, settings->endpoint, settings->endpoint, reserved, count, &user->stage2);
    engine_resume(engine);
    if (rc != 0) {
        vfio_user_free(user);
        return rc;
    }
    user->next = engine->vfio_users;
    engine->vfio_users = user;
    *out = user;
    return 0;
}

/* ------------------------------------------------------------------------------------------------------- memory */

/*
 * Point a running queue at the memory as it is now. It keeps its place; what it cannot find any more breaks it.
 * The worker is parked.
 */
static void relocate(struct viommu_engine *engine, uint32_t index)
{
    struct worker_queue *queue = &engine->worker.queues[index];
    struct virtqueue before = queue->vq;
    struct viommu_ring ring = queue->ring;

    if (!queue->running)
        return;
    ring.base = virtqueue_base(&before);
    if (virtqueue_init(&queue->vq, &ring, queue->features, engine->memory, before.inflight) == 0) {
        queue->vq.next_used = before.next_used;
        queue->vq.signalled = before.signalled;
        return;
    }
    queue->vq = before;
    queue->vq.memory = engine->memory;
    queue->base = ring.base;
    queue->running = false;
    queue->vq.broken = VIOMMU_BROKEN_ADDRESS;
    worker_broken(&engine->worker, index);
}

int viommu_engine_set_memory(struct viommu_engine *engine, struct viommu_region *const *regions, size_t count)
{
    struct guest_memory *memory, *before = engine->memory;
    int rc = guest_memory_new(regions, count, &memory);

    if (rc != 0)
        return rc;
    engine_quiesce(engine);
    worker_flush(&engine->worker);
    rc = iommu_set_memory(&engine->iommu, memory);
    if (rc == 0) {
        memory->log = before->log;
        memory->inflight = before->inflight;
        engine->memory = memory;
        engine->worker.memory = memory;
        guest_memory_guard(memory);
        for (uint32_t i = 0; i < VIOMMU_QUEUES; i++)
            relocate(engine, i);
        engine_note_memory(engine);
    }
    engine_resume(engine);
    guest_memory_free(rc == 0 ? before : memory);
    return rc;
}

int viommu_engine_set_log(struct viommu_engine *engine, int fd, uint64_t size, uint64_t offset)
{
    struct dirty_log log = {0}, before = engine->log;
    int rc = fd < 0 ? 0 : dirty_log_map(fd, size, offset, &log);

    if (rc != 0)
        return rc;
    engine_quiesce(engine);
    engine->log = log;
    engine->memory->log = engine->logging && log.map.start != NULL ? &engine->log : NULL;
    engine_resume(engine);
    dirty_log_unmap(&before);
    return 0;
}

void viommu_engine_set_logging(struct viommu_engine *engine, bool on)
{
    engine_quiesce(engine);
    engine->logging = on;
    engine->memory->log = on && engine->log.map.start != NULL ? &engine->log : NULL;
    engine_resume(engine);
}

/* ------------------------------------------------------------------------------------------------------- queues */

int viommu_engine_set_features(struct viommu_engine *engine, uint64_t features)
{
    if ((features & ~engine->iommu.settings.features) != 0)
        return -EINVAL;
    engine_quiesce(engine);
    iommu_set_features(&engine->iommu, features);
    engine_note(engine, VIOMMU_RECORDED_FEATURES, features);
    engine_resume(engine);
    return 0;
}

static int duplicate(int fd, int *out)
{
    *out = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return fd >= 0 && *out < 0 ? -errno : 0;
}

/*
 * An eventfd that the worker writes. It must not have to wait when nobody reads it: the front-end's own flag, which
 * any sane one sets itself.
 */
static int duplicate_signal(int fd, int *out)
{
    int rc = duplicate(fd, out);
    int flags = rc == 0 && *out >= 0 ? fcntl(*out, F_GETFL) : -1;

    if (flags >= 0 && (flags & O_NONBLOCK) == 0)
        (void)fcntl(*out, F_SETFL, flags | O_NONBLOCK);
    return rc;
}

/* The in-flight memory of one queue, or NULL. */
static struct inflight *inflight_of(struct viommu_engine *engine, uint32_t index, uint32_t size)
{
    struct inflight *inflight = &engine->worker.queues[index].inflight;

    if (engine->inflight == NULL || index >= engine->inflight_queues || size > engine->inflight_queue_size ||
        (engine->iommu.features & VIRTIO_F_RING_PACKED) != 0)
        return NULL;
    inflight_init(inflight, engine->inflight + index * inflight_queue_bytes(engine->inflight_queue_size), size);
    return inflight;
}

int viommu_queue_start(struct viommu_engine *engine, uint32_t index, const struct viommu_ring *ring)
{
    struct worker_queue *queue;
    struct viommu_ring mine = *ring;
    struct virtqueue vq;
    int rc;

    if (index >= VIOMMU_QUEUES || ring->kick < 0)
        return -EINVAL;
    queue = &engine->worker.queues[index];
    if (queue->ring.size != 0)
        return -EBUSY;
    mine.kick = mine.call = mine.err = -1;
    if ((rc = duplicate(ring->kick, &mine.kick)) != 0 || (rc = duplicate_signal(ring->call, &mine.call)) != 0 ||
        (rc = duplicate_signal(ring->err, &mine.err)) != 0)
        goto fail;
    engine_quiesce(engine);
    rc = virtqueue_init(&vq, ring, engine->iommu.features, engine->memory, inflight_of(engine, index, ring->size));
    if (rc == 0) {
        queue->ring = mine;
        rc = worker_watch(&engine->worker, index);
        if (rc == 0) {
            queue->vq = vq;
            queue->base = ring->base;
            queue->features = engine->iommu.features;
            queue->running = true;
            virtqueue_want_kick(&queue->vq, false); /* the worker looks for itself before it first sleeps */
        } else {
            queue->ring = (struct viommu_ring){0};
        }
    }
    engine_resume(engine);
    if (rc == 0)
        return 0;
fail:
    close_ring(&mine);
    return rc;
}

int viommu_queue_stop(struct viommu_engine *engine, uint32_t index, uint32_t *base)
{
    struct worker_queue *queue;

    if (index >= VIOMMU_QUEUES)
        return -EINVAL;
    queue = &engine->worker.queues[index];
    if (queue->ring.size != 0) {
        engine_quiesce(engine);
        worker_flush(&engine->worker);
        if (queue->running)
            virtqueue_want_kick(&queue->vq, true); /* leave the ring as a driver expects it of a device that sleeps */
        queue->base = virtqueue_base(&queue->vq);
        queue->running = false;
        worker_unwatch(&engine->worker, index);
        engine_resume(engine);
        close_ring(&queue->ring);
        memset(&queue->ring, 0, sizeof(queue->ring));
    }
    *base = queue->base;
    return 0;
}

static int replace_fd(struct viommu_engine *engine, uint32_t index, int fd, bool call)
{
    struct worker_queue *queue;
    int mine, before, rc;

    if (index >= VIOMMU_QUEUES)
        return -EINVAL;
    queue = &engine->worker.queues[index];
    if (queue->ring.size == 0)
        return -ENOENT;
    rc = duplicate_signal(fd, &mine);
    if (rc != 0)
        return rc;
    engine_quiesce(engine);
    before = call ? queue->ring.call : queue->ring.err;
    if (call)
        queue->ring.call = mine;
    else
        queue->ring.err = mine;
    engine_resume(engine);
    if (before >= 0)
        (void)close(before);
    return 0;
}

int viommu_queue_set_call(struct viommu_engine *engine, uint32_t queue, int fd)
{
    return replace_fd(engine, queue, fd, true);
}

int viommu_queue_set_err(struct viommu_engine *engine, uint32_t queue, int fd)
{
    return replace_fd(engine, queue, fd, false);
}

int viommu_queue_set_log(struct viommu_engine *engine, uint32_t index, bool logged, uint64_t log_addr)
{
    struct worker_queue *queue;

    if (index >= VIOMMU_QUEUES)
        return -EINVAL;
    queue = &engine->worker.queues[index];
    engine_quiesce(engine);
    queue->ring.logged = queue->vq.logged = logged;
    queue->ring.log_addr = queue->vq.log_addr = log_addr;
    engine_resume(engine);
    return 0;
}

int viommu_queue_looks_used(struct viommu_engine *engine, const struct viommu_ring *ring)
{
    struct virtqueue vq;
    int rc;

    guest_memory_guard(engine->memory);
    rc = virtqueue_init(&vq, ring, engine->iommu.features, engine->memory, NULL);
    if (rc == 0)
        rc = virtqueue_looks_used(&vq);
    guest_memory_guard(NULL);
    return rc;
}

uint64_t viommu_inflight_size(uint32_t queues, uint32_t queue_size)
{
    return queues * inflight_queue_bytes(queue_size);
}

int viommu_engine_set_inflight(struct viommu_engine *engine, int fd, uint64_t size, uint64_t offset, uint32_t queues,
                               uint32_t queue_size)
{
    struct shared_map map = {0};
    uint8_t *region = NULL;
    int rc;

    for (uint32_t i = 0; i < VIOMMU_QUEUES; i++) {
        if (engine->worker.queues[i].ring.size != 0)
            return -EBUSY;
    }
    if (fd >= 0) {
        if (queues > VIOMMU_QUEUES || queue_size > VIOMMU_MAX_QUEUE_SIZE ||
            size < viommu_inflight_size(queues, queue_size))
            return -EINVAL;
        rc = shared_map_open(fd, size, offset, &map, &region);
        if (rc != 0)
            return rc;
    }
    engine_quiesce(engine);
    shared_map_close(&engine->inflight_map);
    engine->inflight_map = map;
    engine->memory->inflight = map.start != NULL ? &engine->inflight_map : NULL;
    engine_resume(engine);
    engine->inflight = region;
    engine->inflight_queues = queues;
    engine->inflight_queue_size = queue_size;
    return 0;
}

/* ------------------------------------------------------------------------------------------------------- device */

void viommu_engine_reset(struct viommu_engine *engine)
{
    engine_quiesce(engine);
    iommu_reset(&engine->iommu);
    fault_clear(engine->worker.faults);
    if (engine->inflight != NULL) /* a request that broke its ring must not be done again after the reset */
        memset(engine->inflight, 0, viommu_inflight_size(engine->inflight_queues, engine->inflight_queue_size));
    engine->worker.needs_reset = false;
    engine_note(engine, VIOMMU_RECORDED_RESET, 0);
    engine_resume(engine);
}

bool viommu_engine_bypass(struct viommu_engine *engine)
{
    return engine->iommu.bypass;
}

int viommu_engine_set_bypass(struct viommu_engine *engine, bool bypass)
{
    engine_quiesce(engine);
    iommu_set_bypass(&engine->iommu, bypass);
    engine_note(engine, VIOMMU_RECORDED_BYPASS, bypass);
    engine_resume(engine);
    return 0;
}

bool viommu_engine_needs_reset(struct viommu_engine *engine)
{
    return engine->worker.needs_reset;
}

int viommu_engine_fault(struct viommu_engine *engine, uint32_t endpoint, uint32_t reason, uint32_t flags,
                        uint64_t address)
{
    /* Endpoints are added before anything runs, so that another thread may look them up here. */
    return iommu_profile(&engine->iommu, endpoint) != NULL ? queue_fault(engine, endpoint, reason, flags, address)
                                                           : -ENOENT;
}

void viommu_engine_stats(struct viommu_engine *engine, struct viommu_stats *out)
{
    /* Word by word: each is written whole, and may be newer than the one before. */
    const uint64_t *from = (const uint64_t *)&engine->stats;
    uint64_t *to = (uint64_t *)out;

    _Static_assert(sizeof(*out) % sizeof(uint64_t) == 0, "stats are words");
    for (size_t i = 0; i < sizeof(*out) / sizeof(uint64_t); i++)
        to[i] = count_get(&from[i]);
    out->faults_dropped = fault_dropped(engine->worker.faults);
}

int viommu_engine_record_fd(struct viommu_engine *engine)
{
    return records_fd(engine->worker.records);
}

size_t viommu_engine_take_records(struct viommu_engine *engine, struct viommu_record *out, size_t max, uint64_t *lost)
{
    return records_take(engine->worker.records, out, max, lost);
}
