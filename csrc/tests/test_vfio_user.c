/* vfio-user endpoints as guest, client and server see them: what is told to whom, when, and what DMA reaches. */
#include <fcntl.h>
#include <pthread.h>

#include "vfio_user_rig.h"

static const uint32_t modes[] = {VIOMMU_VFIO_USER_SHARED, VIOMMU_VFIO_USER_STRICT};
#define EACH_MODE(settings) \
    for (size_t mode = 0; mode < 2; mode++) \
        for (bool once = (settings.mode = modes[mode], true); once; once = false)

static struct rig rig;

/* The client's register accesses go to the server and back, under whatever IDs; posted writes keep their place. */
static void relays_in_order(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    uint64_t access[3] = {0x1000, 0x400000000, 0};

    rig_init(&rig, settings);
    rig_round_trip(&rig, 0);
    for (uint64_t i = 0; i < 100; i++) {
        access[2] = i;
        peer_send(rig.clients[0], (uint16_t)i, VFIO_USER_REGION_WRITE, i % 10 == 9 ? 0 : VFIO_USER_NO_REPLY, access,
                  sizeof(access));
    }
    for (uint64_t i = 0; i < 100; i++) {
        CHECK(peer_receive(rig.servers[0], &rig.message));
        CHECK_EQ(rig.message.header.command, VFIO_USER_REGION_WRITE);
        CHECK_EQ(rig.message.header.flags, i % 10 == 9 ? 0 : VFIO_USER_NO_REPLY);
        CHECK(memcmp(rig.message.payload + 16, &i, sizeof(i)) == 0);
        if (i % 10 == 9)
            peer_reply(rig.servers[0], &rig.message, i == 99 ? EINVAL : 0, NULL, 0);
    }
    for (uint16_t i = 9; i < 100; i = (uint16_t)(i + 10))
        rig_expect_reply(&rig, 0, i, VFIO_USER_REGION_WRITE, i == 99 ? EINVAL : 0);
    CHECK_EQ(rig_stats(&rig, 0).requests, 101);
    CHECK_EQ(rig_stats(&rig, 0).replies, 11);
    CHECK_EQ(rig_stats(&rig, 0).errors, 1);
    rig_fini(&rig);
}

/* Two requests with one ID, answered the other way round, find back to their askers by command. */
static void answers_out_of_order_find_back(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    struct vfio_user_header first;
    struct peer_message *message = &rig.message;

    rig_init(&rig, settings);
    peer_send(rig.clients[0], 5, VFIO_USER_DEVICE_GET_INFO, 0, "....", 4);
    peer_send(rig.clients[0], 5, VFIO_USER_DEVICE_GET_IRQ_INFO, 0, "....", 4);
    CHECK(peer_receive(rig.servers[0], message));
    first = message->header;
    CHECK(peer_receive(rig.servers[0], message));
    CHECK(first.id != message->header.id);
    peer_reply(rig.servers[0], message, 0, "irq", 4);
    message->header = first;
    peer_reply(rig.servers[0], message, 0, "inf", 4);
    rig_expect_reply(&rig, 0, 5, VFIO_USER_DEVICE_GET_IRQ_INFO, 0);
    CHECK(memcmp(message->payload, "irq", 4) == 0);
    rig_expect_reply(&rig, 0, 5, VFIO_USER_DEVICE_GET_INFO, 0);
    CHECK(memcmp(message->payload, "inf", 4) == 0);
    rig_fini(&rig);
}

