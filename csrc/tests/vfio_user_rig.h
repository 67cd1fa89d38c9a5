/*
 * An engine with a guest that plays its queues and with vfio-user endpoints, of which the test plays both peers.
 */
#ifndef VIOMMU_TESTS_VFIO_USER_RIG_H
#define VIOMMU_TESTS_VFIO_USER_RIG_H

#include <dirent.h>
#include <sys/eventfd.h>

#include "driver.h"
#include "vfio_user_peer.h"
#include "wire.h"

#define RIG_RAM (4u << 20)
#define RIG_ENDPOINT 0x10u
#define RIG_USERS 2
#define RIG_TIMEOUT_MS 60000u /* longer than any test waits, where it is not the matter */

struct rig_settings {
    uint32_t mode;
    uint32_t timeout_ms;
    uint32_t reply_timeout_ms;
    uint32_t max_dma_maps;
    bool bypass;
};

#define RIG_DEFAULTS .timeout_ms = RIG_TIMEOUT_MS, .reply_timeout_ms = RIG_TIMEOUT_MS, .max_dma_maps = 1000

struct rig {
    struct rig_settings settings;
    struct guest guest;
    struct viommu_engine *engine;
    struct viommu_vfio_user *users[RIG_USERS];
    int clients[RIG_USERS];  /* the test's ends */
    int servers[RIG_USERS];
    struct driver requests;
    struct driver events;
    int kicks[2];
    uint64_t buffer;         /* guest-physical: the request under way */
    uint64_t tail;
    uint64_t reports[16];
    struct peer_message message;
    unsigned fds_before;
};

/* How many descriptors this process has. */
static inline unsigned rig_open_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned count = 0;

    CHECK(dir != NULL);
    while (readdir(dir) != NULL)
        count++;
    CHECK(closedir(dir) == 0);
    return count;
}

static inline void rig_connect(struct rig *rig, unsigned i)
{
    struct viommu_vfio_user_limits limits = {8, rig->settings.max_dma_maps, PEER_DATA};
    int client[2], server[2];

    peer_pair(client);
    peer_pair(server);
    CHECK_EQ(viommu_vfio_user_connect(rig->users[i], client[1], server[1], &limits), 0);
    CHECK(close(client[1]) == 0 && close(server[1]) == 0);
    rig->clients[i] = client[0];
    rig->servers[i] = server[0];
}

static inline void rig_start_queue(struct rig *rig, unsigned index, struct driver *driver)
{
    struct viommu_ring ring = driver_ring(driver);

    rig->kicks[index] = eventfd(0, EFD_CLOEXEC);
    CHECK(rig->kicks[index] >= 0);
    ring.kick = rig->kicks[index];
    CHECK_EQ(viommu_queue_start(rig->engine, index, &ring), 0);
}

/* Endpoints 0x10, 0x11, connected; their clients have shared nothing yet. */
static inline void rig_init(struct rig *rig, struct rig_settings settings)
{
    const struct viommu_settings device = {
        .features = VIRTIO_IOMMU_F_INPUT_RANGE | VIRTIO_IOMMU_F_DOMAIN_RANGE | VIRTIO_IOMMU_F_MAP_UNMAP |
                    VIRTIO_IOMMU_F_PROBE | VIRTIO_IOMMU_F_BYPASS_CONFIG | 1ull << 32,
        .page_size_mask = ~4095ull,
        .input_last = UINT64_MAX,
        .domain_last = UINT32_MAX,
        .probe_size = 512,
        .bypass = settings.bypass,
        .max_endpoints = 16,
        .max_domains = 16,
        .max_faults = 16,
        .max_mappings = 100000,
        .max_domain_mappings = 100000,
        .fault_wait_ms = 60000,
        .fault_burst = 1000,
        .fault_rate = 1000,
    };

    memset(rig, 0, sizeof(*rig));
    rig->fds_before = rig_open_fds();
    rig->settings = settings;
    guest_init(&rig->guest, RIG_RAM);
    CHECK_EQ(viommu_engine_new(&device, &rig->engine), 0);
    for (unsigned i = 0; i < RIG_USERS; i++) {
        struct viommu_vfio_user_settings user = {
            .endpoint = RIG_ENDPOINT + i,
            .mode = settings.mode,
            .timeout_ms = settings.timeout_ms,
            .reply_timeout_ms = settings.reply_timeout_ms,
        };

        CHECK_EQ(viommu_vfio_user_new(rig->engine, &user, NULL, 0, &rig->users[i]), 0);
        rig_connect(rig, i);
    }
    CHECK_EQ(viommu_engine_set_memory(rig->engine, &rig->guest.region, 1), 0);
    CHECK_EQ(viommu_engine_set_features(rig->engine, device.features), 0);
    driver_init(&rig->requests, &rig->guest, 64, false);
    driver_init(&rig->events, &rig->guest, 16, false);
    rig_start_queue(rig, VIOMMU_REQUESTQ, &rig->requests);
    rig_start_queue(rig, VIOMMU_EVENTQ, &rig->events);
    rig->buffer = guest_alloc(&rig->guest, 64, 8);
    rig->tail = guest_alloc(&rig->guest, 4, 4);
    for (unsigned i = 0; i < 16; i++) {
        rig->reports[i] = guest_alloc(&rig->guest, 24, 8);
        (void)driver_add(&rig->events, &(struct piece){rig->reports[i], 24, true}, 1);
    }
    CHECK(eventfd_write(rig->kicks[VIOMMU_EVENTQ], 1) == 0);
}

