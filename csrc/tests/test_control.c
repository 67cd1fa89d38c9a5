/*
 * Looking at a running engine and steering it: service times, listings, pauses, limits, misbehaviour on demand, the
 * recording of requests and their replay; and that a front-end which makes the worker wait does not stop any of it.
 */
#include <fcntl.h>

#include "machine.h"
#include "recording.h"
#include "service_time.h"

#define BASIC (TEST_FEATURES & ~(VIRTIO_F_RING_PACKED | VIRTIO_F_IN_ORDER))

static void begin_with(struct machine *machine, uint64_t features, uint32_t time_every)
{
    struct viommu_settings settings = test_settings();

    settings.time_every = time_every;
    machine_init(machine, &settings, features, 64);
    machine_start(machine);
}

static void begin(struct machine *machine)
{
    begin_with(machine, BASIC, 0);
}

/* Whether nothing is answered for a while. */
static bool silent(const struct machine *machine, uint64_t ns)
{
    uint64_t until = check_now_ns() + ns;
    const struct driver *driver = &machine->driver[VIOMMU_REQUESTQ];

    while (check_now_ns() < until) {
        struct driver look = *driver;
        uint32_t id, len;

        if (driver_used(&look, &id, &len))
            return false;
        (void)sched_yield();
    }
    return true;
}

/* Offer a MAP and kick, without waiting. Returns where its status is. */
static uint64_t offer_map(struct machine *machine, uint32_t domain, uint64_t page)
{
    uint16_t offered = machine->driver[VIOMMU_REQUESTQ].avail_idx;
    uint8_t in[36] = {REQUEST_MAP};
    uint64_t tail;

    le32_put(in + 4, domain);
    le64_put(in + 8, page << 12);
    le64_put(in + 16, (page << 12) + 0xfff);
    le64_put(in + 24, GUEST_GPA);
    le32_put(in + 32, 3);
    tail = machine_offer(machine, in, sizeof(in), 4);
    machine_kick(machine, VIOMMU_REQUESTQ, offered);
    return tail;
}

/* ------------------------------------------------------------------------------------------------ service times */

/* The formula of viommu.h: every bucket begins where it says, and the one before ends there. */
static void test_buckets(void)
{
    for (unsigned i = 4; i < VIOMMU_TIME_BUCKETS; i++) {
        uint64_t from = (uint64_t)(4 + i % 4) << (i / 4 - 1);

        CHECK_EQ(service_time_bucket(from), i);
        CHECK_EQ(service_time_bucket(from - 1), i - 1);
    }
    CHECK_EQ(service_time_bucket(0), 0);
    CHECK_EQ(service_time_bucket(UINT64_MAX), VIOMMU_TIME_BUCKETS - 1);
}

static uint64_t timed(const struct machine *machine, uint64_t *sum_ns)
{
    uint64_t counts[VIOMMU_TIME_BUCKETS], total = 0;

    viommu_engine_service_times(machine->engine, counts, sum_ns);
    for (size_t i = 0; i < VIOMMU_TIME_BUCKETS; i++)
        total += counts[i];
    return total;
}

/* All are timed, one in four, none: as the settings say. */
static void test_service_times(void)
{
    const uint32_t every[] = {1, 4, 0};

    for (size_t i = 0; i < 3; i++) {
        struct machine machine;
        uint64_t sum_ns = 0;

        begin_with(&machine, BASIC, every[i]);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        for (uint64_t page = 1; page < 40; page++)
            CHECK_EQ(machine_map(&machine, 1, page), STATUS_OK);
        /* the last answer is seen before it is counted */
        CHECK_SOON(timed(&machine, &sum_ns) == (every[i] == 0 ? 0 : 40 / every[i]));
        CHECK((sum_ns != 0) == (every[i] != 0));
        machine_fini(&machine);
    }
}

/* ----------------------------------------------------------------------------------------------------- listings */

struct hammer {
    struct machine *machine;
    atomic_bool stop;
    _Atomic uint64_t done;
};

