#include "records.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define CAPACITY 1024u

struct records {
    int fd;
    uint64_t reported;          /* of dropped; the reader's */
    _Atomic uint64_t dropped;
    _Atomic uint32_t head;
    _Atomic uint32_t tail;
    atomic_bool waiting;
    struct viommu_record ring[CAPACITY];
};

struct records *records_new(void)
{
    struct records *records = calloc(1, sizeof(*records));

    if (records == NULL)
        return NULL;
    records->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (records->fd < 0) {
        free(records);
        return NULL;
    }
    atomic_store(&records->waiting, true);
    return records;
}

void records_free(struct records *records)
{
    if (records == NULL)
        return;
    (void)close(records->fd);
    free(records);
}

int records_fd(const struct records *records)
{
    return records->fd;
}

void records_put(struct records *records, const struct viommu_record *record)
{
    uint32_t tail = atomic_load_explicit(&records->tail, memory_order_relaxed);

    if (tail - atomic_load_explicit(&records->head, memory_order_acquire) >= CAPACITY) {
        atomic_fetch_add_explicit(&records->dropped, 1, memory_order_relaxed);
    } else {
        records->ring[tail % CAPACITY] = *record;
        atomic_store_explicit(&records->tail, tail + 1, memory_order_release);
    }
    if (atomic_exchange(&records->waiting, false)) {
        uint64_t one = 1;

        (void)!write(records->fd, &one, sizeof(one));
    }
}

size_t records_take(struct records *records, struct viommu_record *out, size_t max, uint64_t *lost)
{
    uint64_t dropped = atomic_load_explicit(&records->dropped, memory_order_relaxed);
    uint64_t kicks;
    size_t count = 0;

    *lost = dropped - records->reported;
    records->reported = dropped;
    (void)!read(records->fd, &kicks, sizeof(kicks));
    for (int round = 0; round < 2; round++) {
        uint32_t head = atomic_load_explicit(&records->head, memory_order_relaxed);

        while (count < max && head != atomic_load_explicit(&records->tail, memory_order_acquire)) {
            out[count++] = records->ring[head++ % CAPACITY];
            atomic_store_explicit(&records->head, head, memory_order_release);
        }
        if (count == max || round == 1)
            break;
        atomic_store(&records->waiting, true); /* then look once more: a record may have come in between */
    }
    if (count == max) { /* there may be more: stay readable */
        uint64_t one = 1;

        atomic_store(&records->waiting, false);
        (void)!write(records->fd, &one, sizeof(one));
    }
    return count;
}