/* Interrupt eventfds reach the server with their message; region descriptors come back to the client. */
static void descriptors_travel(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    int fds[3];
    eventfd_t value;

    rig_init(&rig, settings);
    for (unsigned i = 0; i < 3; i++)
        CHECK((fds[i] = eventfd(0, EFD_CLOEXEC)) >= 0);
    peer_send(rig.clients[0], 1, VFIO_USER_REGION_READ, 0, "................", 16); /* glued in front */
    peer_send_fds(rig.clients[0], 2, VFIO_USER_DEVICE_SET_IRQS, 0, 0, "....................", 20, fds, 3);
    CHECK(peer_receive(rig.servers[0], &rig.message));
    CHECK_EQ(rig.message.fd_count, 0);
    CHECK(peer_receive(rig.servers[0], &rig.message));
    CHECK_EQ(rig.message.header.command, VFIO_USER_DEVICE_SET_IRQS);
    CHECK_EQ(rig.message.fd_count, 3);
    for (unsigned i = 0; i < 3; i++) {
        CHECK((fcntl(rig.message.fds[i], F_GETFD) & FD_CLOEXEC) != 0);
        CHECK(eventfd_write(rig.message.fds[i], 10 + i) == 0);
        CHECK(eventfd_read(fds[i], &value) == 0 && value == 10 + i);
    }
    peer_close_fds(&rig.message);
    peer_send(rig.clients[0], 3, VFIO_USER_DEVICE_GET_REGION_INFO, 0, "....", 4);
    CHECK(peer_receive(rig.servers[0], &rig.message));
    peer_send_fds(rig.servers[0], rig.message.header.id, VFIO_USER_DEVICE_GET_REGION_INFO, VFIO_USER_REPLY, 0, "....",
                  4, fds, 1);
    rig_expect_reply(&rig, 0, 3, VFIO_USER_DEVICE_GET_REGION_INFO, 0);
    CHECK_EQ(rig.message.fd_count, 1);
    peer_close_fds(&rig.message);
    for (unsigned i = 0; i < 3; i++)
        CHECK(close(fds[i]) == 0);
    rig_fini(&rig);
}

/* A MAP is told to the server before the guest sees its answer, and so before any doorbell that follows it. */
static void map_precedes_its_answer(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        for (unsigned i = 0; i < 20; i++) {
            CHECK_EQ(rig_map(&rig, 1, 0x10000 + i * 4096ull, 4096, rig_page(i), 1 + i % 3), STATUS_OK);
            CHECK(peer_readable(rig.servers[0])); /* no waiting: it is there */
            peer_send(rig.clients[0], 9, VFIO_USER_REGION_WRITE, VFIO_USER_NO_REPLY, "................doorbell", 24);
            rig_expect_map(&rig, 0, 0x10000 + i * 4096ull, 4096, rig_page(i) - GUEST_GPA, 1 + i % 3);
            if (i % 2 == 0) /* it may be late with its answer */
                peer_reply(rig.servers[0], &rig.message, 0, NULL, 0);
            CHECK(peer_receive(rig.servers[0], &rig.message));
            CHECK_EQ(rig.message.header.command, VFIO_USER_REGION_WRITE);
        }
        CHECK_EQ(rig_stats(&rig, 0).maps, 20);
        CHECK_EQ(rig_stats(&rig, 0).reachable_bytes, 20 * 4096);
        rig_fini(&rig);
    }
}

/* UNMAP is answered when the server has answered DMA_UNMAP; registers work meanwhile, DMA does not. */
static void unmap_waits_for_the_server(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    unsigned status;

    EACH_MODE(settings) {
        struct peer_message unmap;

        rig_init(&rig, settings);
        rig_share(&rig, 0);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x10000, 4096, rig_page(0), 3), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x20000, 4096, rig_page(1), 3), STATUS_OK);
        rig_serve_map(&rig, 0, 0x10000, 4096, rig_page(0) - GUEST_GPA, 3);
        rig_serve_map(&rig, 0, 0x20000, 4096, rig_page(1) - GUEST_GPA, 3);
        rig_offer_unmap(&rig, 1, 0x10000, 4096);
        rig_expect_unmap(&rig, 0, 0x10000, 4096, 0);
        unmap.header = rig.message.header;
        memcpy(unmap.payload, rig.message.payload, 24);
        rig_round_trip(&rig, 0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x10000, NULL, 4), EFAULT);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x20000, NULL, 4), 0);
        CHECK(!rig_answered(&rig, &status));
        peer_reply(rig.servers[0], &unmap, 0, unmap.payload, 24);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x10000);
        CHECK_EQ(rig_stats(&rig, 0).reachable_bytes, 4096);
        CHECK_EQ(rig_stats(&rig, 0).peak_reachable_bytes, 8192);
        rig_fini(&rig);
    }
}