/* A driver that maps and unmaps one page above all others, until told to stop. */
static void *hammer(void *arg)
{
    struct hammer *h = arg;

    while (!atomic_load(&h->stop)) {
        CHECK_EQ(machine_map(h->machine, 1, 1u << 20), STATUS_OK);
        CHECK_EQ(machine_unmap(h->machine, 1, 1u << 20), STATUS_OK);
        h->done++;
    }
    return NULL;
}

/* A guest at work is listed page by page: each mapping that stays is there once, in order, in every listing. */
static void test_listing_a_busy_guest(void)
{
    struct machine machine;
    struct hammer h = {.machine = &machine};
    struct viommu_mapping_info page[7];
    struct viommu_endpoint_info endpoints[4];
    struct viommu_domain_info domains[4];
    pthread_t thread;
    uint64_t gpa;

    begin(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 5), STATUS_OK);
    for (uint64_t i = 0; i < 100; i++)
        CHECK_EQ(machine_map(&machine, 1, 2 * i), STATUS_OK);
    CHECK_EQ(pthread_create(&thread, NULL, hammer, &h), 0);
    for (unsigned round = 0; round < 50 || atomic_load(&h.done) == 0; round++) {
        uint64_t from = 0, seen = 0;
        int64_t count;

        do {
            count = viommu_engine_mappings(machine.engine, 1, from, page, 7);
            CHECK(count >= 0 && count <= 7);
            for (int64_t i = 0; i < count; i++) {
                if (page[i].first >> 12 == 1u << 20)
                    continue;
                CHECK_EQ(page[i].first >> 12, 2 * seen);
                CHECK_EQ(page[i].flags, 3);
                seen++;
            }
            if (count != 0)
                from = page[count - 1].last + 1;
        } while (count == 7);
        CHECK_EQ(seen, 100);
        CHECK_EQ(viommu_engine_endpoints(machine.engine, 0, endpoints, 4), 1);
        CHECK(endpoints[0].id == 5 && endpoints[0].attached && endpoints[0].domain == 1 && !endpoints[0].bypass);
        CHECK_EQ(viommu_engine_domains(machine.engine, 0, domains, 4), 1);
        CHECK(domains[0].id == 1 && domains[0].endpoints == 1 && domains[0].mappings >= 100);
        CHECK_EQ(viommu_engine_translate(machine.engine, 5, 0x4321, VIOMMU_ACCESS_READ, &gpa), 0);
        CHECK_EQ(gpa, GUEST_GPA + 0x321);
    }
    CHECK_EQ(viommu_engine_mappings(machine.engine, 2, 0, page, 7), -ENOENT);
    atomic_store(&h.stop, true);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    machine_fini(&machine);
}

/* ----------------------------------------------------------------------------------------------------- steering */

/* A lower limit refuses what is new and keeps what is there. */
static void test_limits(void)
{
    struct machine machine;

    begin(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    for (uint64_t page = 0; page < 10; page++)
        CHECK_EQ(machine_map(&machine, 1, page), STATUS_OK);
    CHECK_EQ(viommu_engine_set_limits(machine.engine, 1, 1, 5, 5), 0);
    CHECK_EQ(machine_map(&machine, 1, 10), STATUS_NOMEM);
    CHECK_EQ(machine_attach(&machine, 2, 2), STATUS_NOMEM);
    CHECK_EQ(machine_stats(&machine).mappings, 10);
    CHECK_EQ(viommu_engine_set_limits(machine.engine, 2, 2, 11, 11), 0);
    CHECK_EQ(machine_map(&machine, 1, 10), STATUS_OK);
    CHECK_EQ(machine_attach(&machine, 2, 2), STATUS_OK);
    CHECK_EQ(viommu_engine_set_limits(machine.engine, 2, 0, 11, 11), -EINVAL);
    machine_fini(&machine);
}

/* Paused, nothing is served and the worker sleeps; the control plane works; afterwards everything is answered. */
static void test_pause(void)
{
    struct machine machine;
    struct viommu_mapping_info page[4];
    uint32_t base;

    begin(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    viommu_engine_pause(machine.engine, true);
    CHECK(viommu_engine_paused(machine.engine));
    (void)offer_map(&machine, 1, 7);
    CHECK(silent(&machine, 50000000));
    CHECK_SOON(machine_stats(&machine).asleep);
    CHECK_EQ(viommu_engine_mappings(machine.engine, 1, 0, page, 4), 0);
    (void)machine_post(&machine, 24);
    CHECK_EQ(viommu_engine_fault(machine.engine, 1, 2, 0x101, 0x1000), 0); /* reports are no requests */
    CHECK_EQ(machine_wait(&machine, VIOMMU_EVENTQ), 24);
    viommu_engine_pause(machine.engine, false);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
    CHECK_EQ(viommu_engine_mappings(machine.engine, 1, 0, page, 4), 1);
    /* stopped while it is paused, and still paused when it runs again */
    viommu_engine_pause(machine.engine, true);
    CHECK_EQ(viommu_queue_stop(machine.engine, 0, &base), 0);
    machine.ring[0].base = base;
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &machine.ring[0]), 0);
    (void)offer_map(&machine, 1, 8);
    CHECK(silent(&machine, 50000000));
    viommu_engine_pause(machine.engine, false);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
    machine_fini(&machine);
}

