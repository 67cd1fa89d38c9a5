/* The ring of records: order, overflow and its count, the eventfd that tells, a writer and a reader in two threads. */
#include "records.h"

#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "check.h"

static bool readable(const struct records *records)
{
    struct pollfd poller = {.fd = records_fd(records), .events = POLLIN};

    return poll(&poller, 1, 0) == 1;
}

static void put(struct records *records, uint64_t number)
{
    struct viommu_record record = {.kind = VIOMMU_RECORD_REFUSED, .first = number};

    records_put(records, &record);
}

/* Records come out in order, whole, in pieces of any size; the eventfd is readable exactly while some wait. */
static void test_order(void)
{
    struct records *records = records_new();
    struct viommu_record out[16];
    uint64_t lost = 99, next = 0, number = 0;

    CHECK(records != NULL && !readable(records));
    CHECK_EQ(records_take(records, out, 16, &lost), 0);
    CHECK_EQ(lost, 0);
    for (unsigned round = 0; round < 5000; round++) {
        unsigned burst = round % 13, left = burst;

        for (unsigned i = 0; i < burst; i++)
            put(records, number++);
        CHECK_EQ(readable(records), burst != 0);
        for (size_t most = 1 + round % 5; left != 0;) {
            size_t count = records_take(records, out, most, &lost);

            CHECK_EQ(lost, 0);
            CHECK_EQ(count, left < most ? left : most);
            for (size_t i = 0; i < count; i++)
                CHECK_EQ(out[i].first, next++);
            left -= (unsigned)count;
            CHECK(left == 0 || readable(records)); /* more waits: it stays readable */
        }
        while (readable(records)) /* a full page may have been the last one */
            CHECK_EQ(records_take(records, out, 16, &lost), 0);
    }
    CHECK_EQ(next, number);
    records_free(records);
    records_free(NULL);
}

/* Asking for nothing takes nothing and loses nothing. */
static void test_take_none(void)
{
    struct records *records = records_new();
    struct viommu_record out;
    uint64_t lost;

    put(records, 7);
    CHECK_EQ(records_take(records, &out, 0, &lost), 0);
    CHECK(readable(records));
    CHECK_EQ(records_take(records, &out, 1, &lost), 1);
    CHECK_EQ(out.first, 7);
    records_free(records);
}

/* What does not fit is counted, told once, and does not disturb what is there. */
static void test_overflow(void)
{
    struct records *records = records_new();
    struct viommu_record out[64];
    uint64_t lost, all_lost = 0, next = 0;
    size_t count;

    for (uint64_t i = 0; i < 5000; i++)
        put(records, i);
    while ((count = records_take(records, out, 64, &lost)) != 0) {
        all_lost += lost;
        for (size_t i = 0; i < count; i++)
            CHECK_EQ(out[i].first, next++);
    }
    CHECK(next >= 64 && next + all_lost == 5000);
    CHECK_EQ(lost, 0);
    put(records, 9);
    CHECK_EQ(records_take(records, out, 64, &lost), 1);
    CHECK(out[0].first == 9 && lost == 0);
    records_free(records);
}

#define RECORDS 200000u

static void *write_all(void *arg)
{
    for (uint64_t i = 1; i <= RECORDS; i++)
        put(arg, i);
    return NULL;
}

/* A reader that sleeps on the eventfd misses nothing but what is counted as lost, and is never left asleep. */
static void test_threads(void)
{
    struct records *records = records_new();
    struct pollfd poller = {.fd = records_fd(records), .events = POLLIN};
    struct viommu_record out[32];
    pthread_t writer;
    uint64_t got = 0, all_lost = 0, latest = 0, lost;

    CHECK(pthread_create(&writer, NULL, write_all, records) == 0);
    while (got + all_lost < RECORDS) {
        size_t count;

        CHECK(poll(&poller, 1, 60000) == 1); /* a wake-up that never comes is the failure */
        count = records_take(records, out, 32, &lost);
        all_lost += lost;
        got += count;
        for (size_t i = 0; i < count; i++) {
            CHECK(out[i].first > latest);
            latest = out[i].first;
        }
    }
    CHECK_EQ(got + all_lost, RECORDS);
    CHECK(pthread_join(writer, NULL) == 0);
    records_free(records);
}

int main(void)
{
    RUN(test_order);
    RUN(test_take_none);
    RUN(test_overflow);
    RUN(test_threads);
    return 0;
}
