/*
 * The engine through its public face only: a guest in a memfd, rings and eventfds. Kick to used for every kind of
 * ring, waking and sleeping, stop and start, memory that changes and that goes away, faults, records, listings,
 * the log, in-flight recovery; and threads of the guest that never pause while the control plane does all of it.
 */
#include "machine.h"

#define BASIC (TEST_FEATURES & ~(VIRTIO_F_RING_PACKED | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC | \
                                 VIRTIO_F_IN_ORDER))

/* Every kind of ring a driver can ask for. */
static const uint64_t kinds[] = {
    BASIC,
    BASIC | VIRTIO_RING_F_EVENT_IDX,
    BASIC | VIRTIO_RING_F_INDIRECT_DESC,
    BASIC | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_IN_ORDER,
    BASIC | VIRTIO_F_RING_PACKED,
    BASIC | VIRTIO_F_RING_PACKED | VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_IN_ORDER,
    BASIC | VIRTIO_F_RING_PACKED | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX,
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

static void begin(struct machine *machine, uint64_t features, uint32_t size)
{
    struct viommu_settings settings = test_settings();

    machine_init(machine, &settings, features, size);
    machine_start(machine);
}

/* What a driver asks of interrupts: none while it polls. */
static void want_interrupts(struct machine *machine, uint32_t queue, bool want)
{
    struct driver *driver = &machine->driver[queue];
    uint8_t *avail = guest_at(&machine->guest, driver->avail);
    bool event_idx = (machine->features & VIRTIO_RING_F_EVENT_IDX) != 0;

    if (driver->packed)
        shared16_put(avail + 2, want ? 0 : 1, __ATOMIC_SEQ_CST);
    else if (event_idx)
        shared16_put(avail + 4 + 2 * driver->size, (uint16_t)(want ? driver->used_idx : driver->used_idx - 1),
                     __ATOMIC_SEQ_CST);
    else
        shared16_put(avail, want ? 0 : 1, __ATOMIC_SEQ_CST);
}

/* ------------------------------------------------------------------------------------------------------ settings */

/* Settings that contradict each other make no engine. */
static void test_settings_refused(void)
{
    struct viommu_settings settings;
    struct viommu_engine *engine = NULL;

#define REFUSED(change)                                              \
    do {                                                             \
        settings = test_settings();                                  \
        settings.change;                                             \
        CHECK_EQ(viommu_engine_new(&settings, &engine), -EINVAL);    \
        CHECK(engine == NULL);                                       \
    } while (0)
    /* rule: R-CONF-1 */
    REFUSED(page_size_mask = 0);
    REFUSED(input_first = (settings.input_last = 0xfff, 0x1000));
    REFUSED(domain_first = (settings.domain_last = 5, 6));
    REFUSED(probe_size = 4097);
    REFUSED(personality = 3);
    REFUSED(bypass = 2);
    REFUSED(max_faults = 0);
    REFUSED(fault_rate = 0);
    REFUSED(fault_burst = 0);
    /* rule: R-FEAT-3 */
    REFUSED(features |= VIRTIO_IOMMU_F_BYPASS);
#undef REFUSED
    CHECK_EQ(viommu_abi_version(), VIOMMU_ABI);
    viommu_engine_free(NULL);
}

/* Features that were not offered are refused, and the queues that are no queues. */
static void test_arguments_refused(void)
{
    struct machine machine;
    struct viommu_settings settings = test_settings();
    struct viommu_ring ring;
    uint32_t base;

    settings.features &= ~VIRTIO_F_RING_PACKED;
    machine_init(&machine, &settings, BASIC, 8);
    CHECK_EQ(viommu_engine_set_features(machine.engine, BASIC | VIRTIO_F_RING_PACKED), -EINVAL);
    CHECK_EQ(viommu_queue_start(machine.engine, 2, &machine.ring[0]), -EINVAL);
    CHECK_EQ(viommu_queue_stop(machine.engine, 2, &base), -EINVAL);
    CHECK_EQ(viommu_queue_stop(machine.engine, UINT32_MAX, &base), -EINVAL);
    CHECK_EQ(viommu_queue_set_call(machine.engine, 2, -1), -EINVAL);
    CHECK_EQ(viommu_queue_set_call(machine.engine, 0, -1), -ENOENT);
    CHECK_EQ(viommu_queue_set_log(machine.engine, 2, true, 0), -EINVAL);
    ring = machine.ring[0];
    ring.kick = -1;
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &ring), -EINVAL);
    ring = machine.ring[0];
    ring.desc = 0;
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &ring), -EFAULT);
    ring = machine.ring[0];
    ring.kick = machine.guest.fd; /* not a thing that can be waited for */
    CHECK(viommu_queue_start(machine.engine, 0, &ring) < 0);
    ring = machine.ring[0];
    ring.call = 9999;
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &ring), -EBADF);
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &machine.ring[0]), 0);
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &machine.ring[0]), -EBUSY);
    CHECK_EQ(viommu_engine_set_inflight(machine.engine, machine.guest.fd, 1u << 20, 0, 2, 8), -EBUSY);
    CHECK_EQ(viommu_queue_set_call(machine.engine, 0, 9999), -EBADF);
    machine_fini(&machine);
}

/* ---------------------------------------------------------------------------------------------------- kick to used */

/* rule: R-Q-NOTE-1 */
/* rule: R-Q-NOTE-2 */
/* From a sleeping worker, one request at a time and in bursts, each kind of ring, past the wrap of its indices. */
static void test_kick_to_used(void)
{
    for (size_t kind = 0; kind < KINDS; kind++) {
        struct machine machine;
        uint8_t in[36] = {REQUEST_MAP};
        uint64_t state = kind + 1, done = 0;
        struct viommu_stats stats;

        begin(&machine, kinds[kind], 64);
        want_interrupts(&machine, VIOMMU_REQUESTQ, true);
        CHECK_SOON(machine_stats(&machine).asleep);
        CHECK_EQ(machine_attach(&machine, 5, 1), STATUS_OK);
        CHECK_SOON(fd_take(machine.ring[0].call) == 1);
        le32_put(in + 4, 5);
        le32_put(in + 32, 3);
        while (done < 70000) {
            unsigned most = (unsigned)(machine.indirect ? machine.driver[0].free : machine.driver[0].free / 2);
            unsigned burst = (unsigned)(check_random(&state) % most) + 1;
            uint16_t offered = machine.driver[0].avail_idx;
            uint64_t tails[64];

            for (unsigned i = 0; i < burst; i++) { /* map and unmap by turns */
                uint64_t page = (done + i) / 2 % 1000;

                in[0] = (done + i) % 2 == 0 ? REQUEST_MAP : REQUEST_UNMAP;
                le64_put(in + 8, page << 12);
                le64_put(in + 16, (page << 12) + 0xfff);
                le64_put(in + 24, GUEST_GPA);
                tails[i] = machine_offer(&machine, in, in[0] == REQUEST_MAP ? 36 : 28, 4);
            }
            machine_kick(&machine, VIOMMU_REQUESTQ, offered);
            for (unsigned i = 0; i < burst; i++) {
                CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
                CHECK_EQ(le32_get(guest_at(&machine.guest, tails[i])), STATUS_OK);
            }
            done += burst;
        }
        CHECK_SOON(machine_stats(&machine).asleep);
        stats = machine_stats(&machine);
        CHECK_EQ(stats.requests[REQUEST_MAP][STATUS_OK] + stats.requests[REQUEST_UNMAP][STATUS_OK], done);
        CHECK_EQ(stats.mappings, done % 2);
        CHECK_EQ(stats.rings_broken, 0);
        CHECK(!viommu_engine_needs_reset(machine.engine));
        CHECK(!fd_readable(machine.ring[0].err));
        machine_fini(&machine);
    }
}