/* --------------------------------------------------------------------------------------------------- injections */

static int inject(struct machine *machine, struct viommu_injection rule)
{
    return viommu_engine_inject(machine->engine, &rule);
}

/* A status in place of the request's own: so often, for those that match, and the request is not carried out. */
static void test_inject_status(void)
{
    struct machine machine;
    struct viommu_injection armed[4];

    begin(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    CHECK_EQ(machine_attach(&machine, 2, 2), STATUS_OK);
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_STATUS, .type = REQUEST_MAP,
                                                        .status = STATUS_DEVERR, .domain = 2, .match_domain = true,
                                                        .count = 2}), 0);
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_STATUS, .status = STATUS_NOMEM,
                                                        .endpoint = 3, .match_endpoint = true, .count = 1}), 0);
    CHECK_EQ(machine_map(&machine, 1, 1), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 2, 1), STATUS_DEVERR);
    CHECK_EQ(viommu_engine_injections(machine.engine, armed, 4), 2);
    CHECK(armed[0].count == 1 && armed[1].count == 1 && armed[1].endpoint == 3);
    CHECK_EQ(machine_unmap(&machine, 2, 1), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 2, 1), STATUS_DEVERR);
    CHECK_EQ(machine_stats(&machine).mappings, 1);
    CHECK_EQ(machine_map(&machine, 2, 1), STATUS_OK);
    CHECK_EQ(machine_attach(&machine, 3, 3), STATUS_NOMEM);
    CHECK_EQ(machine_attach(&machine, 3, 3), STATUS_OK);
    CHECK_EQ(viommu_engine_injections(machine.engine, armed, 4), 0);
    /* an OK for something that never happened, and a buffer that comes back unwritten */
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_STATUS, .count = 1}), 0);
    CHECK_EQ(machine_map(&machine, 9, 1), STATUS_OK);
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_STATUS,
                                                        .status = VIOMMU_STATUS_UNANSWERED, .count = 1}), 0);
    {
        uint64_t tail = offer_map(&machine, 1, 2);

        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 0);
        CHECK_EQ(*guest_at(&machine.guest, tail), 0xa5);
    }
    machine_fini(&machine);
}

