/* SPDX-License-Identifier: Apache-2.0 */
#include "driver.h"

#include <endian.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE UINT64_C(4096)
#define F_EVENT_IDX (UINT64_C(1) << 29)
#define F_VERSION_1 (UINT64_C(1) << 32)
#define F_MAP_UNMAP (UINT64_C(1) << 2)
#define DESC_NEXT 1
#define DESC_WRITE 2
#define STATUS_OK 0

enum { ATTACH = 1, MAP = 3, UNMAP = 4 };

/* Wire formats: virtio 1.3, 5.13.6, all little-endian. */
struct request {
    uint8_t type;
    uint8_t reserved[3];
    uint32_t domain;
    union {
        struct {
            uint32_t endpoint;
            uint32_t flags;
            uint8_t reserved[4];
        } attach; /* 20 bytes with the head */
        struct {
            uint64_t first;
            uint64_t last;
            uint64_t phys;
            uint32_t flags;
        } __attribute__((packed)) map; /* 36 */
        struct {
            uint64_t first;
            uint64_t last;
            uint32_t reserved;
        } __attribute__((packed)) unmap; /* 28 */
    };
};

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

/* The guest's memory. */
struct guest {
    struct descriptor desc[RING_SIZE];
    struct {
        uint16_t flags;
        uint16_t index;
        uint16_t ring[RING_SIZE];
        uint16_t used_event;
    } avail;
    _Alignas(64) struct {
        uint16_t flags;
        uint16_t index;
        struct {
            uint32_t id;
            uint32_t length;
        } ring[RING_SIZE];
        uint16_t avail_event;
    } used;
    _Alignas(64) struct {
        _Alignas(64) struct request out; /* each request in a cache line of its own, its tail too */
        _Alignas(64) uint8_t tail[4];
    } buffer[CHAINS];
};

struct driver {
    struct viommu_engine *engine;
    struct viommu_region *region;
    struct guest *guest;
    int memory;
    int kick;
    uint16_t written; /* requests, free-running: written, */
    uint16_t offered; /* made available, */
    uint16_t done;    /* and taken back */
    uint16_t free_chain[CHAINS]; /* a stack: the chain that came back last is used first, as Linux does */
    unsigned free_chains;
};

static void fail_if(bool condition, const char *what)
{
    if (condition) {
        fprintf(stderr, "bench: %s\n", what);
        exit(1);
    }
}

/* The next free chain, to be filled in with a request of this length. */
static struct request *next_request(struct driver *driver, uint8_t type, uint32_t length)
{
    fail_if(driver->free_chains == 0, "the ring is full");
    uint16_t chain = driver->free_chain[--driver->free_chains];
    struct request *request = &driver->guest->buffer[chain].out;

    driver->guest->desc[2 * chain].length = htole32(length);
    driver->guest->avail.ring[driver->written % RING_SIZE] = htole16((uint16_t)(2 * chain));
    driver->guest->buffer[chain].tail[0] = 0xff;
    driver->written++;
    request->type = type;
    request->domain = htole32(1);
    return request;
}

static void make_ring(struct driver *driver)
{
    struct guest *guest = driver->guest;
    const struct viommu_ring ring = {
        .size = RING_SIZE,
        .desc = offsetof(struct guest, desc),
        .avail = offsetof(struct guest, avail),
        .used = offsetof(struct guest, used),
        .gpa = true,
        .kick = driver->kick,
        .call = -1,
        .err = -1,
    };

    for (uint16_t i = 0; i < CHAINS; i++) {
        uint64_t out = (uint64_t)((char *)&guest->buffer[i].out - (char *)guest);
        uint64_t tail = (uint64_t)((char *)guest->buffer[i].tail - (char *)guest);
        guest->desc[2 * i] = (struct descriptor){htole64(out), 0, htole16(DESC_NEXT), htole16((uint16_t)(2 * i + 1))};
        guest->desc[2 * i + 1] = (struct descriptor){htole64(tail), htole32(4), htole16(DESC_WRITE), 0};
        driver->free_chain[i] = i;
    }
    driver->free_chains = CHAINS;
    fail_if(viommu_queue_start(driver->engine, VIOMMU_REQUESTQ, &ring) != 0, "the request queue does not start");
}