/* rule: H7 */
/* Several requests of several types in one batch do not touch each other (QEMU's device once mixed them up). */
static void test_mixed_batch(void)
{
    struct machine machine;
    uint8_t probe[72] = {REQUEST_PROBE}, map[36] = {REQUEST_MAP}, unknown[20] = {0x7f}, attach[20] = {REQUEST_ATTACH};
    uint64_t at[6];

    begin(&machine, BASIC, 64);
    le32_put(attach + 4, 1);
    le32_put(attach + 8, 3);
    le32_put(probe + 4, 3);
    le32_put(map + 4, 1);
    le64_put(map + 16, 0xfff);
    le64_put(map + 24, GUEST_GPA);
    for (unsigned round = 0; round < 100; round++) {
        uint16_t offered = machine.driver[0].avail_idx;

        at[0] = machine_offer(&machine, attach, 20, 4);
        at[1] = machine_offer(&machine, probe, 72, 516);
        at[2] = machine_offer(&machine, map, 36, 4);
        at[3] = machine_offer(&machine, unknown, 20, 4);
        at[4] = machine_offer(&machine, map, 36, 4);
        at[5] = machine_offer(&machine, map, 35, 4);
        machine_kick(&machine, VIOMMU_REQUESTQ, offered);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 516);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 0);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 0);
        CHECK_EQ(le32_get(guest_at(&machine.guest, at[0])), STATUS_OK);
        for (unsigned i = 0; i < 516; i++)
            CHECK_EQ(guest_at(&machine.guest, at[1])[i], 0);
        CHECK_EQ(le32_get(guest_at(&machine.guest, at[2])), STATUS_OK);
        CHECK_EQ(le32_get(guest_at(&machine.guest, at[3])), 0xa5a5a5a5);
        CHECK_EQ(le32_get(guest_at(&machine.guest, at[4])), STATUS_INVAL);
        CHECK_EQ(le32_get(guest_at(&machine.guest, at[5])), 0xa5a5a5a5);
    }
    machine_fini(&machine);
}

/* Whether the worker does nothing at all for a while: no round, no sleep begun, no time spent. */
static bool does_nothing(const struct machine *machine)
{
    struct timespec pause = {0, 50000000};
    struct viommu_stats before = machine_stats(machine), after;

    (void)nanosleep(&pause, NULL);
    after = machine_stats(machine);
    return after.asleep && memcmp(&before, &after, sizeof(before)) == 0;
}

/* Polling or not: the same answers; and in either case a worker whose guest is idle comes to rest. */
static void test_spin_and_idle(void)
{
    static const uint32_t spins[] = {0, 50, 2000};

    for (size_t i = 0; i < sizeof(spins) / sizeof(spins[0]); i++) {
        struct viommu_settings settings = test_settings();
        struct machine machine;

        settings.spin_us = spins[i];
        machine_init(&machine, &settings, BASIC | VIRTIO_RING_F_EVENT_IDX, 64);
        machine_start(&machine);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        for (uint64_t page = 0; page < 3000; page++)
            CHECK_EQ(machine_map(&machine, 1, page), STATUS_OK);
        CHECK_SOON(does_nothing(&machine));
        CHECK(spins[i] != 0 || machine_stats(&machine).spin_ns == 0);
        machine_fini(&machine);
    }
}

/* rule: H7 */
/* Kicks without a request change nothing; the worker looks and sleeps again. */
static void test_kick_storm(void)
{
    struct machine machine;
    struct viommu_stats stats;

    begin(&machine, BASIC | VIRTIO_RING_F_EVENT_IDX, 8);
    for (unsigned i = 0; i < 20000; i++) {
        fd_kick(machine.ring[i & 1].kick);
        if (i % 1000 == 0)
            CHECK_EQ(machine_attach(&machine, i, 1), STATUS_OK);
    }
    CHECK_SOON(machine_stats(&machine).asleep);
    stats = machine_stats(&machine);
    CHECK_EQ(stats.requests[REQUEST_ATTACH][STATUS_OK], 20);
    CHECK_EQ(stats.batches, 20);
    CHECK_EQ(stats.rings_broken, 0);
    machine_fini(&machine);
}

/* A kick eventfd that was signalled before the queue started is seen, and so is a request without any kick. */
static void test_kicked_before_start(void)
{
    for (unsigned kick = 0; kick < 2; kick++) {
        struct viommu_settings settings = test_settings();
        struct machine machine;
        uint8_t in[20] = {REQUEST_ATTACH};
        uint64_t tail;

        machine_init(&machine, &settings, BASIC, 8);
        le32_put(in + 8, 1);
        tail = machine_offer(&machine, in, 20, 4);
        if (kick != 0)
            fd_kick(machine.ring[0].kick);
        machine_start(&machine);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
        CHECK_EQ(le32_get(guest_at(&machine.guest, tail)), STATUS_OK);
        machine_fini(&machine);
    }
}

/* ----------------------------------------------------------------------------------------------- the guest thread */

/* A guest that maps and unmaps without pause until it is told to stop. */
struct sender {
    struct machine *machine;
    pthread_t thread;
    uint32_t stop;
    uint64_t rounds;
};