/* An answer comes late, not before everything in front of it; the control plane is not held up; stopping shows it. */
static void test_inject_delay(void)
{
    const uint64_t delays[] = {100000, 80000000};
    struct machine machine;
    uint32_t base, id, len;
    uint64_t began;

    begin(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    for (size_t i = 0; i < 2; i++) {
        CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_DELAY, .type = REQUEST_MAP,
                                                            .delay_ns = delays[i], .count = 1}), 0);
        began = check_now_ns();
        CHECK_EQ(machine_map(&machine, 1, 10 + i), STATUS_OK);
        CHECK(check_now_ns() - began >= delays[i]);
        CHECK_EQ(machine_map(&machine, 1, 20 + i), STATUS_OK);
    }
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_DELAY, .count = 1,
                                                        .delay_ns = VIOMMU_INJECT_DELAY_MAX}), 0);
    (void)offer_map(&machine, 1, 30);
    (void)offer_map(&machine, 1, 31);
    CHECK_SOON(machine_stats(&machine).mappings == 5); /* carried out, not answered; the next is not even looked at */
    CHECK(silent(&machine, 20000000));
    CHECK_EQ(viommu_queue_stop(machine.engine, 0, &base), 0);
    CHECK(driver_used(&machine.driver[0], &id, &len) && len == 4);
    CHECK(!driver_used(&machine.driver[0], &id, &len));
    machine.ring[0].base = base;
    CHECK_EQ(viommu_queue_start(machine.engine, 0, &machine.ring[0]), 0);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
    /* taken back: what is held up is answered */
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_DELAY, .count = 1,
                                                        .delay_ns = VIOMMU_INJECT_DELAY_MAX}), 0);
    (void)offer_map(&machine, 1, 32);
    CHECK_SOON(machine_stats(&machine).mappings == 7);
    viommu_engine_clear_injections(machine.engine);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
    machine_fini(&machine);
}

/* An answer that never comes, on both kinds of ring; those after it do. */
static void test_inject_drop(void)
{
    const uint64_t kinds[] = {BASIC, (TEST_FEATURES & ~VIRTIO_F_IN_ORDER)};

    for (size_t kind = 0; kind < 2; kind++) {
        struct machine machine;
        uint64_t lost, tail;

        begin_with(&machine, kinds[kind], 0);
        CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
        CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_DROP, .count = 1}), 0);
        lost = offer_map(&machine, 1, 1);
        CHECK_SOON(machine_stats(&machine).requests[REQUEST_MAP][VIOMMU_STATUS_UNANSWERED] == 1);
        tail = offer_map(&machine, 1, 2);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
        CHECK_EQ(*guest_at(&machine.guest, tail), STATUS_OK);
        CHECK_EQ(*guest_at(&machine.guest, lost), 0xa5);
        CHECK_EQ(machine_stats(&machine).mappings, 2);
        machine_fini(&machine);
    }
}

/* Rules that say nothing sensible are refused, and so is one too many. */
static void test_inject_refused(void)
{
    const struct viommu_injection bad[] = {
        {.action = 0, .count = 1},
        {.action = VIOMMU_INJECT_HANG + 1, .count = 1},
        {.action = VIOMMU_INJECT_DROP, .count = 0},
        {.action = VIOMMU_INJECT_DROP, .count = 1, .type = VIOMMU_REQUEST_TYPES},
        {.action = VIOMMU_INJECT_DROP, .count = 1, .delay_ns = 1},
        {.action = VIOMMU_INJECT_DROP, .count = 1, .status = 1},
        {.action = VIOMMU_INJECT_DELAY, .count = 1},
        {.action = VIOMMU_INJECT_DELAY, .count = 1, .delay_ns = VIOMMU_INJECT_DELAY_MAX + 1},
        {.action = VIOMMU_INJECT_STATUS, .count = 1, .status = VIOMMU_STATUS_UNANSWERED + 1},
    };
    struct machine machine;

    begin(&machine);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        CHECK_EQ(inject(&machine, bad[i]), -EINVAL);
    for (unsigned i = 0; i < VIOMMU_INJECTIONS; i++)
        CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_DROP, .count = 1}), 0);
    CHECK_EQ(inject(&machine, (struct viommu_injection){.action = VIOMMU_INJECT_DROP, .count = 1}), -ENOSPC);
    viommu_engine_clear_injections(machine.engine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    machine_fini(&machine);
}

/* ---------------------------------------------------------------------------------------------------- recording */

