/*
 * The queue of fault reports: order, capacity, age, each endpoint's rate, and several threads that raise at once. Time
 * is given, not measured.
 */
#include "fault.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>

#include "check.h"
#include "settings.h"

#define MS 1000000ull
#define S 1000000000ull

static struct fault fault_at(uint32_t endpoint, uint64_t raised_ns)
{
    return (struct fault){.endpoint = endpoint, .reason = 1, .flags = 1, .address = raised_ns, .raised_ns = raised_ns};
}

static int raise_at(struct fault_queue *queue, uint32_t endpoint, uint64_t raised_ns)
{
    struct fault fault = fault_at(endpoint, raised_ns);

    return fault_raise(queue, &fault);
}

/* rule: R-FAULT-7 */
/* First in, first out; as many wait as the limit says, whatever power of two lies above it; indices may wrap. */
static void test_order_and_capacity(void)
{
    static const uint32_t limits[] = {1, 2, 5, 64};

    for (size_t i = 0; i < sizeof(limits) / sizeof(limits[0]); i++) {
        struct viommu_settings settings = test_settings();
        struct fault_queue *queue;
        struct fault fault;
        uint64_t now = S, next = 0, raised = 0;

        settings.max_faults = limits[i];
        queue = fault_queue_new(&settings);
        CHECK(queue != NULL && !fault_waiting(queue));
        CHECK(!fault_peek(queue, now, &fault));
        for (unsigned round = 0; round < 1000; round++) {
            uint64_t dropped = fault_dropped(queue);

            for (uint32_t j = 0; j < limits[i]; j++) {
                fault = fault_at(3, now);
                fault.address = raised++;
                CHECK_EQ(fault_raise(queue, &fault), 0);
            }
            CHECK_EQ(raise_at(queue, 3, now), -ENOSPC);
            CHECK_EQ(fault_dropped(queue), dropped + 1);
            for (uint32_t j = 0; j < limits[i]; j++) {
                CHECK(fault_waiting(queue));
                CHECK(fault_peek(queue, now, &fault));
                CHECK(fault_peek(queue, now, &fault)); /* it stays until it is done */
                CHECK_EQ(fault.address, next++);
                fault_done(queue);
            }
            CHECK(!fault_waiting(queue));
            now += S;
        }
        CHECK_EQ(fault_count(queue, 3), raised + 1000);
        CHECK_EQ(fault_count(queue, 4), 0);
        fault_queue_free(queue);
    }
    fault_queue_free(NULL);
}

/* rule: R-FAULT-7 */
/* A report that waited longer than it may is dropped and counted; one that is exactly that old is not. */
static void test_age(void)
{
    struct viommu_settings settings = test_settings();
    struct fault_queue *queue;
    struct fault fault;

    settings.fault_wait_ms = 100;
    queue = fault_queue_new(&settings);
    CHECK_EQ(raise_at(queue, 1, S), 0);
    CHECK_EQ(raise_at(queue, 2, S + 10 * MS), 0);
    CHECK_EQ(raise_at(queue, 3, S + 20 * MS), 0);
    CHECK(fault_peek(queue, S + 100 * MS, &fault));
    CHECK_EQ(fault.endpoint, 1);
    CHECK(fault_peek(queue, S + 100 * MS + 1, &fault));
    CHECK_EQ(fault.endpoint, 2);
    CHECK_EQ(fault_dropped(queue), 1);
    CHECK(!fault_peek(queue, S + 500 * MS, &fault));
    CHECK_EQ(fault_dropped(queue), 3);
    CHECK(!fault_waiting(queue));
    fault_queue_free(queue);
}

/* A report raised after the reader looked at its clock is new, not as old as time. */
static void test_younger_than_now(void)
{
    struct viommu_settings settings = test_settings();
    struct fault_queue *queue = fault_queue_new(&settings);
    struct fault fault;

    CHECK_EQ(raise_at(queue, 1, S + 1), 0);
    CHECK(fault_peek(queue, S, &fault));
    CHECK_EQ(fault_dropped(queue), 0);
    fault_queue_free(queue);
}

/* rule: H9 */
/* An endpoint has its burst, then its rate, and its silence is credited up to the burst; others are not touched. */
static void test_rate(void)
{
    struct viommu_settings settings = test_settings();
    struct fault_queue *queue;
    uint64_t now = S;

    settings.max_faults = 1000;
    settings.fault_burst = 4;
    settings.fault_rate = 10;
    queue = fault_queue_new(&settings);
    for (unsigned i = 0; i < 4; i++)
        CHECK_EQ(raise_at(queue, 1, now), 0);
    CHECK_EQ(raise_at(queue, 1, now), -ENOBUFS);
    CHECK_EQ(raise_at(queue, 2, now), 0);
    CHECK_EQ(raise_at(queue, 1, now + 100 * MS - 1), -ENOBUFS);
    CHECK_EQ(raise_at(queue, 1, now + 100 * MS), 0);
    CHECK_EQ(raise_at(queue, 1, now + 100 * MS), -ENOBUFS);
    now += 3600 * S; /* a long silence: no more than a burst */
    for (unsigned i = 0; i < 4; i++)
        CHECK_EQ(raise_at(queue, 1, now), 0);
    CHECK_EQ(raise_at(queue, 1, now), -ENOBUFS);
    {
        unsigned passed = 0; /* ten seconds of storm: a hundred pass */

        for (unsigned ms = 1; ms <= 10000; ms++)
            passed += raise_at(queue, 1, now + ms * MS) == 0;
        CHECK_EQ(passed, 100);
    }
    fault_queue_free(queue);
}