/* An UNMAP of several mappings is answered after the last of its DMA_UNMAPs; one of everything is a single message. */
static void unmap_of_several(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    struct peer_message *message = &rig.message;
    struct vfio_user_header first;
    unsigned status;

    rig_init(&rig, settings);
    rig_share(&rig, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    for (unsigned i = 0; i < 5; i++) {
        CHECK_EQ(rig_map(&rig, 1, i * 0x1000ull, 4096, rig_page(i), 3), STATUS_OK);
        rig_serve_map(&rig, 0, i * 0x1000ull, 4096, rig_page(i) - GUEST_GPA, 3);
    }
    rig_offer_unmap(&rig, 1, 0x1000, 0x2000);
    rig_expect_unmap(&rig, 0, 0x1000, 4096, 0);
    first = message->header;
    rig_expect_unmap(&rig, 0, 0x2000, 4096, 0);
    peer_reply(rig.servers[0], message, 0, message->payload, 24);
    rig_round_trip(&rig, 0); /* so the answer was taken in */
    CHECK(!rig_answered(&rig, &status));
    message->header = first;
    peer_reply(rig.servers[0], message, 0, NULL, 0);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    rig_offer_unmap(&rig, 1, 0, UINT64_MAX);
    rig_serve_unmap(&rig, 0, 0, 0, VFIO_USER_UNMAP_ALL);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    CHECK_EQ(rig_stats(&rig, 0).reachable_bytes, 0);
    rig_fini(&rig);
}

/* A mapping across regions is one DMA_MAP for each, holes and memory without a file left out. */
static void mapping_across_regions(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    const uint64_t base = 0x80000000;

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        /* [base, +16K) file at 64K, then 4K without a file, a hole of 4K, then 8K read-only, file at 0 */
        rig_share_at(&rig, 0, 1, base, 16384, 65536, 3, rig.guest.fd);
        rig_share_at(&rig, 0, 2, base + 0x4000, 4096, 0, 3, -1);
        rig_share_at(&rig, 0, 3, base + 0x6000, 8192, 0, 1, rig.guest.fd);
        for (uint16_t id = 1; id <= 3; id++)
            rig_expect_reply(&rig, 0, id, VFIO_USER_DMA_MAP, 0);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0, 0x8000, base + 0x1000, 3), STATUS_OK);
        rig_serve_map(&rig, 0, 0, 0x3000, 65536 + 0x1000, 3);
        rig_serve_map(&rig, 0, 0x5000, 0x2000, 0, 1);
        CHECK_EQ(rig_stats(&rig, 0).reachable_bytes, 0x5000);
        CHECK_EQ(rig_stats(&rig, 0).memory_bytes, 0x6000);
        /* by message: the first piece both ways, nothing across its end, the last for reading only */
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x2ff0, "0123456789abcdef", 16), 0);
        CHECK(memcmp(rig.guest.ram + 65536 + 0x3ff0, "0123456789abcdef", 16) == 0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x2ff0, "0123456789abcdef!", 17), EFAULT);
        rig_expect_fault(&rig, FAULT_UNKNOWN, FAULT_FLAG_WRITE | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x2ff0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x6ff0, NULL, 16), 0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x6ff0, "no", 2), EFAULT);
        rig_expect_fault(&rig, FAULT_UNKNOWN, FAULT_FLAG_WRITE | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x6ff0);
        rig_offer_unmap(&rig, 1, 0, 0x8000);
        rig_serve_unmap(&rig, 0, 0, 0, VFIO_USER_UNMAP_ALL);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        rig_fini(&rig);
    }
}