static inline void rig_fini(struct rig *rig)
{
    viommu_engine_free(rig->engine);
    for (unsigned i = 0; i < RIG_USERS; i++)
        CHECK(close(rig->clients[i]) == 0 && close(rig->servers[i]) == 0);
    CHECK(close(rig->kicks[0]) == 0 && close(rig->kicks[1]) == 0);
    guest_fini(&rig->guest);
    CHECK_EQ(rig_open_fds(), rig->fds_before);
}

/* ------------------------------------------------------------------------------------------------------ the guest */

/* Offer a request of size bytes, which is in the buffer. */
static inline void rig_offer(struct rig *rig, uint32_t size)
{
    struct piece pieces[] = {{rig->buffer, size, false}, {rig->tail, 4, true}};

    memset(guest_at(&rig->guest, rig->tail), 0xa5, 4);
    (void)driver_add(&rig->requests, pieces, 2);
    CHECK(eventfd_write(rig->kicks[VIOMMU_REQUESTQ], 1) == 0);
}

/* Whether the request was answered, and its status. */
static inline bool rig_answered(struct rig *rig, unsigned *status)
{
    uint32_t id, len;

    if (!driver_used(&rig->requests, &id, &len))
        return false;
    CHECK_EQ(len, 4);
    *status = *guest_at(&rig->guest, rig->tail);
    return true;
}

static inline unsigned rig_status(struct rig *rig)
{
    unsigned status = 0;

    CHECK_SOON(rig_answered(rig, &status));
    return status;
}

static inline void rig_offer_attach(struct rig *rig, uint32_t domain, uint32_t endpoint, uint32_t flags)
{
    uint8_t *at = guest_at(&rig->guest, rig->buffer);

    memset(at, 0, 20);
    at[0] = REQUEST_ATTACH;
    le32_put(at + 4, domain);
    le32_put(at + 8, endpoint);
    le32_put(at + 12, flags);
    rig_offer(rig, 20);
}

static inline void rig_offer_detach(struct rig *rig, uint32_t domain, uint32_t endpoint)
{
    uint8_t *at = guest_at(&rig->guest, rig->buffer);

    memset(at, 0, 20);
    at[0] = REQUEST_DETACH;
    le32_put(at + 4, domain);
    le32_put(at + 8, endpoint);
    rig_offer(rig, 20);
}

static inline void rig_offer_map(struct rig *rig, uint32_t domain, uint64_t iova, uint64_t size, uint64_t phys,
                                 uint32_t flags)
{
    uint8_t *at = guest_at(&rig->guest, rig->buffer);

    memset(at, 0, 36);
    at[0] = REQUEST_MAP;
    le32_put(at + 4, domain);
    le64_put(at + 8, iova);
    le64_put(at + 16, iova + size - 1);
    le64_put(at + 24, phys);
    le32_put(at + 32, flags);
    rig_offer(rig, 36);
}