/* Threads that take the time one after the other may raise in the other order: that is no silence of centuries. */
static void test_rate_when_time_goes_back(void)
{
    struct viommu_settings settings = test_settings();
    struct fault_queue *queue;

    settings.fault_burst = 2;
    settings.fault_rate = 1;
    queue = fault_queue_new(&settings);
    CHECK_EQ(raise_at(queue, 1, 10 * S), 0);
    CHECK_EQ(raise_at(queue, 1, 10 * S), 0);
    CHECK_EQ(raise_at(queue, 1, 10 * S - 1), -ENOBUFS);
    CHECK_EQ(raise_at(queue, 1, 10 * S), -ENOBUFS);
    CHECK_EQ(raise_at(queue, 1, 11 * S), 0);
    CHECK_EQ(raise_at(queue, 1, 9 * S), -ENOBUFS);
    CHECK_EQ(raise_at(queue, 1, 11 * S), -ENOBUFS);
    fault_queue_free(queue);
}

/* rule: H9 */
/* More endpoints than may exist: memory stays bounded, the rest is dropped. */
static void test_many_endpoints(void)
{
    struct viommu_settings settings = test_settings();
    struct fault_queue *queue;

    settings.max_endpoints = 10;
    settings.max_faults = 1000;
    queue = fault_queue_new(&settings);
    for (uint32_t i = 0; i < 100; i++)
        CHECK_EQ(raise_at(queue, i, S), i < 10 ? 0 : -ENOBUFS);
    CHECK_EQ(raise_at(queue, 3, S), 0);
    CHECK_EQ(fault_dropped(queue), 90);
    fault_clear(queue); /* the endpoints of the driver before do not take the place of those of the next */
    CHECK_EQ(raise_at(queue, 99, S), 0);
    fault_queue_free(queue);
}

/* A reset forgets what waits, and what each endpoint has raised. */
static void test_clear(void)
{
    struct viommu_settings settings = test_settings();
    struct fault_queue *queue = fault_queue_new(&settings);
    struct fault fault;

    CHECK_EQ(raise_at(queue, 1, S), 0);
    CHECK_EQ(raise_at(queue, 2, S), 0);
    fault_clear(queue);
    CHECK(!fault_waiting(queue));
    CHECK_EQ(raise_at(queue, 3, S), 0);
    CHECK(fault_peek(queue, S, &fault) && fault.endpoint == 3);
    CHECK_EQ(fault_count(queue, 1), 0);
    CHECK_EQ(fault_count(queue, 3), 1);
    fault_queue_free(queue);
}

struct producer {
    pthread_t thread;
    struct fault_queue *queue;
    uint32_t endpoint;
    uint64_t queued;
};

#define RAISED 20000u

static void *produce(void *arg)
{
    struct producer *producer = arg;

    for (unsigned i = 0; i < RAISED; i++) {
        struct fault fault = fault_at(producer->endpoint, S);

        fault.address = producer->queued;
        if (fault_raise(producer->queue, &fault) == 0)
            producer->queued++;
        else
            (void)sched_yield();
        (void)fault_count(producer->queue, 1);
    }
    return NULL;
}

/* Several threads raise while one takes: each one's reports arrive in its order, none twice, and all are accounted. */
static void test_producers(void)
{
    enum { PRODUCERS = 4 };
    struct viommu_settings settings = test_settings();
    struct producer producers[PRODUCERS];
    struct fault_queue *queue;
    uint64_t got[PRODUCERS] = {0}, all = 0, queued = 0;
    struct fault fault;
    uint64_t dropped;

    settings.max_faults = 16;
    settings.fault_burst = 1u << 30;
    queue = fault_queue_new(&settings);
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        producers[i] = (struct producer){.queue = queue, .endpoint = i};
        CHECK(pthread_create(&producers[i].thread, NULL, produce, &producers[i]) == 0);
    }
    do {
        dropped = fault_dropped(queue);
        while (fault_peek(queue, S, &fault)) {
            CHECK(fault.endpoint < PRODUCERS);
            CHECK_EQ(fault.address, got[fault.endpoint]++);
            fault_done(queue);
            all++;
        }
        (void)sched_yield();
    } while (all + dropped < PRODUCERS * RAISED);
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        CHECK(pthread_join(producers[i].thread, NULL) == 0);
        CHECK_EQ(got[i], producers[i].queued);
        CHECK_EQ(fault_count(queue, i), RAISED);
        queued += producers[i].queued;
    }
    CHECK_EQ(queued + fault_dropped(queue), PRODUCERS * RAISED);
    fault_queue_free(queue);
}

int main(void)
{
    RUN(test_order_and_capacity);
    RUN(test_age);
    RUN(test_younger_than_now);
    RUN(test_rate);
    RUN(test_rate_when_time_goes_back);
    RUN(test_many_endpoints);
    RUN(test_clear);
    RUN(test_producers);
    return 0;
}