static void *send_forever(void *arg)
{
    struct sender *sender = arg;
    uint64_t rounds = 0;

    while (__atomic_load_n(&sender->stop, __ATOMIC_ACQUIRE) == 0) {
        CHECK_EQ(machine_map(sender->machine, 1, rounds % 512), STATUS_OK);
        CHECK_EQ(machine_unmap(sender->machine, 1, rounds % 512), STATUS_OK);
        __atomic_store_n(&sender->rounds, ++rounds, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void sender_start(struct sender *sender, struct machine *machine)
{
    memset(sender, 0, sizeof(*sender));
    sender->machine = machine;
    CHECK(pthread_create(&sender->thread, NULL, send_forever, sender) == 0);
    CHECK_SOON(__atomic_load_n(&sender->rounds, __ATOMIC_RELAXED) > 3);
}

/* Returns when the guest has done some more rounds. */
static void sender_progress(const struct sender *sender)
{
    uint64_t seen = __atomic_load_n(&sender->rounds, __ATOMIC_RELAXED);

    CHECK_SOON(__atomic_load_n(&sender->rounds, __ATOMIC_RELAXED) > seen + 1);
}

static void sender_stop(struct sender *sender)
{
    __atomic_store_n(&sender->stop, 1, __ATOMIC_RELEASE);
    CHECK(pthread_join(sender->thread, NULL) == 0);
}

/* rule: H11 */
/* The control plane looks and steers as fast as it can; the guest notices nothing. */
static void test_park_storm(void)
{
    for (size_t kind = 0; kind < KINDS; kind++) {
        struct machine machine;
        struct sender sender;

        begin(&machine, kinds[kind], 16);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        CHECK_EQ(machine_attach(&machine, 1, 2), STATUS_OK);
        sender_start(&sender, &machine);
        for (unsigned i = 0; i < 3000; i++) {
            struct viommu_endpoint_info endpoints[4];
            struct viommu_domain_info domains[4];
            struct viommu_mapping_info mappings[4];
            uint64_t gpa;

            CHECK_EQ(viommu_engine_endpoints(machine.engine, 0, endpoints, 4), 2);
            CHECK(endpoints[1].id == 2 && endpoints[1].attached && endpoints[1].domain == 1);
            CHECK_EQ(viommu_engine_domains(machine.engine, 0, domains, 4), 1);
            CHECK(domains[0].endpoints == 2 && domains[0].mappings <= 1);
            CHECK(viommu_engine_mappings(machine.engine, 1, 0, mappings, 4) <= 1);
            (void)viommu_engine_translate(machine.engine, 1, 0x5000, VIOMMU_ACCESS_READ, &gpa);
            CHECK_EQ(viommu_engine_set_bypass(machine.engine, i & 1), 0);
            CHECK_EQ(viommu_engine_bypass(machine.engine), i & 1);
            viommu_engine_set_logging(machine.engine, i & 1);
            CHECK(machine_stats(&machine).heartbeat != 0);
            if (i % 100 == 0)
                sender_progress(&sender);
        }
        sender_progress(&sender);
        sender_stop(&sender);
        machine_fini(&machine);
    }
}

/* rule: H11 */
/* Both queues stop and start 10 000 times under a guest that never pauses: no request is lost or done twice. */
static void test_stop_start_storm(void)
{
    static const size_t few[] = {1, 4, 6};
    const unsigned times = THREAD_SANITIZED ? 2000 : 10000;

    for (size_t k = 0; k < sizeof(few) / sizeof(few[0]); k++) {
        struct machine machine;
        struct sender sender;
        struct viommu_stats stats;
        unsigned fds;

        begin(&machine, kinds[few[k]], 16);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        sender_start(&sender, &machine);
        fds = open_fds();
        for (unsigned i = 0; i < times; i++) {
            for (uint32_t q = 0; q < VIOMMU_QUEUES; q++) {
                uint32_t base = UINT32_MAX, again = 0;

                CHECK_EQ(viommu_queue_stop(machine.engine, q, &base), 0);
                CHECK_EQ(viommu_queue_stop(machine.engine, q, &again), 0);
                CHECK_EQ(again, base);
                machine.ring[q].base = base;
                CHECK_EQ(viommu_queue_start(machine.engine, q, &machine.ring[q]), 0);
            }
            if (i % 500 == 0)
                sender_progress(&sender);
        }
        sender_progress(&sender);
        CHECK_EQ(open_fds(), fds);
        sender_stop(&sender);
        stats = machine_stats(&machine);
        CHECK_EQ(stats.requests[REQUEST_MAP][STATUS_OK], sender.rounds);
        CHECK_EQ(stats.requests[REQUEST_UNMAP][STATUS_OK], sender.rounds);
        CHECK_EQ(stats.rings_broken, 0);
        machine_fini(&machine);
    }
}

/* rule: H3 */
/* Memory is exchanged under a guest that never pauses: the same file mapped anew, more regions, fewer. */
static void test_memory_swap(void)
{
    static const size_t few[] = {0, 3, 6};

    for (size_t k = 0; k < sizeof(few) / sizeof(few[0]); k++) {
        struct machine machine;
        struct sender sender;
        unsigned maps;
        int other = memfd_create("other", MFD_CLOEXEC);

        CHECK(ftruncate(other, 1 << 20) == 0);
        begin(&machine, kinds[few[k]], 16);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        sender_start(&sender, &machine);
        maps = memfd_maps();
        for (unsigned i = 0; i < 1500; i++) {
            struct viommu_region *regions[2];

            CHECK_EQ(viommu_region_map(GUEST_GPA, MACHINE_BYTES, 0x10000, 0, machine.guest.fd, &regions[0]), 0);
            CHECK_EQ(viommu_region_map(i % 2 == 0 ? 0 : 1ull << 40, 1 << 20, 1ull << 41, 0, other, &regions[1]), 0);
            CHECK_EQ(viommu_engine_set_memory(machine.engine, regions, 1 + i / 2 % 2), 0);
            CHECK_EQ(viommu_engine_set_memory(machine.engine, (struct viommu_region *[]){regions[0], regions[0]}, 2),
                     -EINVAL);
            viommu_region_free(regions[0]);
            viommu_region_free(regions[1]);
            if (i % 100 == 0)
                sender_progress(&sender);
        }
        sender_progress(&sender);
        sender_stop(&sender);
        CHECK_EQ(viommu_engine_set_memory(machine.engine, &machine.guest.region, 1), 0);
        CHECK_EQ(memfd_maps(), maps);
        CHECK_EQ(machine_stats(&machine).rings_broken, 0);
        machine_fini(&machine);
        (void)close(other);
    }
}

/* rule: H2 */
/* The call eventfd is replaced 10 000 times under load: the last one works, and no descriptor is left behind. */
static void test_call_replaced(void)
{
    struct machine machine;
    struct sender sender;
    unsigned fds;

    begin(&machine, BASIC, 16);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    want_interrupts(&machine, VIOMMU_REQUESTQ, true);
    sender_start(&sender, &machine);
    fds = open_fds();
    for (unsigned i = 0; i < 10000; i++) {
        int call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

        CHECK_EQ(viommu_queue_set_call(machine.engine, VIOMMU_REQUESTQ, i % 3 == 0 ? -1 : call), 0);
        CHECK_EQ(viommu_queue_set_err(machine.engine, VIOMMU_REQUESTQ, call), 0);
        (void)close(call);
    }
    CHECK_EQ(viommu_queue_set_call(machine.engine, VIOMMU_REQUESTQ, machine.ring[0].call), 0);
    CHECK_EQ(viommu_queue_set_err(machine.engine, VIOMMU_REQUESTQ, machine.ring[0].err), 0);
    CHECK_EQ(open_fds(), fds);
    sender_progress(&sender);
    sender_stop(&sender);
    (void)fd_take(machine.ring[0].call);
    CHECK_EQ(machine_map(&machine, 1, 1), STATUS_OK);
    CHECK_SOON(fd_readable(machine.ring[0].call));
    machine_fini(&machine);
}

/* An engine with two queues full of work is freed: everything it had goes, and the guest's memory is left alone. */
static void test_free_while_busy(void)
{
    unsigned fds = open_fds(), maps = memfd_maps();

    for (unsigned round = 0; round < 200; round++) {
        struct machine machine;
        uint8_t in[20] = {REQUEST_ATTACH};

        begin(&machine, kinds[round % KINDS], 256);
        le32_put(in + 8, 1);
        for (unsigned i = 0; i < 120; i++)
            (void)machine_offer(&machine, in, 20, 4);
        for (unsigned i = 0; i < 20; i++)
            CHECK_EQ(viommu_engine_fault(machine.engine, 2, 1, 1, i), 0);
        fd_kick(machine.ring[0].kick);
        machine_fini(&machine);
    }
    CHECK_EQ(open_fds(), fds);
    CHECK_EQ(memfd_maps(), maps);
}

/* ------------------------------------------------------------------------------------------------------ bad rings */

/* rule: R-STAT-2 */
/* rule: H7 */
/* A broken ring: error eventfd, record, a reset wanted; the other queue goes on; after reset and start it serves. */
static void test_broken_ring(void)
{
    for (uint32_t bad = 0; bad < VIOMMU_QUEUES; bad++) {
        struct machine machine;
        struct viommu_record record;
        uint64_t lost;
        uint32_t base, id, len;

        begin(&machine, BASIC, 8);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        CHECK_EQ(viommu_engine_take_records(machine.engine, &record, 1, &lost), 1);
        CHECK_EQ(record.kind, VIOMMU_RECORD_ATTACHED);
        if (bad == VIOMMU_EVENTQ)
            CHECK_EQ(viommu_engine_fault(machine.engine, 1, 1, 1, 0), 0);
        driver_offer(&machine.driver[bad], 77);
        fd_kick(machine.ring[bad].kick);
        CHECK_SOON(fd_readable(machine.ring[bad].err));
        CHECK_SOON(viommu_engine_needs_reset(machine.engine));
        CHECK_EQ(machine_stats(&machine).rings_broken, 1);
        CHECK_SOON(fd_readable(viommu_engine_record_fd(machine.engine)));
        CHECK_EQ(viommu_engine_take_records(machine.engine, &record, 1, &lost), 1);
        CHECK(record.kind == VIOMMU_RECORD_BROKEN && record.type == bad && record.code == VIOMMU_BROKEN_HEAD);
        fd_kick(machine.ring[bad].kick);
        if (bad == VIOMMU_EVENTQ) {
            CHECK_EQ(machine_map(&machine, 1, 1), STATUS_OK);
        } else {
            (void)machine_post(&machine, 24);
            CHECK_EQ(viommu_engine_fault(machine.engine, 1, 1, 1, 0), 0);
            CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        }
        CHECK(!driver_used(&machine.driver[bad], &id, &len));
        CHECK_EQ(machine_stats(&machine).rings_broken, 1);
        /* the driver resets the device */
        for (uint32_t q = 0; q < VIOMMU_QUEUES; q++)
            CHECK_EQ(viommu_queue_stop(machine.engine, q, &base), 0);
        viommu_engine_reset(machine.engine);
        CHECK(!viommu_engine_needs_reset(machine.engine));
        machine_rings(&machine, 8);
        machine_start(&machine);
        CHECK_EQ(machine_map(&machine, 1, 1), STATUS_NOENT);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        (void)machine_post(&machine, 24);
        CHECK_EQ(viommu_engine_fault(machine.engine, 1, 1, 1, 0), 0);
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        machine_fini(&machine);
    }
}

/* rule: H3 */
/* The region with the rings is taken away: they are broken for their address; with it back they start again. */
static void test_memory_taken(void)
{
    for (size_t kind = 0; kind < KINDS; kind += 4) {
        struct machine machine;
        struct viommu_record records[4];
        uint64_t lost;
        uint32_t base;

        begin(&machine, kinds[kind], 8);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        CHECK_EQ(viommu_engine_set_memory(machine.engine, NULL, 0), 0);
        CHECK(fd_readable(machine.ring[0].err) && fd_readable(machine.ring[1].err));
        CHECK(viommu_engine_needs_reset(machine.engine));
        CHECK_EQ(viommu_engine_take_records(machine.engine, records, 4, &lost), 3);
        CHECK(records[1].kind == VIOMMU_RECORD_BROKEN && records[1].code == VIOMMU_BROKEN_ADDRESS);
        for (uint32_t q = 0; q < VIOMMU_QUEUES; q++)
            fd_kick(machine.ring[q].kick);
        CHECK_EQ(viommu_engine_set_memory(machine.engine, &machine.guest.region, 1), 0);
        for (uint32_t q = 0; q < VIOMMU_QUEUES; q++) {
            CHECK_EQ(viommu_queue_stop(machine.engine, q, &base), 0);
            machine.ring[q].base = base; /* it goes on where it was */
            CHECK_EQ(viommu_queue_start(machine.engine, q, &machine.ring[q]), 0);
        }
        CHECK_EQ(machine_map(&machine, 1, 1), STATUS_OK);
        machine_fini(&machine);
    }
}

/* rule: H5 */
/* Features that change under running queues are for the next start: a memory change does not turn the ring over. */
static void test_features_while_running(void)
{
    struct machine machine;

    begin(&machine, BASIC | VIRTIO_RING_F_EVENT_IDX, 8);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK_EQ(viommu_engine_set_features(machine.engine, BASIC | VIRTIO_F_RING_PACKED), 0);
    CHECK_EQ(viommu_engine_set_memory(machine.engine, &machine.guest.region, 1), 0);
    for (uint64_t page = 0; page < 100; page++)
        CHECK_EQ(machine_map(&machine, 1, page), STATUS_OK);
    CHECK_EQ(machine_stats(&machine).rings_broken, 0);
    machine_fini(&machine);
}

/* rule: H3 */
/* The file behind the rings shrinks: the process lives, the rings are broken for it, and new memory heals. */
static void test_memory_shrunk(void)
{
    struct machine machine;
    struct viommu_record records[4];
    uint64_t lost;
    uint32_t base;

    begin(&machine, BASIC, 8);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK_SOON(machine_stats(&machine).asleep);
    CHECK(ftruncate(machine.guest.fd, 0) == 0);
    fd_kick(machine.ring[0].kick);
    CHECK_SOON(fd_readable(machine.ring[0].err) && fd_readable(machine.ring[1].err));
    CHECK_EQ(viommu_engine_take_records(machine.engine, records, 4, &lost), 3);
    CHECK(records[1].kind == VIOMMU_RECORD_BROKEN && records[1].code == VIOMMU_BROKEN_MEMORY);
    CHECK(ftruncate(machine.guest.fd, MACHINE_BYTES) == 0);
    viommu_region_free(machine.guest.region);
    CHECK_EQ(viommu_region_map(GUEST_GPA, MACHINE_BYTES, 0, 0, machine.guest.fd, &machine.guest.region), 0);
    for (uint32_t q = 0; q < VIOMMU_QUEUES; q++)
        CHECK_EQ(viommu_queue_stop(machine.engine, q, &base), 0);
    viommu_engine_reset(machine.engine);
    CHECK_EQ(viommu_engine_set_memory(machine.engine, &machine.guest.region, 1), 0);
    machine_rings(&machine, 8);
    machine_start(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    machine_fini(&machine);
}

/* rule: H3 */
/*
 * It shrinks when only the control plane looks at it: stopping a ring, starting one, asking whether it looks used.
 * With a second engine in the process, made later, used last, and freed first.
 */
static void test_memory_shrunk_under_control_plane(void)
{
    for (unsigned what = 0; what < 4; what++) {
        struct machine machine, other;
        uint32_t base;

        begin(&machine, BASIC, 8);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        CHECK_SOON(machine_stats(&machine).asleep);
        begin(&other, BASIC, 8);
        CHECK_EQ(machine_attach(&other, 1, 1), STATUS_OK);
        if (what == 1)
            machine_fini(&other);
        CHECK_EQ(viommu_queue_stop(machine.engine, 0, &base), 0); /* or the worker would be the first to touch it */
        CHECK(ftruncate(machine.guest.fd, 0) == 0);
        if (what == 2)
            (void)viommu_queue_looks_used(machine.engine, &machine.ring[0]);
        if (what == 3)
            (void)viommu_queue_start(machine.engine, 0, &machine.ring[0]);
        CHECK_EQ(viommu_queue_stop(machine.engine, 1, &base), 0);
        CHECK_EQ(viommu_queue_stop(machine.engine, 0, &base), 0);
        machine_fini(&machine);
        if (what != 1) {
            CHECK_EQ(machine_map(&other, 1, 1), STATUS_OK);
            machine_fini(&other);
        }
    }
}

/* rule: H2 */
/* A call eventfd that nobody drains and that would block: the worker does not wait for it. */
static void test_call_would_block(void)
{
    struct machine machine;
    struct viommu_settings settings = test_settings();
    uint64_t full = UINT64_MAX - 1;

    machine_init(&machine, &settings, BASIC, 8);
    (void)close(machine.ring[0].call);
    machine.ring[0].call = eventfd(0, EFD_CLOEXEC);
    CHECK(write(machine.ring[0].call, &full, sizeof(full)) == sizeof(full));
    machine_start(&machine);
    want_interrupts(&machine, VIOMMU_REQUESTQ, true);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 1, 1), STATUS_OK);
    machine_fini(&machine);
}

/* --------------------------------------------------------------------------------------------------------- faults */

/* rule: R-FAULT-1 */
/* rule: R-FAULT-5 */
/* rule: R-FAULT-7 */
/* rule: H9 */
/* Reports reach posted buffers in order; without a buffer they wait; a short or read-only buffer comes back empty. */
static void test_faults(void)
{
    for (size_t kind = 0; kind < KINDS; kind++) {
        struct machine machine;
        uint64_t at;

        begin(&machine, kinds[kind], 8);
        CHECK_EQ(viommu_engine_fault(machine.engine, 99, 1, 1, 0), -ENOENT);
        at = machine_post(&machine, 24);
        CHECK_EQ(viommu_engine_fault(machine.engine, 7, FAULT_MAPPING, 0x102, 0x123456789abcdef0), 0);
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        CHECK(memcmp(guest_at(&machine.guest, at),
                     "\x02\0\0\0\x02\x01\0\0\x07\0\0\0\0\0\0\0\xf0\xde\xbc\x9a\x78\x56\x34\x12", 24) == 0);
        /* no buffer yet */
        CHECK_EQ(viommu_engine_fault(machine.engine, 8, FAULT_DOMAIN, 1, 1), 0);
        CHECK_EQ(viommu_engine_fault(machine.engine, 9, FAULT_DOMAIN, 1, 1), 0);
        CHECK_SOON(machine_stats(&machine).asleep);
        at = machine_post(&machine, 8); /* too short */
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 0);
        CHECK_EQ(*guest_at(&machine.guest, at), 0xa5);
        {
            struct driver *driver = &machine.driver[VIOMMU_EVENTQ];
            uint16_t offered = driver->avail_idx;

            at = guest_alloc(&machine.guest, 64, 8);
            (void)driver_add(driver, &(struct piece){at, 64, false}, 1); /* not writable */
            machine_kick(&machine, VIOMMU_EVENTQ, offered);
            CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 0);
        }
        at = machine_post(&machine, 30);
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        CHECK_EQ(guest_at(&machine.guest, at)[8], 8);
        CHECK_EQ(guest_at(&machine.guest, at)[24], 0xa5);
        at = machine_post(&machine, 24);
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        CHECK_EQ(guest_at(&machine.guest, at)[8], 9);
        CHECK_EQ(machine_stats(&machine).faults_sent, 3);
        CHECK_EQ(machine_stats(&machine).faults_dropped, 0);
        /* a reset forgets what waits */
        CHECK_EQ(viommu_engine_fault(machine.engine, 10, FAULT_DOMAIN, 1, 1), 0);
        viommu_engine_reset(machine.engine);
        CHECK_EQ(viommu_engine_fault(machine.engine, 11, FAULT_DOMAIN, 1, 1), 0);
        at = machine_post(&machine, 24);
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        CHECK_EQ(guest_at(&machine.guest, at)[8], 11);
        machine_fini(&machine);
    }
}

