/*
 * A virtual machine for tests of the whole engine through viommu.h: guest memory in a memfd, two rings, eventfds, and
 * a driver that sends requests and waits for them. The driver may run in a thread of its own.
 */
#ifndef VIOMMU_TESTS_MACHINE_H
#define VIOMMU_TESTS_MACHINE_H

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>

#include "driver.h"
#include "settings.h"

#define MACHINE_BYTES (4u << 20)
#define MACHINE_SLOT 1024u /* bytes of a request's buffers */

struct machine {
    struct viommu_engine *engine;
    struct guest guest;
    uint64_t features;
    struct driver driver[VIOMMU_QUEUES];
    struct viommu_ring ring[VIOMMU_QUEUES];
    uint64_t slots;  /* a slot of MACHINE_SLOT bytes for every descriptor of the request queue */
    uint64_t tables; /* and one for its indirect table */
    uint64_t sent;
    bool indirect;
};

static inline bool fd_readable(int fd)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};

    return poll(&poller, 1, 0) == 1;
}

static inline uint64_t fd_take(int fd)
{
    uint64_t count = 0;

    if (read(fd, &count, sizeof(count)) != sizeof(count))
        CHECK(errno == EAGAIN);
    return count;
}

static inline void fd_kick(int fd)
{
    uint64_t one = 1;

    CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}

/* Open file descriptors of this process: a leak shows as a difference. */
static inline unsigned open_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    unsigned count = 0;

    CHECK(directory != NULL);
    while (readdir(directory) != NULL)
        count++;
    (void)closedir(directory);
    return count;
}

/* Lines of /proc/self/maps that name a memfd. */
static inline unsigned memfd_maps(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    unsigned count = 0;

    CHECK(maps != NULL);
    while (fgets(line, sizeof(line), maps) != NULL)
        count += strstr(line, "memfd:") != NULL;
    (void)fclose(maps);
    return count;
}

static inline struct viommu_stats machine_stats(const struct machine *machine)
{
    struct viommu_stats stats;

    viommu_engine_stats(machine->engine, &stats);
    return stats;
}

/* Rings zeroed, as a driver that begins anew. */
static inline void machine_rings(struct machine *machine, uint32_t size)
{
    machine->guest.next = 0;
    memset(machine->guest.ram, 0, 1u << 20);
    for (unsigned i = 0; i < VIOMMU_QUEUES; i++) {
        int kick = machine->ring[i].kick, call = machine->ring[i].call, err = machine->ring[i].err;

        driver_init(&machine->driver[i], &machine->guest, size, (machine->features & VIRTIO_F_RING_PACKED) != 0);
        machine->ring[i] = driver_ring(&machine->driver[i]);
        machine->ring[i].kick = kick;
        machine->ring[i].call = call;
        machine->ring[i].err = err;
        (void)guest_alloc(&machine->guest, 0, 4096);
    }
    machine->slots = guest_alloc(&machine->guest, (uint64_t)size * MACHINE_SLOT, 4096);
    machine->tables = guest_alloc(&machine->guest, size * 64ull, 4096);
}

static inline void machine_start(struct machine *machine)
{
    for (uint32_t i = 0; i < VIOMMU_QUEUES; i++)
        CHECK_EQ(viommu_queue_start(machine->engine, i, &machine->ring[i]), 0);
}

/* Endpoints 1-16 exist. The rings are laid out and not started. */
static inline void machine_init(struct machine *machine, const struct viommu_settings *settings, uint64_t features,
                                uint32_t size)
{
    memset(machine, 0, sizeof(*machine));
    machine->features = features;
    machine->indirect = (features & VIRTIO_RING_F_INDIRECT_DESC) != 0;
    guest_init(&machine->guest, MACHINE_BYTES);
    CHECK_EQ(viommu_engine_new(settings, &machine->engine), 0);
    CHECK_EQ(viommu_engine_add_endpoints(machine->engine, 1, 16, NULL, 0), 0);
    CHECK_EQ(viommu_engine_set_memory(machine->engine, &machine->guest.region, 1), 0);
    CHECK_EQ(viommu_engine_set_features(machine->engine, features), 0);
    for (unsigned i = 0; i < VIOMMU_QUEUES; i++) {
        machine->ring[i].kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        machine->ring[i].call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        machine->ring[i].err = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    }
    machine_rings(machine, size);
}