/* What was recorded, played to another engine, is answered as it was and leaves the same behind. */
static void test_record_and_play(void)
{
    static struct viommu_recorded entries[256];
    static uint8_t statuses[256];
    struct machine machine, other;
    struct viommu_settings settings = test_settings();
    struct viommu_stats before, after;
    uint8_t unknown[8] = {77};
    uint64_t lost;
    size_t count;

    begin(&machine);
    CHECK_EQ(viommu_engine_take_recorded(machine.engine, entries, 256, &lost), 0);
    CHECK_EQ(viommu_engine_record(machine.engine, true), 0);
    CHECK_EQ(viommu_engine_record(machine.engine, true), -EALREADY);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    for (uint64_t page = 0; page < 50; page++)
        CHECK_EQ(machine_map(&machine, 1, page), STATUS_OK);
    CHECK_EQ(machine_map(&machine, 1, 3), STATUS_INVAL);
    CHECK_EQ(machine_unmap(&machine, 1, 3), STATUS_OK);
    CHECK_EQ(machine_attach(&machine, 2, 99), STATUS_NOENT);
    (void)machine_offer(&machine, unknown, sizeof(unknown), 4);
    fd_kick(machine.ring[0].kick);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 0);
    (void)machine_offer(&machine, unknown, 2, 4); /* shorter than a head */
    fd_kick(machine.ring[0].kick);
    CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 0);
    CHECK_EQ(viommu_engine_set_bypass(machine.engine, true), 0);
    count = viommu_engine_take_recorded(machine.engine, entries, 256, &lost);
    CHECK_EQ(count, 3 + 56 + 1); /* as it stood when recording began; requests; the bypass */
    CHECK_EQ(lost, 0);
    CHECK_EQ(entries[0].kind, VIOMMU_RECORDED_FEATURES);
    CHECK_EQ(le64_get(entries[0].bytes), BASIC);
    CHECK_EQ(entries[1].kind, VIOMMU_RECORDED_BYPASS);
    CHECK_EQ(entries[2].kind, VIOMMU_RECORDED_MEMORY);
    CHECK(entries[3].kind == REQUEST_ATTACH && entries[3].readable == 20 && entries[3].writable == 4);
    for (size_t i = 1; i < count; i++)
        CHECK(entries[i].time_ns >= entries[i - 1].time_ns && entries[i].lost == 0);
    before = machine_stats(&machine);

    CHECK_EQ(viommu_engine_new(&settings, &other.engine), 0);
    CHECK_EQ(viommu_engine_add_endpoints(other.engine, 1, 16, NULL, 0), 0);
    CHECK_EQ(viommu_engine_play(other.engine, entries, count, statuses), 0);
    for (size_t i = 0; i < count; i++)
        CHECK_EQ(statuses[i], entries[i].status);
    after = machine_stats(&other);
    CHECK_EQ(after.mappings, before.mappings);
    CHECK_EQ(after.endpoints, before.endpoints);
    CHECK(viommu_engine_bypass(other.engine));
    entries[0] = (struct viommu_recorded){.kind = VIOMMU_RECORDED_RESET};
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), 0);
    CHECK_EQ(machine_stats(&other).mappings, 0);
    entries[0] = (struct viommu_recorded){.kind = VIOMMU_RECORDED_MEMORY}; /* none, so that nothing can be mapped */
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), 0);
    CHECK_EQ(viommu_engine_play(other.engine, entries + 3, 2, statuses), 0);
    CHECK(statuses[0] == STATUS_OK && statuses[1] == STATUS_FAULT);
    /* what nothing can have recorded is refused */
    entries[0] = (struct viommu_recorded){.kind = VIOMMU_RECORDED_MEMORY, .readable = 20, .bytes = {[15] = 0xff}};
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), -EINVAL);
    entries[0] = (struct viommu_recorded){.kind = 0x7f};
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), -EINVAL);
    entries[0] = (struct viommu_recorded){.kind = REQUEST_MAP, .readable = VIOMMU_RECORDED_BYTES + 1};
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), -EINVAL);
    entries[0] = (struct viommu_recorded){.kind = VIOMMU_RECORDED_FEATURES, .bytes = {[7] = 0xff}};
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), -EINVAL);
    entries[0] = (struct viommu_recorded){.kind = REQUEST_MAP, .readable = 36, .writable = UINT32_MAX,
                                          .bytes = {REQUEST_MAP}};
    CHECK_EQ(viommu_engine_play(other.engine, entries, 1, statuses), 0);
    CHECK_EQ(statuses[0], VIOMMU_STATUS_UNANSWERED);
    viommu_engine_free(other.engine);

    CHECK_EQ(viommu_engine_record(machine.engine, false), 0);
    CHECK_EQ(machine_map(&machine, 1, 60), STATUS_OK);
    CHECK_EQ(viommu_engine_take_recorded(machine.engine, entries, 256, &lost), 0);
    machine_fini(&machine);
}