/* rule: H9 */
/* A million reports without a buffer: a few wait, the rest are counted, and the guest's requests go on. */
static void test_fault_storm(void)
{
    struct viommu_settings settings = test_settings();
    struct machine machine;
    const unsigned storm = SANITIZED ? 200000 : 1000000;
    struct viommu_endpoint_info info[16];

    settings.max_faults = 5;
    machine_init(&machine, &settings, BASIC, 16);
    machine_start(&machine);
    for (unsigned i = 0; i < storm; i++) {
        int rc = viommu_engine_fault(machine.engine, 3, 2, 1, i);

        CHECK_EQ(rc, i < 5 ? 0 : -ENOBUFS);
        if (i % 10000 == 0)
            CHECK_EQ(machine_attach(&machine, 1, 3), STATUS_OK);
    }
    CHECK_EQ(machine_stats(&machine).faults_dropped, storm - 5);
    CHECK_EQ(viommu_engine_endpoints(machine.engine, 0, info, 16), 1);
    CHECK(info[0].id == 3 && info[0].faults == storm);
    for (unsigned i = 0; i < 5; i++) {
        uint64_t at = machine_post(&machine, 24);

        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        CHECK_EQ(guest_at(&machine.guest, at)[8], 3);
    }
    machine_fini(&machine);
}