static inline void machine_fini(struct machine *machine)
{
    viommu_engine_free(machine->engine);
    for (unsigned i = 0; i < VIOMMU_QUEUES; i++) {
        CHECK(close(machine->ring[i].kick) == 0);
        CHECK(close(machine->ring[i].call) == 0);
        CHECK(close(machine->ring[i].err) == 0);
    }
    guest_fini(&machine->guest);
}

/* Offer a request without kicking. Returns where its writable part is. */
static inline uint64_t machine_offer(struct machine *machine, const uint8_t *in, uint32_t readable, uint32_t writable)
{
    struct driver *driver = &machine->driver[VIOMMU_REQUESTQ];
    uint64_t number = machine->sent++ % driver->size, at = machine->slots + number * MACHINE_SLOT;
    struct piece pieces[2] = {{at, readable, false}, {at + 128, writable, true}};

    CHECK(readable <= 128 && writable <= MACHINE_SLOT - 128);
    memcpy(guest_at(&machine->guest, at), in, readable);
    memset(guest_at(&machine->guest, at + 128), 0xa5, writable);
    if (machine->indirect)
        (void)driver_add_indirect(driver, machine->tables + number * 64, pieces, 2);
    else
        (void)driver_add(driver, pieces, 2);
    return at + 128;
}

static inline void machine_kick(struct machine *machine, uint32_t queue, uint16_t offered)
{
    if (driver_wants_kick(&machine->driver[queue], offered, (machine->features & VIRTIO_RING_F_EVENT_IDX) != 0))
        fd_kick(machine->ring[queue].kick);
}

/* Wait for the next used buffer, giving the CPU away: there may be only one. */
static inline uint32_t machine_wait(struct machine *machine, uint32_t queue)
{
    uint64_t until = check_now_ns() + 60 * 1000000000ull;
    uint32_t id, len;

    while (!driver_used(&machine->driver[queue], &id, &len)) {
        CHECK(check_now_ns() < until && "the engine answers");
        (void)sched_yield();
    }
    return len;
}

/* One request: send, kick if it is wanted, wait. Returns the status, having checked used length and tail. */
static inline unsigned machine_request(struct machine *machine, const uint8_t *in, uint32_t readable)
{
    uint16_t offered = machine->driver[VIOMMU_REQUESTQ].avail_idx;
    uint64_t tail = machine_offer(machine, in, readable, 4);
    const uint8_t *at = guest_at(&machine->guest, tail);

    machine_kick(machine, VIOMMU_REQUESTQ, offered);
    CHECK_EQ(machine_wait(machine, VIOMMU_REQUESTQ), 4);
    CHECK(at[1] == 0 && at[2] == 0 && at[3] == 0);
    return at[0];
}

static inline unsigned machine_attach(struct machine *machine, uint32_t domain, uint32_t endpoint)
{
    uint8_t in[20] = {REQUEST_ATTACH};

    le32_put(in + 4, domain);
    le32_put(in + 8, endpoint);
    return machine_request(machine, in, sizeof(in));
}

static inline unsigned machine_map(struct machine *machine, uint32_t domain, uint64_t page)
{
    uint8_t in[36] = {REQUEST_MAP};

    le32_put(in + 4, domain);
    le64_put(in + 8, page << 12);
    le64_put(in + 16, (page << 12) + 0xfff);
    le64_put(in + 24, GUEST_GPA);
    le32_put(in + 32, 3);
    return machine_request(machine, in, sizeof(in));
}

static inline unsigned machine_unmap(struct machine *machine, uint32_t domain, uint64_t page)
{
    uint8_t in[28] = {REQUEST_UNMAP};

    le32_put(in + 4, domain);
    le64_put(in + 8, page << 12);
    le64_put(in + 16, (page << 12) + 0xfff);
    return machine_request(machine, in, sizeof(in));
}

/* Post an event buffer, kicking if it is wanted. */
static inline uint64_t machine_post(struct machine *machine, uint32_t length)
{
    struct driver *driver = &machine->driver[VIOMMU_EVENTQ];
    uint16_t offered = driver->avail_idx;
    uint64_t at = guest_alloc(&machine->guest, length == 0 ? 1 : length, 8);

    memset(guest_at(&machine->guest, at), 0xa5, length);
    (void)driver_add(driver, &(struct piece){at, length, true}, 1);
    machine_kick(machine, VIOMMU_EVENTQ, offered);
    return at;
}

#endif