/* A reader that does not come: the ring takes no more, and every entry that is missing is told, where it is. */
static void test_recording_overflows(void)
{
    static struct viommu_recorded entries[4096];
    struct recording *recording = recording_new();
    uint64_t put = 0, taken = 0, told = 0, lost, state = 88;

    CHECK(recording != NULL);
    for (unsigned round = 0; round < 60; round++) {
        uint64_t burst = check_random(&state) % 8192;
        size_t count;

        for (uint64_t i = 0; i < burst; i++, put++) {
            struct viommu_recorded entry = {.kind = REQUEST_MAP, .readable = 8};

            le64_put(entry.bytes, put);
            recording_put(recording, &entry);
        }
        count = recording_take(recording, entries, check_random(&state) % 4096, &lost);
        for (size_t i = 0; i < count; i++) {
            told += entries[i].lost;
            CHECK_EQ(le64_get(entries[i].bytes), taken + told); /* the gap is just before it */
            taken++;
        }
    }
    for (size_t count = 1; count != 0;) {
        count = recording_take(recording, entries, 4096, &lost);
        for (size_t i = 0; i < count; i++)
            told += entries[i].lost;
        taken += count;
    }
    CHECK(told + lost != 0);
    CHECK_EQ(taken + told + lost, put);
    recording_free(recording);
}

/* ---------------------------------------------------------------------------------------------- a stuck front-end */

/* A front-end makes the worker wait in a write to its eventfd: parking it interrupts that. */
static void test_blocking_call_is_interrupted(void)
{
    uint64_t full = UINT64_MAX - 1;
    struct machine machine;
    struct viommu_mapping_info page;
    uint32_t base;

    begin(&machine);
    CHECK_EQ(machine_attach(&machine, 1, 1), STATUS_OK);
    (void)fd_take(machine.ring[0].call);
    CHECK(write(machine.ring[0].call, &full, sizeof(full)) == sizeof(full));
    CHECK(fcntl(machine.ring[0].call, F_SETFL, 0) == 0); /* the engine made it non-blocking: so what */
    le16_put(guest_at(&machine.guest, machine.driver[0].avail) + 4 + 2 * 64, machine.driver[0].used_idx);
    for (unsigned round = 0; round < 3; round++) {
        uint64_t wanted = machine_stats(&machine).notifications + 1;

        le16_put(guest_at(&machine.guest, machine.driver[0].avail) + 4 + 2 * 64, machine.driver[0].used_idx);
        (void)offer_map(&machine, 1, round);
        CHECK_SOON(machine_stats(&machine).notifications == wanted);
        CHECK_EQ(viommu_engine_mappings(machine.engine, 1, 0, &page, 1), 1);
        CHECK_EQ(machine_wait(&machine, VIOMMU_REQUESTQ), 4);
    }
    CHECK_EQ(viommu_queue_stop(machine.engine, 0, &base), 0);
    machine_fini(&machine);
}

int main(void)
{
    RUN(test_buckets);
    RUN(test_service_times);
    RUN(test_listing_a_busy_guest);
    RUN(test_limits);
    RUN(test_pause);
    RUN(test_inject_status);
    RUN(test_inject_delay);
    RUN(test_inject_drop);
    RUN(test_inject_refused);
    RUN(test_record_and_play);
    RUN(test_recording_overflows);
    RUN(test_blocking_call_is_interrupted);
    return 0;
}