static void *raise_forever(void *arg)
{
    struct sender *sender = arg;

    while (__atomic_load_n(&sender->stop, __ATOMIC_ACQUIRE) == 0) {
        if (viommu_engine_fault(sender->machine->engine, 4, 1, 1, sender->rounds) == 0)
            __atomic_store_n(&sender->rounds, sender->rounds + 1, __ATOMIC_RELAXED);
        else
            (void)sched_yield();
    }
    return NULL;
}

/* A thread that raises, one that takes records, a guest that sends and one that receives, at once. */
static void test_faults_under_load(void)
{
    struct machine machine;
    struct sender sender, raiser = {.machine = &machine};
    uint64_t got = 0, recorded = 0, lost, all_lost = 0;
    const uint64_t wanted = SANITIZED ? 5000 : 20000;

    begin(&machine, BASIC | VIRTIO_RING_F_EVENT_IDX, 16);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    sender_start(&sender, &machine);
    CHECK(pthread_create(&raiser.thread, NULL, raise_forever, &raiser) == 0);
    while (got < wanted) {
        struct viommu_record records[8];
        uint64_t next = machine.guest.next;
        size_t count;

        (void)machine_post(&machine, 24);
        machine.guest.next = next;
        CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
        got++;
        count = viommu_engine_take_records(machine.engine, records, 8, &lost);
        all_lost += lost;
        for (size_t i = 0; i < count; i++)
            recorded += records[i].kind == VIOMMU_RECORD_FAULT;
    }
    sender_stop(&raiser);
    sender_stop(&sender);
    for (;;) {
        struct viommu_record record;

        if (viommu_engine_take_records(machine.engine, &record, 1, &lost) == 0)
            break;
        all_lost += lost;
        recorded += record.kind == VIOMMU_RECORD_FAULT;
    }
    CHECK_EQ(machine_stats(&machine).faults_sent, got);
    CHECK_EQ(recorded + all_lost, got);
    machine_fini(&machine);
}