/* DMA by message: translated, split at the edges of mappings, checked for permission, all or nothing. */
static void dma_by_message(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    static uint8_t data[PEER_DATA];
    uint64_t seed = 42;

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        /* three pages in a row that lie apart: 2 first, then 0, then 7 for reading only */
        CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(2), 3), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x2000, 4096, rig_page(0), 3), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x3000, 4096, rig_page(7), 1), STATUS_OK);
        for (unsigned i = 0; i < 3; i++) {
            CHECK(peer_receive(rig.servers[0], &rig.message));
            peer_close_fds(&rig.message);
        }
        for (size_t i = 0; i < sizeof(data); i++)
            data[i] = (uint8_t)check_random(&seed);
        memset(guest_at(&rig.guest, rig_page(0)), 0x11, 4096);
        memset(guest_at(&rig.guest, rig_page(2)), 0x22, 4096);
        memset(guest_at(&rig.guest, rig_page(7)), 0x77, 4096);

        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x1800, data, 4096), 0);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(2) + 0x800), data, 0x800) == 0);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(0)), data + 0x800, 0x800) == 0);
        CHECK_EQ(*guest_at(&rig.guest, rig_page(0) + 0x800), 0x11);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x1000, NULL, 0x3000), 0);
        CHECK(memcmp(rig.message.payload + 16, guest_at(&rig.guest, rig_page(2)), 4096) == 0);
        CHECK(memcmp(rig.message.payload + 16 + 4096, guest_at(&rig.guest, rig_page(0)), 4096) == 0);
        CHECK(memcmp(rig.message.payload + 16 + 8192, guest_at(&rig.guest, rig_page(7)), 4096) == 0);

        /* into the page that is only for reading: nothing of it happens */
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x2000, data + 5000, 4100), EPERM);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_WRITE | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x3000);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(0)), data + 0x800, 0x800) == 0);
        CHECK_EQ(*guest_at(&rig.guest, rig_page(7)), 0x77);
        /* past the end, before the beginning, and around the top of the address space */
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x3ffc, NULL, 8), EFAULT);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x4000);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0xff8, NULL, 16), EFAULT);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0xff8);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, UINT64_MAX - 3, NULL, 8), EFAULT);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, UINT64_MAX - 3);
        /* guest-physical addresses mean nothing to it */
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, rig_page(2), NULL, 8), EFAULT);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, rig_page(2));
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x1000, NULL, 0), 0);
        CHECK_EQ(rig_stats(&rig, 0).reads, 1);
        CHECK_EQ(rig_stats(&rig, 0).read_bytes, 0x3000);
        CHECK_EQ(rig_stats(&rig, 0).writes, 1);
        CHECK_EQ(rig_stats(&rig, 0).write_bytes, 4096);
        CHECK_EQ(rig_stats(&rig, 0).refused, 5);

        /* as much as one message can take */
        CHECK_EQ(rig_map(&rig, 1, 0x100000, PEER_DATA, rig_page(0), 3), STATUS_OK);
        CHECK(peer_receive(rig.servers[0], &rig.message));
        peer_close_fds(&rig.message);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x100000, data, PEER_DATA), 0);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(0)), data, PEER_DATA) == 0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x100000, NULL, PEER_DATA), 0);
        CHECK(memcmp(rig.message.payload + 16, data, PEER_DATA) == 0);
        rig_fini(&rig);
    }
}