static inline void rig_offer_unmap(struct rig *rig, uint32_t domain, uint64_t iova, uint64_t size)
{
    uint8_t *at = guest_at(&rig->guest, rig->buffer);

    memset(at, 0, 28);
    at[0] = REQUEST_UNMAP;
    le32_put(at + 4, domain);
    le64_put(at + 8, iova);
    le64_put(at + 16, iova + size - 1);
    rig_offer(rig, 28);
}

static inline unsigned rig_attach(struct rig *rig, uint32_t domain, uint32_t endpoint)
{
    rig_offer_attach(rig, domain, endpoint, 0);
    return rig_status(rig);
}

static inline unsigned rig_map(struct rig *rig, uint32_t domain, uint64_t iova, uint64_t size, uint64_t phys,
                               uint32_t flags)
{
    rig_offer_map(rig, domain, iova, size, phys, flags);
    return rig_status(rig);
}

/* A page of guest memory, not used by the rig, the n-th. */
static inline uint64_t rig_page(unsigned n)
{
    return GUEST_GPA + (1u << 20) + n * 4096ull;
}

/* The next fault report: reason, flags, endpoint and address have to be these. */
static inline void rig_expect_fault(struct rig *rig, unsigned reason, uint32_t flags, uint32_t endpoint,
                                    uint64_t address)
{
    uint32_t id, len;
    const uint8_t *at;

    CHECK_SOON(driver_used(&rig->events, &id, &len));
    CHECK_EQ(len, 24);
    at = guest_at(&rig->guest, rig->reports[id]);
    CHECK_EQ(at[0], reason);
    CHECK_EQ(le32_get(at + 4), flags);
    CHECK_EQ(le32_get(at + 8), endpoint);
    CHECK_EQ(le64_get(at + 16), address);
}

/* ------------------------------------------------------------------------------------------------------- the peers */

/* The client shares [gpa, gpa + size) at an offset of guest memory's file (fd -1: without a file). */
static inline void rig_share_at(struct rig *rig, unsigned i, uint16_t id, uint64_t gpa, uint64_t size, uint64_t offset,
                                uint32_t flags, int fd)
{
    struct vfio_user_dma_map map = {.argsz = 32, .flags = flags, .offset = offset, .address = gpa, .size = size};

    peer_send_fds(rig->clients[i], id, VFIO_USER_DMA_MAP, 0, 0, &map.argsz, 32, &fd, fd >= 0);
}

static inline void rig_unshare(struct rig *rig, unsigned i, uint16_t id, uint64_t gpa, uint64_t size, uint32_t flags)
{
    struct vfio_user_dma_unmap unmap = {.argsz = 24, .flags = flags, .address = gpa, .size = size};

    peer_send(rig->clients[i], id, VFIO_USER_DMA_UNMAP, 0, &unmap.argsz, 24);
}

/* The next message to the client has to be this reply. */
static inline void rig_expect_reply(struct rig *rig, unsigned i, uint16_t id, uint16_t command, uint32_t error)
{
    CHECK(peer_receive(rig->clients[i], &rig->message));
    CHECK_EQ(rig->message.header.id, id);
    CHECK_EQ(rig->message.header.command, command);
    CHECK_EQ(rig->message.header.flags, VFIO_USER_REPLY | (error != 0 ? VFIO_USER_ERROR : 0));
    CHECK_EQ(rig->message.header.error, error);
}

/* All of guest memory is shared by this client, while nothing of it is mapped. */
static inline void rig_share(struct rig *rig, unsigned i)
{
    rig_share_at(rig, i, 1, GUEST_GPA, RIG_RAM, 0, 3, rig->guest.fd);
    rig_expect_reply(rig, i, 1, VFIO_USER_DMA_MAP, 0);
}

/* The next message to the server has to be a DMA_MAP of this; in shared mode with the file, and what is there. */
static inline void rig_expect_map(struct rig *rig, unsigned i, uint64_t iova, uint64_t size, uint64_t offset,
                                  uint32_t flags)
{
    bool shared = rig->settings.mode == VIOMMU_VFIO_USER_SHARED;
    struct vfio_user_dma_map map;

    CHECK(peer_receive(rig->servers[i], &rig->message));
    CHECK_EQ(rig->message.header.command, VFIO_USER_DMA_MAP);
    CHECK_EQ(rig->message.header.flags, 0);
    CHECK_EQ(rig->message.header.size, sizeof(map));
    memcpy(&map.argsz, rig->message.payload, 32);
    CHECK_EQ(map.argsz, 32);
    CHECK_EQ(map.address, iova);
    CHECK_EQ(map.size, size);
    CHECK_EQ(map.flags, flags);
    CHECK_EQ(map.offset, shared ? offset : 0);
    CHECK_EQ(rig->message.fd_count, shared ? 1 : 0);
    peer_close_fds(&rig->message);
}