/* -------------------------------------------------------------------------------------------------------- records */

/* Refusals, attachments and detachments are recorded with what was asked; successes of the hot path are not. */
static void test_records(void)
{
    struct machine machine;
    struct viommu_record records[8];
    uint8_t in[36] = {0};
    uint64_t lost;

    begin(&machine, BASIC, 8);
    CHECK(!fd_readable(viommu_engine_record_fd(machine.engine)));
    CHECK_EQ(viommu_engine_take_records(machine.engine, records, 8, &lost), 0);
    CHECK_EQ(machine_attach(&machine, 4, 2), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 4, 7), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 4, 7), STATUS_INVAL);
    in[0] = 0x55;
    (void)machine_offer(&machine, in, 4, 4);
    fd_kick(machine.ring[0].kick);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 0);
    in[0] = REQUEST_DETACH;
    le32_put(in + 4, 4);
    le32_put(in + 8, 2);
    CHECK_EQ(machine_request(&machine, in, 20), STATUS_OK);
    CHECK_SOON(fd_readable(viommu_engine_record_fd(machine.engine)));
    CHECK_SOON(machine_stats(&machine).asleep);
    CHECK_EQ(viommu_engine_take_records(machine.engine, records, 8, &lost), 4);
    CHECK_EQ(lost, 0);
    CHECK(records[0].kind == VIOMMU_RECORD_ATTACHED && records[0].domain == 4 && records[0].endpoint == 2);
    CHECK(records[1].kind == VIOMMU_RECORD_REFUSED && records[1].type == REQUEST_MAP);
    CHECK(records[1].code == STATUS_INVAL && records[1].first == 0x7000 && records[1].last == 0x7fff);
    CHECK(records[2].kind == VIOMMU_RECORD_REFUSED && records[2].type == 0);
    CHECK_EQ(records[2].code, VIOMMU_STATUS_UNANSWERED);
    CHECK(records[3].kind == VIOMMU_RECORD_DETACHED && records[3].endpoint == 2);
    CHECK(!fd_readable(viommu_engine_record_fd(machine.engine)));
    CHECK_EQ(machine_stats(&machine).requests[0][VIOMMU_STATUS_UNANSWERED], 1);
    CHECK_EQ(machine_stats(&machine).requests[REQUEST_MAP][STATUS_INVAL], 1);
    /* a flood that nobody reads: bounded, and counted */
    for (unsigned i = 0; i < 3000; i++)
        CHECK_EQ(machine_map(&machine, 4, 7), STATUS_NOENT);
    {
        uint64_t taken = 0, all_lost = 0;
        size_t count;

        while ((count = viommu_engine_take_records(machine.engine, records, 8, &lost)) != 0 || lost != 0) {
            taken += count;
            all_lost += lost;
        }
        CHECK_EQ(taken + all_lost, 3000);
        CHECK(taken >= 8 && taken <= 1024);
    }
    CHECK(!fd_readable(viommu_engine_record_fd(machine.engine)));
    machine_fini(&machine);
}

/* ------------------------------------------------------------------------------------------------------- listings */