/* An endpoint in no domain reaches nothing without bypass, and all of memory at its own addresses with it. */
static void bypass_and_block(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, rig_page(0), NULL, 8), EFAULT);
        rig_expect_fault(&rig, FAULT_DOMAIN, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, rig_page(0));
        CHECK_EQ(viommu_engine_set_bypass(rig.engine, true), 0);
        rig_serve_map(&rig, 0, GUEST_GPA, RIG_RAM, 0, 3);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, rig_page(0), "all mine", 8), 0);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(0)), "all mine", 8) == 0);
        CHECK_EQ(rig_stats(&rig, 0).reachable_bytes, RIG_RAM);
        /* attached to an empty domain: everything is taken back before the guest hears of it */
        rig_offer_attach(&rig, 1, RIG_ENDPOINT, 0);
        rig_serve_unmap(&rig, 0, 0, 0, VFIO_USER_UNMAP_ALL);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, rig_page(0), NULL, 8), EFAULT);
        rig_expect_fault(&rig, FAULT_MAPPING, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, rig_page(0));
        /* detached again, and to a bypass domain, which changes nothing for the server */
        rig_offer_detach(&rig, 1, RIG_ENDPOINT);
        rig_serve_map(&rig, 0, GUEST_GPA, RIG_RAM, 0, 3);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        rig_offer_attach(&rig, 2, RIG_ENDPOINT, ATTACH_FLAG_BYPASS);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        rig_round_trip(&rig, 0);
        rig_fini(&rig);
    }
}

/* A device that joins a domain gets its mappings; one that leaves loses them, the other keeps them. */
static void two_endpoints_in_one_domain(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    unsigned status;

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        rig_share(&rig, 1);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
        rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT + 1), STATUS_OK);
        rig_serve_map(&rig, 1, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
        CHECK_EQ(rig_map(&rig, 1, 0x2000, 4096, rig_page(1), 1), STATUS_OK);
        rig_serve_map(&rig, 0, 0x2000, 4096, rig_page(1) - GUEST_GPA, 1);
        rig_serve_map(&rig, 1, 0x2000, 4096, rig_page(1) - GUEST_GPA, 1);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x1000, "zero", 4), 0);
        CHECK_EQ(rig_dma(&rig, 1, VFIO_USER_DMA_READ, 0x1000, NULL, 4), 0);
        CHECK(memcmp(rig.message.payload + 16, "zero", 4) == 0);
        /* both have to give a mapping up */
        rig_offer_unmap(&rig, 1, 0x2000, 4096);
        rig_serve_unmap(&rig, 0, 0x2000, 4096, 0);
        rig_expect_unmap(&rig, 1, 0x2000, 4096, 0);
        CHECK(!rig_answered(&rig, &status));
        peer_reply(rig.servers[1], &rig.message, 0, rig.message.payload, 24);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        rig_offer_detach(&rig, 1, RIG_ENDPOINT);
        rig_serve_unmap(&rig, 0, 0, 0, VFIO_USER_UNMAP_ALL);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x1000, NULL, 4), EFAULT);
        rig_expect_fault(&rig, FAULT_DOMAIN, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x1000);
        CHECK_EQ(rig_dma(&rig, 1, VFIO_USER_DMA_READ, 0x1000, NULL, 4), 0);
        rig_fini(&rig);
    }
}

static void *reset(void *engine)
{
    viommu_engine_reset(engine);
    return NULL;
}

/* The same IOVA in two domains is two pages; a move from one to the other leaves nothing of the first. */
static void two_endpoints_in_two_domains(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    pthread_t resetting;

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        rig_share(&rig, 1);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        CHECK_EQ(rig_attach(&rig, 2, RIG_ENDPOINT + 1), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 2, 0x1000, 4096, rig_page(1), 3), STATUS_OK);
        rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
        rig_serve_map(&rig, 1, 0x1000, 4096, rig_page(1) - GUEST_GPA, 3);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x1000, "zero", 4), 0);
        CHECK_EQ(rig_dma(&rig, 1, VFIO_USER_DMA_WRITE, 0x1000, "one.", 4), 0);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(0)), "zero", 4) == 0);
        CHECK(memcmp(guest_at(&rig.guest, rig_page(1)), "one.", 4) == 0);
        rig_offer_attach(&rig, 2, RIG_ENDPOINT, 0);
        rig_serve_unmap(&rig, 0, 0, 0, VFIO_USER_UNMAP_ALL);
        rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(1) - GUEST_GPA, 3);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x1000, NULL, 4), 0);
        CHECK(memcmp(rig.message.payload + 16, "one.", 4) == 0);
        rig_offer_unmap(&rig, 1, 0x1000, 4096); /* the first domain ended when its last endpoint left */
        CHECK_EQ(rig_status(&rig), STATUS_NOENT);
        /* a reset takes everything from both, and ends when they have given it up */
        CHECK(pthread_create(&resetting, NULL, reset, rig.engine) == 0);
        for (unsigned i = 0; i < 2; i++) { /* in whichever order */
            CHECK_SOON(peer_readable(rig.servers[0]) || peer_readable(rig.servers[1]));
            rig_serve_unmap(&rig, peer_readable(rig.servers[0]) ? 0 : 1, 0, 0, VFIO_USER_UNMAP_ALL);
        }
        CHECK(pthread_join(resetting, NULL) == 0);
        CHECK_EQ(rig_stats(&rig, 0).reachable_bytes + rig_stats(&rig, 1).reachable_bytes, 0);
        rig_fini(&rig);
    }
}