static inline void rig_serve_map(struct rig *rig, unsigned i, uint64_t iova, uint64_t size, uint64_t offset,
                                 uint32_t flags)
{
    rig_expect_map(rig, i, iova, size, offset, flags);
    peer_reply(rig->servers[i], &rig->message, 0, NULL, 0);
}

static inline void rig_expect_unmap(struct rig *rig, unsigned i, uint64_t iova, uint64_t size, uint32_t flags)
{
    struct vfio_user_dma_unmap unmap;

    CHECK(peer_receive(rig->servers[i], &rig->message));
    CHECK_EQ(rig->message.header.command, VFIO_USER_DMA_UNMAP);
    CHECK_EQ(rig->message.header.flags, 0);
    CHECK_EQ(rig->message.header.size, sizeof(unmap));
    CHECK_EQ(rig->message.fd_count, 0);
    memcpy(&unmap.argsz, rig->message.payload, 24);
    CHECK_EQ(unmap.argsz, 24);
    CHECK_EQ(unmap.flags, flags);
    CHECK_EQ(unmap.address, iova);
    CHECK_EQ(unmap.size, size);
}

static inline void rig_serve_unmap(struct rig *rig, unsigned i, uint64_t iova, uint64_t size, uint32_t flags)
{
    rig_expect_unmap(rig, i, iova, size, flags);
    peer_reply(rig->servers[i], &rig->message, 0, rig->message.payload, 24);
}

/* The device writes or reads by message; the reply is in rig->message. Returns its error. */
static inline uint32_t rig_dma(struct rig *rig, unsigned i, uint16_t command, uint64_t iova, const void *data,
                               uint64_t count)
{
    static uint8_t payload[16 + PEER_DATA];
    bool write = command == VFIO_USER_DMA_WRITE;

    memcpy(payload, &iova, 8);
    memcpy(payload + 8, &count, 8);
    if (write)
        memcpy(payload + 16, data, count);
    peer_send(rig->servers[i], 0x77, command, 0, payload, 16 + (write ? count : 0));
    CHECK(peer_receive(rig->servers[i], &rig->message));
    CHECK_EQ(rig->message.header.id, 0x77);
    CHECK_EQ(rig->message.header.command, command);
    CHECK_EQ(rig->message.header.flags & ~VFIO_USER_ERROR, VFIO_USER_REPLY);
    if (rig->message.header.error == 0) {
        CHECK_EQ(rig->message.header.size, 32 + (write ? 0 : count));
        CHECK(memcmp(rig->message.payload, payload, 16) == 0);
    } else {
        CHECK_EQ(rig->message.header.flags & VFIO_USER_ERROR, VFIO_USER_ERROR);
        CHECK_EQ(rig->message.header.size, 16);
    }
    return rig->message.header.error;
}

static inline struct viommu_vfio_user_stats rig_stats(const struct rig *rig, unsigned i)
{
    struct viommu_vfio_user_stats stats;

    viommu_vfio_user_stats(rig->users[i], &stats);
    return stats;
}

/* A register access of the client goes through to the server and back: the relay is alive and has nothing else. */
static inline void rig_round_trip(struct rig *rig, unsigned i)
{
    const uint64_t access[2] = {0x14, 0x400000000};

    peer_send(rig->clients[i], 0x4711, VFIO_USER_REGION_READ, 0, access, sizeof(access));
    CHECK(peer_receive(rig->servers[i], &rig->message));
    CHECK_EQ(rig->message.header.command, VFIO_USER_REGION_READ);
    CHECK_EQ(rig->message.header.size, 32);
    CHECK(memcmp(rig->message.payload, access, sizeof(access)) == 0);
    peer_reply(rig->servers[i], &rig->message, 0, "registers", 10);
    rig_expect_reply(rig, i, 0x4711, VFIO_USER_REGION_READ, 0);
    CHECK(memcmp(rig->message.payload, "registers", 10) == 0);
}

#endif