struct driver *driver_new(uint32_t spin_us)
{
    const struct viommu_settings settings = {
        .features = F_VERSION_1 | F_EVENT_IDX | F_MAP_UNMAP,
        .page_size_mask = ~(PAGE - 1),
        .input_last = UINT64_MAX,
        .domain_last = UINT32_MAX,
        .probe_size = 512,
        .max_endpoints = 16,
        .max_domains = 16,
        .max_faults = 16,
        .max_mappings = UINT64_MAX,
        .max_domain_mappings = UINT64_MAX,
        .fault_wait_ms = 1000,
        .fault_burst = 1,
        .fault_rate = 1,
        .spin_us = spin_us,
    };
    struct driver *driver = calloc(1, sizeof(*driver));
    size_t size = (sizeof(struct guest) + PAGE - 1) / PAGE * PAGE;

    fail_if(!driver, "no memory");
    fail_if(viommu_engine_new(&settings, &driver->engine) != 0, "no engine");
    driver->memory = memfd_create("guest", MFD_CLOEXEC);
    driver->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fail_if(driver->memory < 0 || driver->kick < 0 || ftruncate(driver->memory, (off_t)size) != 0, "no guest memory");
    driver->guest = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, driver->memory, 0);
    fail_if(driver->guest == MAP_FAILED, "no guest memory");
    fail_if(viommu_region_map(0, size, 0, 0, driver->memory, &driver->region) != 0 ||
                viommu_engine_set_memory(driver->engine, &driver->region, 1) != 0 ||
                viommu_engine_set_features(driver->engine, settings.features) != 0 ||
                viommu_engine_add_endpoints(driver->engine, 1, 1, NULL, 0) != 0,
            "the engine refuses its set-up");
    make_ring(driver);

    struct request *request = next_request(driver, ATTACH, 20);
    memset(&request->attach, 0, sizeof(request->attach));
    request->attach.endpoint = htole32(1);
    if (driver_offer(driver)) {
        driver_kick(driver);
    }
    driver_wait(driver, 0);
    driver_collect(driver);
    return driver;
}

void driver_free(struct driver *driver)
{
    uint32_t base;

    fail_if(viommu_queue_stop(driver->engine, VIOMMU_REQUESTQ, &base) != 0, "the request queue does not stop");
    viommu_engine_free(driver->engine);
    viommu_region_free(driver->region);
    munmap(driver->guest, sizeof(struct guest));
    close(driver->memory);
    close(driver->kick);
    free(driver);
}

struct viommu_engine *driver_engine(struct driver *driver)
{
    return driver->engine;
}

void driver_map(struct driver *driver, uint64_t iova)
{
    struct request *request = next_request(driver, MAP, 36);

    request->map.first = htole64(iova);
    request->map.last = htole64(iova + PAGE - 1);
    request->map.phys = htole64(iova ^ PAGE);
    request->map.flags = htole32(VIOMMU_ACCESS_READ | VIOMMU_ACCESS_WRITE);
}

void driver_unmap(struct driver *driver, uint64_t iova)
{
    struct request *request = next_request(driver, UNMAP, 28);

    request->unmap.first = htole64(iova);
    request->unmap.last = htole64(iova + PAGE - 1);
    request->unmap.reserved = 0;
}

bool driver_offer(struct driver *driver)
{
    uint16_t before = driver->offered;
    uint16_t after = driver->written;

    __atomic_store_n(&driver->guest->avail.index, htole16(after), __ATOMIC_RELEASE);
    driver->offered = after;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index must be seen before the device's wish is read */
    uint16_t event = le16toh(__atomic_load_n(&driver->guest->used.avail_event, __ATOMIC_RELAXED));
    return (uint16_t)(after - event - 1) < (uint16_t)(after - before);
}

void driver_kick(struct driver *driver)
{
    const uint64_t one = 1;

    fail_if(write(driver->kick, &one, sizeof(one)) != (ssize_t)sizeof(one), "cannot kick");
}

void driver_wait(struct driver *driver, unsigned left)
{
    uint16_t used;

    do {
        used = le16toh(__atomic_load_n(&driver->guest->used.index, __ATOMIC_ACQUIRE));
    } while ((uint16_t)(driver->offered - used) > left);
}

void driver_collect(struct driver *driver)
{
    struct guest *guest = driver->guest;
    uint16_t used = le16toh(__atomic_load_n(&guest->used.index, __ATOMIC_ACQUIRE));

    for (; driver->done != used; driver->done++) {
        uint32_t chain = le32toh(guest->used.ring[driver->done % RING_SIZE].id) / 2;
        fail_if(chain >= CHAINS || driver->free_chains == CHAINS, "an answer to nothing");
        fail_if(guest->buffer[chain].tail[0] != STATUS_OK, "a request failed");
        driver->free_chain[driver->free_chains++] = (uint16_t)chain;
    }
}