/* Pages of any size give every endpoint, domain and mapping once, in order, up to the top of each space. */
static void test_listings(void)
{
    for (size_t page = 1; page <= 9; page += 4) {
        struct machine machine;
        struct viommu_endpoint_info endpoints[9];
        struct viommu_domain_info domains[9];
        struct viommu_mapping_info mappings[9];
        uint8_t in[36] = {REQUEST_MAP};
        uint64_t seen = 0, from = 0;
        int64_t count;

        begin(&machine, BASIC, 8);
        CHECK_EQ(viommu_engine_add_endpoints(machine.engine, UINT32_MAX - 1, UINT32_MAX, NULL, 0), 0);
        CHECK_EQ(viommu_engine_add_endpoints(machine.engine, UINT32_MAX, UINT32_MAX, NULL, 0), -EEXIST);
        for (uint32_t i = 1; i <= 16; i++)
            CHECK_EQ(machine_attach(&machine, i * 3, i), STATUS_OK);
        CHECK_EQ(machine_attach(&machine, UINT32_MAX, UINT32_MAX), STATUS_OK);
        for (uint64_t i = 0; i < 20; i++)
            CHECK_EQ(machine_map(&machine, 3, 2 * i), STATUS_OK);
        le32_put(in + 4, 3);
        le64_put(in + 8, UINT64_MAX - 0xfff);
        le64_put(in + 16, UINT64_MAX);
        le64_put(in + 24, GUEST_GPA + 0x1000);
        CHECK_EQ(machine_request(&machine, in, 36), STATUS_OK);

        while (from <= UINT32_MAX) {
            size_t got = viommu_engine_endpoints(machine.engine, (uint32_t)from, endpoints, page);

            for (size_t i = 0; i < got; i++) {
                CHECK_EQ(endpoints[i].id, ++seen <= 16 ? seen : UINT32_MAX);
                CHECK(endpoints[i].attached);
            }
            if (got < page)
                break;
            from = (uint64_t)endpoints[got - 1].id + 1;
        }
        CHECK_EQ(seen, 17);
        seen = from = 0;
        while (from <= UINT32_MAX) {
            size_t got = viommu_engine_domains(machine.engine, (uint32_t)from, domains, page);

            for (size_t i = 0; i < got; i++) {
                CHECK_EQ(domains[i].id, ++seen <= 16 ? 3 * seen : UINT32_MAX);
                CHECK_EQ(domains[i].mappings, domains[i].id == 3 ? 21 : 0);
            }
            if (got < page)
                break;
            from = (uint64_t)domains[got - 1].id + 1;
        }
        CHECK_EQ(seen, 17);
        seen = from = 0;
        do {
            count = viommu_engine_mappings(machine.engine, 3, from, mappings, page);
            for (int64_t i = 0; i < count; i++)
                CHECK_EQ(mappings[i].first, ++seen <= 20 ? (seen - 1) << 13 : UINT64_MAX - 0xfff);
            from = count > 0 ? mappings[count - 1].last + 1 : 0;
        } while (count == (int64_t)page && from != 0);
        CHECK_EQ(seen, 21);
        CHECK_EQ(viommu_engine_mappings(machine.engine, 4, 0, mappings, page), -ENOENT);
        CHECK_EQ(viommu_engine_mappings(machine.engine, 3, 0, mappings, 0), 0);
        CHECK_EQ(viommu_engine_endpoints(machine.engine, 0, endpoints, 0), 0);
        CHECK_EQ(viommu_engine_domains(machine.engine, 0, domains, 0), 0);
        machine_fini(&machine);
    }
}

/* ------------------------------------------------------------------------------------------ log, in-flight, reset */

/* What the engine writes for one request is marked: answer and used ring; nothing before the log is on or after. */
static void test_dirty_log(void)
{
    struct machine machine;
    struct viommu_settings settings = test_settings();
    uint8_t bits[4096];
    const uint64_t bytes = (GUEST_GPA + MACHINE_BYTES) / 4096 / 8, first = GUEST_GPA / 4096 / 8;
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint64_t tail;
    uint8_t in[20] = {REQUEST_ATTACH};

    CHECK(ftruncate(fd, (off_t)bytes) == 0);
    machine_init(&machine, &settings, BASIC, 8);
    machine.ring[0].logged = true;
    machine.ring[0].log_addr = machine.driver[0].used;
    machine_start(&machine);
    CHECK_EQ(viommu_engine_set_log(machine.engine, fd, bytes, 0), 0);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK(pread(fd, bits, MACHINE_BYTES / 4096 / 8, (off_t)first) == MACHINE_BYTES / 4096 / 8);
    for (unsigned i = 0; i < MACHINE_BYTES / 4096 / 8; i++)
        CHECK_EQ(bits[i], 0);
    viommu_engine_set_logging(machine.engine, true);
    le32_put(in + 8, 1);
    tail = machine_offer(&machine, in, 20, 4);
    machine_kick(&machine, 0, (uint16_t)(machine.driver[0].avail_idx - 1));
    CHECK_EQ(machine_wait(&machine, 0), 4);
    CHECK_SOON(machine_stats(&machine).asleep);
    CHECK(pread(fd, bits, MACHINE_BYTES / 4096 / 8, (off_t)first) == MACHINE_BYTES / 4096 / 8);
    for (uint64_t page = 0; page < MACHINE_BYTES / 4096; page++) {
        bool wanted = page == (tail - GUEST_GPA) / 4096 || page == (machine.driver[0].used - GUEST_GPA) / 4096;

        CHECK_EQ((bits[page / 8] >> page % 8) & 1, wanted);
    }
    /* through a change of memory */
    CHECK_EQ(viommu_engine_set_memory(machine.engine, &machine.guest.region, 1), 0);
    memset(bits, 0, sizeof(bits));
    CHECK(pwrite(fd, bits, MACHINE_BYTES / 4096 / 8, (off_t)first) == MACHINE_BYTES / 4096 / 8);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK(pread(fd, bits, 1, (off_t)(first + (machine.driver[0].used - GUEST_GPA) / 4096 / 8)) == 1);
    CHECK(bits[0] != 0);
    CHECK_EQ(viommu_engine_set_log(machine.engine, -1, 0, 0), 0);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    /* a log whose file shrinks */
    CHECK_EQ(viommu_engine_set_log(machine.engine, fd, bytes, 0), 0);
    CHECK(ftruncate(fd, 0) == 0);
    (void)machine_offer(&machine, in, 20, 4);
    fd_kick(machine.ring[0].kick);
    CHECK_SOON(fd_readable(machine.ring[0].err));
    machine_fini(&machine);
    (void)close(fd);
}

static struct machine *with_inflight(struct machine *machine, int fd)
{
    struct viommu_settings settings = test_settings();

    machine_init(machine, &settings, BASIC, 8);
    CHECK_EQ(viommu_engine_set_inflight(machine->engine, fd, viommu_inflight_size(2, 8), 0, 2, 8), 0);
    return machine;
}