/* Memory that comes later is told to the server where it is mapped; memory that goes is taken back first. */
static void memory_comes_and_goes(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    const uint64_t hot = 0x80000000;

    EACH_MODE(settings) {
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
        rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
        CHECK_EQ(rig_map(&rig, 1, 0x8000, 8192, hot, 3), STATUS_OK); /* nothing there yet */
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x8000, NULL, 4), EFAULT);
        rig_expect_fault(&rig, FAULT_UNKNOWN, FAULT_FLAG_READ | FAULT_FLAG_ADDRESS, RIG_ENDPOINT, 0x8000);
        rig_share_at(&rig, 0, 7, hot, 65536, 0x200000, 3, rig.guest.fd);
        rig_expect_map(&rig, 0, 0x8000, 8192, 0x200000, 3);
        CHECK(!peer_readable(rig.clients[0])); /* it hears of it when the server has it */
        peer_reply(rig.servers[0], &rig.message, 0, NULL, 0);
        rig_expect_reply(&rig, 0, 7, VFIO_USER_DMA_MAP, 0);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x8000, "hot", 4), 0);
        CHECK(memcmp(rig.guest.ram + 0x200000, "hot", 4) == 0);
        rig_unshare(&rig, 0, 8, hot, 65536, 0);
        rig_expect_unmap(&rig, 0, 0x8000, 8192, 0);
        CHECK(!peer_readable(rig.clients[0]));
        peer_reply(rig.servers[0], &rig.message, 0, rig.message.payload, 24);
        rig_expect_reply(&rig, 0, 8, VFIO_USER_DMA_UNMAP, 0);
        CHECK_EQ(rig.message.header.size, 40);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x8000, NULL, 4), EFAULT);
        CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x1000, NULL, 4), 0);
        /* everything goes at once, as QEMU does at a reset, and comes back */
        rig_unshare(&rig, 0, 9, 0, 0, VFIO_USER_UNMAP_ALL);
        rig_serve_unmap(&rig, 0, 0x1000, 4096, 0);
        rig_expect_reply(&rig, 0, 9, VFIO_USER_DMA_UNMAP, 0);
        CHECK_EQ(rig_stats(&rig, 0).memory_bytes, 0);
        rig_share_at(&rig, 0, 10, GUEST_GPA, RIG_RAM, 0, 3, rig.guest.fd);
        rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
        rig_expect_reply(&rig, 0, 10, VFIO_USER_DMA_MAP, 0);
        CHECK_EQ(rig_stats(&rig, 0).reachable_bytes, 4096);
        rig_fini(&rig);
    }
}

/* A client that leaves takes its memory along; the next one finds the guest's mappings waiting for memory. */
static void client_comes_back(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    rig_init(&rig, settings);
    rig_share(&rig, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
    rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    CHECK(close(rig.clients[0]) == 0);
    CHECK(!peer_receive(rig.servers[0], &rig.message)); /* the server hears of it by the end of its connection */
    CHECK(close(rig.servers[0]) == 0);
    CHECK_SOON(rig_stats(&rig, 0).state == VIOMMU_VFIO_USER_ABSENT);
    CHECK_EQ(rig_stats(&rig, 0).memory_bytes, 0);
    CHECK_EQ(rig_map(&rig, 1, 0x2000, 4096, rig_page(1), 3), STATUS_OK);
    rig_offer_unmap(&rig, 1, 0x2000, 4096);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    rig_connect(&rig, 0);
    rig_share_at(&rig, 0, 1, GUEST_GPA, RIG_RAM, 0, 3, rig.guest.fd);
    rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    rig_expect_reply(&rig, 0, 1, VFIO_USER_DMA_MAP, 0);
    CHECK_EQ(rig_stats(&rig, 0).connections, 2);
    CHECK_EQ(rig_stats(&rig, 0).failures, 0);
    rig_fini(&rig);
}

/* Where the client can reach registers past the relay, a mapping is answered only when the server has it. */
static void map_waits_when_registers_are_direct(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    unsigned status;

    rig_init(&rig, settings);
    rig_share(&rig, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    peer_send(rig.clients[0], 3, VFIO_USER_DEVICE_GET_REGION_INFO, 0, "....", 4);
    CHECK(peer_receive(rig.servers[0], &rig.message));
    peer_send_fds(rig.servers[0], rig.message.header.id, VFIO_USER_DEVICE_GET_REGION_INFO, VFIO_USER_REPLY, 0, "....",
                  4, &rig.guest.fd, 1);
    rig_expect_reply(&rig, 0, 3, VFIO_USER_DEVICE_GET_REGION_INFO, 0);
    peer_close_fds(&rig.message);
    rig_offer_map(&rig, 1, 0x1000, 4096, rig_page(0), 3);
    rig_expect_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    {
        struct peer_message map = {.header = rig.message.header};

        rig_round_trip(&rig, 0);
        CHECK(!rig_answered(&rig, &status));
        peer_reply(rig.servers[0], &map, 0, NULL, 0);
    }
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    rig_fini(&rig);
}

/* More mappings than the server can keep are refused, and nothing stays behind. */
static void mappings_up_to_the_limit(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    settings.max_dma_maps = 3;
    rig_init(&rig, settings);
    rig_share(&rig, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    for (unsigned i = 0; i < 3; i++) {
        CHECK_EQ(rig_map(&rig, 1, i * 4096ull, 4096, rig_page(i), 3), STATUS_OK);
        rig_serve_map(&rig, 0, i * 4096ull, 4096, rig_page(i) - GUEST_GPA, 3);
    }
    CHECK_EQ(rig_map(&rig, 1, 0x10000, 4096, rig_page(9), 3), STATUS_NOMEM);
    CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x10000, NULL, 4), EFAULT);
    rig_offer_unmap(&rig, 1, 0, 4096);
    rig_serve_unmap(&rig, 0, 0, 4096, 0);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x10000, 4096, rig_page(9), 3), STATUS_OK);
    rig_serve_map(&rig, 0, 0x10000, 4096, rig_page(9) - GUEST_GPA, 3);
    CHECK_EQ(rig_stats(&rig, 0).failures, 0);
    rig_fini(&rig);
}

int main(void)
{
    RUN(relays_in_order);
    RUN(answers_out_of_order_find_back);
    RUN(descriptors_travel);
    RUN(map_precedes_its_answer);
    RUN(unmap_waits_for_the_server);
    RUN(unmap_of_several);
    RUN(mapping_across_regions);
    RUN(dma_by_message);
    RUN(bypass_and_block);
    RUN(two_endpoints_in_one_domain);
    RUN(two_endpoints_in_two_domains);
    RUN(memory_comes_and_goes);
    RUN(client_comes_back);
    RUN(map_waits_when_registers_are_direct);
    RUN(mappings_up_to_the_limit);
    return 0;
}