/* A process that dies with two requests taken and one given back but not told: the next one does exactly the two. */
static void test_inflight(void)
{
    struct machine machine;
    uint8_t in[20] = {REQUEST_ATTACH}, header[16 + 8 * 16] = {0};
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    uint64_t tails[4];
    uint8_t *used;

    CHECK(ftruncate(fd, (off_t)viommu_inflight_size(2, 8)) == 0);
    (void)with_inflight(&machine, fd);
    le32_put(in + 8, 1);
    for (unsigned i = 0; i < 4; i++) { /* heads 0, 2, 4, 6 */
        le32_put(in + 4, i);
        tails[i] = machine_offer(&machine, in, 20, 4);
    }
    /* what the dead process left: 0 was used and published, 4 and 2 were taken in this order, 6 was not */
    used = guest_at(&machine.guest, machine.driver[0].used);
    le32_put(used + 4, 0);
    le32_put(used + 8, 4);
    shared16_put(used + 2, 1, __ATOMIC_RELEASE);
    le16_put(header + 8, 1);
    le16_put(header + 10, 8);
    le16_put(header + 12, 0); /* last batch: head 0 */
    le16_put(header + 14, 0); /* the used index it had seen: head 0 is not cleared yet */
    header[16 + 16 * 0] = 1;
    le64_put(header + 16 + 16 * 0 + 8, 10);
    header[16 + 16 * 4] = 1;
    le64_put(header + 16 + 16 * 4 + 8, 11);
    header[16 + 16 * 2] = 1;
    le64_put(header + 16 + 16 * 2 + 8, 12);
    CHECK(pwrite(fd, header, sizeof(header), 0) == sizeof(header));
    machine.ring[0].base = 1; /* what a front-end would take from the used ring */
    machine_start(&machine);
    {
        uint32_t id, len;

        CHECK(driver_used(&machine.driver[0], &id, &len) && id == 0);
    }
    for (unsigned i = 0; i < 3; i++) {
        static const uint32_t order[] = {4, 2, 6};
        uint32_t id = 99, len = 99;

        CHECK_SOON(driver_used(&machine.driver[0], &id, &len));
        CHECK_EQ(id, order[i]);
        CHECK_EQ(len, 4);
    }
    CHECK_EQ(le32_get(guest_at(&machine.guest, tails[0])), 0xa5a5a5a5); /* not done again */
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK_SOON(machine_stats(&machine).asleep);
    CHECK(pread(fd, header, sizeof(header), 0) == sizeof(header));
    for (unsigned i = 0; i < 8; i++)
        CHECK_EQ(header[16 + 16 * i], 0);
    CHECK_EQ(le16_get(header + 14), 5);
    /* a change of memory in between changes nothing */
    CHECK_EQ(viommu_engine_set_memory(machine.engine, &machine.guest.region, 1), 0);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    machine_fini(&machine);
    (void)close(fd);
}

/* rule: H3 */
/* An in-flight file that is too small is refused; one that shrinks breaks the rings, and the process lives. */
static void test_inflight_shrunk(void)
{
    struct machine machine;
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    uint8_t in[20] = {REQUEST_ATTACH};

    CHECK(ftruncate(fd, (off_t)viommu_inflight_size(2, 8)) == 0);
    (void)with_inflight(&machine, fd);
    CHECK_EQ(viommu_engine_set_inflight(machine.engine, fd, viommu_inflight_size(2, 8) - 1, 0, 2, 8), -EINVAL);
    CHECK_EQ(viommu_engine_set_inflight(machine.engine, fd, viommu_inflight_size(2, 8), 64, 2, 8), -ENXIO);
    CHECK_EQ(viommu_engine_set_inflight(machine.engine, fd, 1u << 20, 0, 3, 8), -EINVAL);
    machine_start(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK(ftruncate(fd, 0) == 0);
    (void)machine_offer(&machine, in, 20, 4);
    fd_kick(machine.ring[0].kick);
    CHECK_SOON(fd_readable(machine.ring[0].err));
    machine_fini(&machine);
    (void)close(fd);
}

/* rule: R-INIT-1 */
/* rule: R-CONF-4 */
/* rule: R-CONF-6 */
/* A device reset: everything detached, config.bypass as it was, the queues still running. */
static void test_reset(void)
{
    struct machine machine;
    uint64_t gpa;

    begin(&machine, BASIC, 8);
    CHECK(!viommu_engine_bypass(machine.engine));
    CHECK_EQ(viommu_engine_translate(machine.engine, 1, 5, 1, &gpa), -ENXIO);
    CHECK_EQ(viommu_engine_set_bypass(machine.engine, true), 0);
    CHECK_EQ(viommu_engine_translate(machine.engine, 1, 5, 1, &gpa), 0);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 1, 1), STATUS_OK);
    CHECK_EQ(viommu_engine_translate(machine.engine, 1, 5, 1, &gpa), -EFAULT);
    viommu_engine_reset(machine.engine);
    CHECK(viommu_engine_bypass(machine.engine));
    CHECK_EQ(viommu_engine_translate(machine.engine, 1, 5, 1, &gpa), 0);
    CHECK_EQ(machine_map(&machine, 1, 1), STATUS_NOENT);
    CHECK_EQ(machine_stats(&machine).domains, 0);
    machine_fini(&machine);
}

/* Whether a stopped ring was used is seen from its memory. */
static void test_looks_used(void)
{
    for (size_t kind = 0; kind < KINDS; kind++) {
        struct viommu_settings settings = test_settings();
        struct machine machine;
        struct viommu_ring ring;
        uint32_t base;

        machine_init(&machine, &settings, kinds[kind], 8);
        CHECK_EQ(viommu_queue_looks_used(machine.engine, &machine.ring[0]), 0);
        machine_start(&machine);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        for (uint32_t q = 0; q < VIOMMU_QUEUES; q++)
            CHECK_EQ(viommu_queue_stop(machine.engine, q, &base), 0);
        CHECK_EQ(viommu_queue_looks_used(machine.engine, &machine.ring[0]), 1);
        CHECK_EQ(viommu_queue_looks_used(machine.engine, &machine.ring[1]), 0);
        ring = machine.ring[0];
        ring.used = 0;
        CHECK_EQ(viommu_queue_looks_used(machine.engine, &ring), -EFAULT);
        machine_fini(&machine);
    }
}

int main(void)
{
    unsigned fds = open_fds(), maps = memfd_maps();

    RUN(test_settings_refused);
    RUN(test_arguments_refused);
    RUN(test_kick_to_used);
    RUN(test_mixed_batch);
    RUN(test_spin_and_idle);
    RUN(test_kick_storm);
    RUN(test_kicked_before_start);
    RUN(test_park_storm);
    RUN(test_stop_start_storm);
    RUN(test_memory_swap);
    RUN(test_call_replaced);
    RUN(test_free_while_busy);
    RUN(test_broken_ring);
    RUN(test_memory_taken);
    RUN(test_features_while_running);
    RUN(test_memory_shrunk);
    RUN(test_memory_shrunk_under_control_plane);
    RUN(test_call_would_block);
    RUN(test_faults);
    RUN(test_fault_storm);
    RUN(test_faults_under_load);
    RUN(test_records);
    RUN(test_listings);
    RUN(test_dirty_log);
    RUN(test_inflight);
    RUN(test_inflight_shrunk);
    RUN(test_reset);
    RUN(test_looks_used);
    CHECK_EQ(open_fds(), fds);
    CHECK_EQ(memfd_maps(), maps);
    return 0;
}
