/* What a vfio-user client or server does to a relay that it should not. */
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>

#include "vfio_user_rig.h"

static struct rig rig;

/* Raw header with whatever in it, and size bytes of zero behind. */
static void send_header(int fd, uint16_t id, uint16_t command, uint32_t size, uint32_t flags, size_t payload)
{
    uint8_t bytes[256] = {0};
    struct vfio_user_header header = {id, command, size, flags, 0};

    memcpy(bytes, &header, sizeof(header));
    peer_send_raw(fd, bytes, sizeof(header) + payload, NULL, 0);
}

static void expect_cut_off(unsigned i, uint64_t cause)
{
    CHECK_SOON(rig_stats(&rig, i).state == VIOMMU_VFIO_USER_FAILED);
    CHECK_EQ(rig_stats(&rig, i).cause, cause);
    CHECK_EQ(rig_stats(&rig, i).failures, 1);
    CHECK_EQ(rig_stats(&rig, i).reachable_bytes, 0);
    CHECK(!peer_receive(rig.servers[i], &rig.message));
}

/* Each message on a rig of its own: what it is, and whom it costs the connection. */
static void set_up(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    rig_init(&rig, settings);
    rig_share(&rig, 0);
    rig_share(&rig, 1);
}

/* A header that cannot be one ends the connection of whoever sent it (style: H1 framing). */
static void headers_that_are_none(void)
{
    static const struct {
        uint32_t size;
        uint32_t flags;
    } bad[] = {{0, 0},          {15, 0},   {0xffffffff, 0}, {PEER_DATA + 65, 0}, {32, 2},
               {32, 0xf},       {32, 0x40}, {32, 0x20},      {32, 0x11},          {32, 0x80000000}};

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        set_up();
        send_header(rig.servers[0], 1, VFIO_USER_DMA_READ, bad[i].size, bad[i].flags, 16);
        expect_cut_off(0, VIOMMU_VFIO_USER_PROTOCOL);
        send_header(rig.clients[1], 1, VFIO_USER_REGION_READ, bad[i].size, bad[i].flags, 16);
        CHECK(!peer_receive(rig.clients[1], &rig.message));
        CHECK_SOON(rig_stats(&rig, 1).state == VIOMMU_VFIO_USER_ABSENT);
        rig_fini(&rig);
    }
}

/* Byte by byte, a message is the same message; the end of the stream within it is the end of the connection. */
static void messages_in_single_bytes(void)
{
    uint8_t bytes[32] = {0};
    struct vfio_user_header header = {7, VFIO_USER_DMA_READ, 32, 0, 0};
    uint64_t count = 4, address = 0x1000;

    set_up();
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
    rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    memcpy(bytes, &header, 16);
    memcpy(bytes + 16, &address, 8);
    memcpy(bytes + 24, &count, 8);
    for (size_t i = 0; i < sizeof(bytes); i++) {
        peer_send_raw(rig.servers[0], bytes + i, 1, NULL, 0);
        if (i % 8 == 3)
            rig_round_trip(&rig, 1);
    }
    CHECK(peer_receive(rig.servers[0], &rig.message));
    CHECK_EQ(rig.message.header.id, 7);
    CHECK_EQ(rig.message.header.error, 0);
    CHECK_EQ(rig.message.header.size, 36);
    peer_send_raw(rig.servers[0], bytes, 20, NULL, 0);
    CHECK(shutdown(rig.servers[0], SHUT_WR) == 0);
    expect_cut_off(0, VIOMMU_VFIO_USER_PROTOCOL);
    peer_send_raw(rig.clients[1], bytes, 7, NULL, 0);
    CHECK(shutdown(rig.clients[1], SHUT_WR) == 0);
    CHECK_SOON(rig_stats(&rig, 1).state == VIOMMU_VFIO_USER_ABSENT);
    rig_fini(&rig);
}

/* Many messages in one piece: none is left behind when nothing follows that would wake the relay. */
static void messages_in_one_piece(void)
{
    enum { COUNT = 100, SIZE = 32 };
    static uint8_t bytes[COUNT * SIZE];

    set_up();
    for (uint16_t i = 0; i < COUNT; i++) {
        struct vfio_user_header header = {i, VFIO_USER_REGION_WRITE, SIZE, VFIO_USER_NO_REPLY, 0};

        memcpy(bytes + i * SIZE, &header, sizeof(header));
        memcpy(bytes + i * SIZE + sizeof(header), &i, sizeof(i));
    }
    peer_send_raw(rig.clients[0], bytes, sizeof(bytes), NULL, 0);
    for (uint16_t i = 0; i < COUNT; i++) {
        CHECK(peer_receive(rig.servers[0], &rig.message));
        CHECK_EQ(rig.message.header.command, VFIO_USER_REGION_WRITE);
        CHECK_EQ(memcmp(rig.message.payload, &i, sizeof(i)), 0);
    }
    for (uint16_t i = 0; i < COUNT; i++) {
        struct vfio_user_header header = {i, VFIO_USER_DEVICE_GET_INFO, SIZE, 0, 0};

        memcpy(bytes + i * SIZE, &header, sizeof(header));
    }
    peer_send_raw(rig.servers[0], bytes, sizeof(bytes), NULL, 0);
    for (uint16_t i = 0; i < COUNT; i++) {
        CHECK(peer_receive(rig.servers[0], &rig.message));
        CHECK_EQ(rig.message.header.id, i);
        CHECK_EQ(rig.message.header.error, ENOTSUP);
    }
    rig_fini(&rig);
}

/* Descriptors where none belong are closed, and no message with them goes any further. */
static void descriptors_where_none_belong(void)
{
    int fds[40];

    set_up();
    for (unsigned i = 0; i < 40; i++)
        CHECK((fds[i] = eventfd(0, EFD_CLOEXEC)) >= 0);
    peer_send_fds(rig.clients[0], 1, VFIO_USER_REGION_READ, 0, 0, "................", 16, fds, 1);
    rig_expect_reply(&rig, 0, 1, VFIO_USER_REGION_READ, EINVAL);
    peer_send_fds(rig.clients[0], 2, VFIO_USER_DMA_UNMAP, 0, 0, "........................", 24, fds, 1);
    rig_expect_reply(&rig, 0, 2, VFIO_USER_DMA_UNMAP, EINVAL);
    peer_send_fds(rig.clients[0], 3, VFIO_USER_DMA_MAP, 0, 0, "................................", 32, fds, 2);
    rig_expect_reply(&rig, 0, 3, VFIO_USER_DMA_MAP, EINVAL);
    /* memory as an interrupt, or a socket: they would reach the server past every check */
    peer_send_fds(rig.clients[0], 4, VFIO_USER_DEVICE_SET_IRQS, 0, 0, "....................", 20, &rig.guest.fd, 1);
    rig_expect_reply(&rig, 0, 4, VFIO_USER_DEVICE_SET_IRQS, EINVAL);
    peer_send_fds(rig.clients[0], 4, VFIO_USER_DEVICE_SET_IRQS, 0, 0, "....................", 20, &rig.clients[1], 1);
    rig_expect_reply(&rig, 0, 4, VFIO_USER_DEVICE_SET_IRQS, EINVAL);
    rig_round_trip(&rig, 0);
    /* with a request of the server, with its answer to one of ours, with an answer that has none */
    peer_send_fds(rig.servers[0], 1, VFIO_USER_DMA_READ, 0, 0, "................", 16, fds, 1);
    expect_cut_off(0, VIOMMU_VFIO_USER_PROTOCOL);
    peer_send(rig.clients[1], 5, VFIO_USER_REGION_READ, 0, "................", 16);
    CHECK(peer_receive(rig.servers[1], &rig.message));
    peer_send_fds(rig.servers[1], rig.message.header.id, VFIO_USER_REGION_READ, VFIO_USER_REPLY, 0, "....", 4, fds, 1);
    expect_cut_off(1, VIOMMU_VFIO_USER_PROTOCOL);
    rig_expect_reply(&rig, 1, 5, VFIO_USER_REGION_READ, EIO);
    /* more than were agreed on (8) */
    peer_send_fds(rig.clients[0], 6, VFIO_USER_DEVICE_SET_IRQS, 0, 0, "....................", 20, fds, 40);
    CHECK(!peer_receive(rig.clients[0], &rig.message));
    for (unsigned i = 0; i < 40; i++)
        CHECK(close(fds[i]) == 0);
    rig_fini(&rig);
}

/* What a client may not ask is answered here and never seen by the server. */
static void requests_that_are_not_passed_on(void)
{
    static const uint16_t unknown[] = {0, VFIO_USER_VERSION, VFIO_USER_DMA_READ, VFIO_USER_DMA_WRITE, 14, 16, 17, 18,
                                       0xffff};

    set_up();
    for (uint16_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++) {
        peer_send(rig.clients[0], i, unknown[i], 0, "................", 16);
        rig_expect_reply(&rig, 0, i, unknown[i], ENOTSUP);
        peer_send(rig.clients[0], i, unknown[i], VFIO_USER_NO_REPLY, "................", 16);
    }
    peer_send(rig.clients[0], 1, VFIO_USER_REGION_READ, VFIO_USER_NO_REPLY, "................", 16);
    peer_send(rig.clients[0], 1, VFIO_USER_REGION_READ, VFIO_USER_REPLY, "................", 16);
    rig_round_trip(&rig, 0);
    CHECK_EQ(rig_stats(&rig, 0).requests, 1);
    CHECK_EQ(rig_stats(&rig, 0).strays, 1);
    rig_fini(&rig);
}

/* DMA_MAPs and DMA_UNMAPs that make no sense are refused and change nothing. */
static void memory_that_cannot_be(void)
{
    static const struct {
        uint64_t gpa, size, offset;
        uint32_t flags, error;
    } bad[] = {
        {0x1000, 0, 0, 3, EINVAL},
        {UINT64_MAX, 2, 0, 3, EINVAL},
        {0x1000, UINT64_MAX, 0, 3, EINVAL},
        {0x1000, 1ull << 62, 0, 3, ENXIO},
        {0x1000, 4096, RIG_RAM, 3, ENXIO},
        {0x1000, 4096, UINT64_MAX - 4095, 3, EINVAL},
        {0x1000, 4096, 0, 4, EINVAL},
        {GUEST_GPA - 4096, 8192, 0, 3, EEXIST},
        {GUEST_GPA + 4096, 4096, 0, 3, EEXIST},
        {GUEST_GPA + RIG_RAM - 1, 4096, 0, 3, EEXIST},
    };
    int pipes[2];

    set_up();
    for (uint16_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        rig_share_at(&rig, 0, i, bad[i].gpa, bad[i].size, bad[i].offset, bad[i].flags, rig.guest.fd);
        rig_expect_reply(&rig, 0, i, VFIO_USER_DMA_MAP, bad[i].error);
    }
    CHECK(pipe2(pipes, O_CLOEXEC) == 0);
    rig_share_at(&rig, 0, 1, 0x1000, 4096, 0, 3, pipes[0]);
    rig_expect_reply(&rig, 0, 1, VFIO_USER_DMA_MAP, EBADF);
    CHECK(close(pipes[0]) == 0 && close(pipes[1]) == 0);
    send_header(rig.clients[0], 2, VFIO_USER_DMA_MAP, 47, 0, 31);
    rig_expect_reply(&rig, 0, 2, VFIO_USER_DMA_MAP, EINVAL);
    send_header(rig.clients[0], 2, VFIO_USER_DMA_UNMAP, 16, 0, 0);
    rig_expect_reply(&rig, 0, 2, VFIO_USER_DMA_UNMAP, EINVAL);
    rig_unshare(&rig, 0, 3, 0x1000, 4096, 0);
    rig_expect_reply(&rig, 0, 3, VFIO_USER_DMA_UNMAP, ENOENT);
    rig_unshare(&rig, 0, 4, GUEST_GPA, 4096, 0); /* a part */
    rig_expect_reply(&rig, 0, 4, VFIO_USER_DMA_UNMAP, EINVAL);
    rig_unshare(&rig, 0, 5, GUEST_GPA, RIG_RAM, 1); /* a dirty bitmap is asked for */
    rig_expect_reply(&rig, 0, 5, VFIO_USER_DMA_UNMAP, EINVAL);
    rig_unshare(&rig, 0, 6, GUEST_GPA, RIG_RAM, VFIO_USER_UNMAP_ALL);
    rig_expect_reply(&rig, 0, 6, VFIO_USER_DMA_UNMAP, EINVAL);
    CHECK_EQ(rig_stats(&rig, 0).memory_bytes, RIG_RAM);
    rig_fini(&rig);
}

/* A client can make us keep so many ranges and no more. */
static void ranges_up_to_the_limit(void)
{
    unsigned refused = 0;

    set_up();
    for (unsigned i = 0; i < 1100; i++) {
        rig_share_at(&rig, 0, 1, i * 4096ull, 4096, 0, 3, rig.guest.fd);
        CHECK(peer_receive(rig.clients[0], &rig.message));
        CHECK(rig.message.header.error == 0 || rig.message.header.error == ENOSPC);
        refused += rig.message.header.error != 0;
    }
    CHECK_EQ(refused, 1100 - 1023);
    rig_unshare(&rig, 0, 2, 0, 0, VFIO_USER_UNMAP_ALL);
    rig_expect_reply(&rig, 0, 2, VFIO_USER_DMA_UNMAP, 0);
    rig_fini(&rig);
}

/* Answers to nothing and second answers change nothing; one of the wrong kind is the end of the server. */
static void answers_to_nothing(void)
{
    struct peer_message *message = &rig.message;
    uint16_t id;

    set_up();
    for (unsigned i = 0; i < 1000; i++)
        peer_send(rig.servers[0], (uint16_t)(i * 65), VFIO_USER_REGION_READ, VFIO_USER_REPLY, "....", 4);
    rig_round_trip(&rig, 0);
    id = 0;
    peer_send(rig.clients[0], 5, VFIO_USER_REGION_READ, 0, "................", 16);
    CHECK(peer_receive(rig.servers[0], message));
    id = message->header.id;
    peer_send(rig.servers[0], id, VFIO_USER_REGION_READ, VFIO_USER_REPLY, "one.", 4);
    peer_send(rig.servers[0], id, VFIO_USER_REGION_READ, VFIO_USER_REPLY, "two.", 4);
    rig_expect_reply(&rig, 0, 5, VFIO_USER_REGION_READ, 0);
    CHECK(memcmp(message->payload, "one.", 4) == 0);
    rig_round_trip(&rig, 0);
    CHECK_EQ(rig_stats(&rig, 0).strays, 1001);
    peer_send(rig.clients[0], 6, VFIO_USER_REGION_READ, 0, "................", 16);
    CHECK(peer_receive(rig.servers[0], message));
    peer_send(rig.servers[0], message->header.id, VFIO_USER_DEVICE_GET_INFO, VFIO_USER_REPLY, "....", 4);
    expect_cut_off(0, VIOMMU_VFIO_USER_PROTOCOL);
    rig_expect_reply(&rig, 0, 6, VFIO_USER_REGION_READ, EIO);
    rig_fini(&rig);
}

/* Requests of a server that are no DMA, or DMA that is none. */
static void requests_of_the_server(void)
{
    static uint8_t big[16 + PEER_DATA];
    uint64_t access[3] = {0x1000, 0, 0};

    set_up();
    for (uint16_t command = 0; command < 30; command++) {
        if (command == VFIO_USER_DMA_READ || command == VFIO_USER_DMA_WRITE)
            continue;
        peer_send(rig.servers[0], command, command, VFIO_USER_NO_REPLY, access, 16);
        peer_send(rig.servers[0], command, command, 0, access, 16);
        CHECK(peer_receive(rig.servers[0], &rig.message));
        CHECK_EQ(rig.message.header.id, command);
        CHECK_EQ(rig.message.header.error, ENOTSUP);
    }
    for (uint16_t size = 0; size <= 24; size = (uint16_t)(size + 4)) { /* too short, too long, not as long as it says */
        for (uint16_t command = VFIO_USER_DMA_READ; command <= VFIO_USER_DMA_WRITE; command++) {
            access[1] = command == VFIO_USER_DMA_READ ? 8 : 4;
            if (size == (command == VFIO_USER_DMA_READ ? 16 : 20))
                continue;
            peer_send(rig.servers[0], size, command, 0, access, size);
            CHECK(peer_receive(rig.servers[0], &rig.message));
            CHECK_EQ(rig.message.header.id, size);
            CHECK_EQ(rig.message.header.error, EINVAL);
            CHECK_EQ(rig.message.header.size, 16);
        }
    }
    CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0, NULL, PEER_DATA + 1), E2BIG);
    CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0, NULL, UINT64_MAX), E2BIG);
    CHECK(!peer_readable(rig.clients[0])); /* nothing of it concerns the client */
    /* a write as long as a message can be, of more than was agreed on */
    access[1] = PEER_DATA + 16;
    memcpy(big, access, 16);
    send_header(rig.servers[0], 1, VFIO_USER_DMA_WRITE, 32 + PEER_DATA + 33, 0, 0);
    expect_cut_off(0, VIOMMU_VFIO_USER_PROTOCOL);
    rig_fini(&rig);
}

/* A server that dies: every request of the client, under way and later, gets an error; guest and IOMMU go on. */
static void server_dies(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    rig_init(&rig, settings);
    rig_share(&rig, 0);
    rig_share(&rig, 1);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT + 1), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
    rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    rig_serve_map(&rig, 1, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    for (uint16_t i = 0; i < 10; i++) {
        peer_send(rig.clients[0], i, VFIO_USER_REGION_READ, 0, "................", 16);
        CHECK(peer_receive(rig.servers[0], &rig.message));
    }
    CHECK(shutdown(rig.servers[0], SHUT_RDWR) == 0);
    for (uint16_t i = 0; i < 10; i++)
        rig_expect_reply(&rig, 0, i, VFIO_USER_REGION_READ, EIO);
    CHECK_EQ(rig_stats(&rig, 0).cause, VIOMMU_VFIO_USER_GONE);
    peer_send(rig.clients[0], 20, VFIO_USER_REGION_WRITE, VFIO_USER_NO_REPLY, "................", 16);
    peer_send(rig.clients[0], 21, VFIO_USER_DEVICE_RESET, 0, NULL, 0);
    rig_expect_reply(&rig, 0, 21, VFIO_USER_DEVICE_RESET, EIO);
    rig_unshare(&rig, 0, 22, GUEST_GPA, RIG_RAM, 0);
    rig_expect_reply(&rig, 0, 22, VFIO_USER_DMA_UNMAP, 0);
    rig_share(&rig, 0);
    /* the guest does not see it in its requests, the other device not at all */
    CHECK_EQ(rig_map(&rig, 1, 0x2000, 4096, rig_page(1), 3), STATUS_OK);
    rig_serve_map(&rig, 1, 0x2000, 4096, rig_page(1) - GUEST_GPA, 3);
    rig_offer_unmap(&rig, 1, 0x1000, 4096);
    rig_serve_unmap(&rig, 1, 0x1000, 4096, 0);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    rig_offer_detach(&rig, 1, RIG_ENDPOINT);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    rig_round_trip(&rig, 1);
    rig_fini(&rig);
}

/* A server that does not give up a mapping in time is cut off; the guest hears DEVERR once, others are unharmed. */
static void server_keeps_a_mapping(void)
{
    for (uint32_t mode = 0; mode < 2; mode++) {
        struct rig_settings settings = {RIG_DEFAULTS};
        uint64_t before;

        settings.mode = mode;
        settings.timeout_ms = 200;
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        rig_share(&rig, 1);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        CHECK_EQ(rig_attach(&rig, 2, RIG_ENDPOINT + 1), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 2, 0x1000, 4096, rig_page(1), 3), STATUS_OK);
        rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
        rig_serve_map(&rig, 1, 0x1000, 4096, rig_page(1) - GUEST_GPA, 3);
        before = check_now_ns();
        rig_offer_unmap(&rig, 1, 0x1000, 4096);
        CHECK_EQ(rig_status(&rig), STATUS_DEVERR);
        CHECK(check_now_ns() - before >= 200 * 1000000ull);
        rig_expect_unmap(&rig, 0, 0x1000, 4096, 0);
        expect_cut_off(0, VIOMMU_VFIO_USER_TIMEOUT);
        rig_offer_unmap(&rig, 1, 0x1000, 4096); /* it has gone all the same */
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
        rig_offer_unmap(&rig, 2, 0x1000, 4096);
        rig_serve_unmap(&rig, 1, 0x1000, 4096, 0);
        CHECK_EQ(rig_status(&rig), STATUS_OK);
        rig_fini(&rig);
    }
}

/* An error in answer to DMA_MAP or DMA_UNMAP: the server's idea of its mappings is not ours any more. */
static void server_refuses_mappings(void)
{
    set_up();
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    CHECK_EQ(rig_attach(&rig, 2, RIG_ENDPOINT + 1), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 2, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
    rig_expect_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    peer_reply(rig.servers[0], &rig.message, ENOMEM, NULL, 0);
    expect_cut_off(0, VIOMMU_VFIO_USER_REFUSED);
    rig_serve_map(&rig, 1, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    rig_offer_detach(&rig, 2, RIG_ENDPOINT + 1);
    rig_expect_unmap(&rig, 1, 0, 0, VFIO_USER_UNMAP_ALL);
    peer_reply(rig.servers[1], &rig.message, EINVAL, NULL, 0);
    CHECK_EQ(rig_status(&rig), STATUS_DEVERR);
    expect_cut_off(1, VIOMMU_VFIO_USER_REFUSED);
    rig_fini(&rig);
}

/* A server that answers no register access is cut off before the client's own patience ends. */
static void server_says_nothing(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};

    settings.reply_timeout_ms = 200;
    rig_init(&rig, settings);
    peer_send(rig.clients[0], 1, VFIO_USER_REGION_READ, 0, "................", 16);
    peer_send(rig.clients[0], 2, VFIO_USER_DEVICE_GET_INFO, 0, "................", 16);
    rig_expect_reply(&rig, 0, 1, VFIO_USER_REGION_READ, EIO);
    rig_expect_reply(&rig, 0, 2, VFIO_USER_DEVICE_GET_INFO, EIO);
    CHECK_EQ(rig_stats(&rig, 0).cause, VIOMMU_VFIO_USER_SILENT);
    peer_send(rig.clients[0], 3, VFIO_USER_REGION_READ, 0, "................", 16);
    rig_expect_reply(&rig, 0, 3, VFIO_USER_REGION_READ, EIO);
    rig_fini(&rig);
}

/* A server that reads nothing cannot keep the guest waiting for longer than the timeout, nor make us keep much. */
static void server_reads_nothing(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    unsigned status = STATUS_OK;

    settings.timeout_ms = 200;
    settings.max_dma_maps = 30000;
    rig_init(&rig, settings);
    rig_share(&rig, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    for (unsigned i = 0; i < 30000 && status == STATUS_OK; i++)
        status = rig_map(&rig, 1, i * 4096ull, 4096, rig_page(0), 3);
    CHECK_EQ(status, STATUS_DEVERR);
    CHECK_EQ(rig_stats(&rig, 0).cause, VIOMMU_VFIO_USER_TIMEOUT);
    CHECK(rig_stats(&rig, 0).maps < 20000); /* a socket's worth and a megabyte */
    CHECK_EQ(rig_map(&rig, 1, 1ull << 40, 4096, rig_page(0), 3), STATUS_OK);
    rig_round_trip(&rig, 1);
    rig_fini(&rig);
}

/* A client that reads none of its answers is not read from any more, and does not keep the guest from unmapping. */
static void client_reads_nothing(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    int sent = 0;

    rig_init(&rig, settings);
    rig_share(&rig, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x1000, 4096, rig_page(0), 3), STATUS_OK);
    rig_serve_map(&rig, 0, 0x1000, 4096, rig_page(0) - GUEST_GPA, 3);
    CHECK(fcntl(rig.clients[0], F_SETFL, O_NONBLOCK) == 0);
    for (unsigned quiet = 0; quiet < 100; quiet++) {
        struct vfio_user_header header = {1, 99, 16, 0, 0}; /* answered by the relay itself */

        while (send(rig.clients[0], &header, sizeof(header), MSG_NOSIGNAL) == sizeof(header)) {
            sent++;
            quiet = 0;
            CHECK(sent < 1000000);
        }
        CHECK_EQ(errno, EAGAIN);
        (void)usleep(1000); /* it may be about to take more: full is what stays full */
    }
    rig_offer_unmap(&rig, 1, 0x1000, 4096);
    rig_serve_unmap(&rig, 0, 0x1000, 4096, 0);
    CHECK_EQ(rig_status(&rig), STATUS_OK);
    rig_fini(&rig);
}

/* A client that cuts its file short under our feet loses the connection; nobody gets a signal. */
static void client_shrinks_its_file(void)
{
    struct rig_settings settings = {RIG_DEFAULTS};
    int fd;

    settings.mode = VIOMMU_VFIO_USER_STRICT;
    rig_init(&rig, settings);
    fd = memfd_create("shrinking", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, 65536) == 0);
    rig_share_at(&rig, 0, 1, 0x80000000, 65536, 0, 3, fd);
    rig_expect_reply(&rig, 0, 1, VFIO_USER_DMA_MAP, 0);
    CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
    CHECK_EQ(rig_map(&rig, 1, 0x1000, 65536, 0x80000000, 3), STATUS_OK);
    rig_serve_map(&rig, 0, 0x1000, 65536, 0, 3);
    CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_WRITE, 0x8000, "there", 5), 0);
    CHECK(ftruncate(fd, 4096) == 0);
    CHECK_EQ(rig_dma(&rig, 0, VFIO_USER_DMA_READ, 0x8000, NULL, 5), 0);
    CHECK(memcmp(rig.message.payload + 16, "\0\0\0\0\0", 5) == 0);
    CHECK(!peer_receive(rig.clients[0], &rig.message));
    CHECK_SOON(rig_stats(&rig, 0).state == VIOMMU_VFIO_USER_ABSENT);
    CHECK(close(fd) == 0);
    rig_fini(&rig);
}

struct noise {
    int fd;
    uint64_t seed;
    bool client;
};

/* Messages with headers that can be, and anything in them; what comes back is thrown away. */
static void *make_noise(void *arg)
{
    struct noise *noise = arg;
    uint8_t bytes[128];

    CHECK(fcntl(noise->fd, F_SETFL, O_NONBLOCK) == 0);
    for (unsigned i = 0; i < 20000; i++) {
        uint64_t random = check_random(&noise->seed);
        struct vfio_user_header header = {
            .id = (uint16_t)(random & 0x3f),
            .command = (uint16_t)(random >> 8 & 0xf),
            .size = (uint32_t)(16 + (random >> 16 & 0x3f)),
            .flags = (random >> 24 & 3) == 0 ? VFIO_USER_REPLY : (random >> 26 & 1) * VFIO_USER_NO_REPLY,
        };

        for (size_t at = 0; at < sizeof(bytes); at += 8) {
            uint64_t word = check_random(&noise->seed);

            word = (word & 7) < 5 ? word >> 40 & 0x3000 : word;
            memcpy(bytes + at, &word, 8);
        }
        if (header.command == VFIO_USER_DMA_MAP || header.command == VFIO_USER_DMA_UNMAP)
            header.size = header.command == VFIO_USER_DMA_MAP ? 48 : 40;
        memcpy(bytes, &header, 16);
        /* A server that mixes up the answers is cut off at once: it mostly keeps to DMA here. */
        if (!noise->client && (header.flags & VFIO_USER_REPLY) != 0 && i % 5000 != 4999)
            continue;
        if (send(noise->fd, bytes, header.size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN)
            break;
        while (recv(noise->fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
            continue;
    }
    (void)shutdown(noise->fd, SHUT_RDWR);
    return NULL;
}

/* Client and server make noise while the guest maps and unmaps: whatever becomes of them, the guest is answered. */
static void noise_from_both_sides(void)
{
    for (uint64_t seed = 1; seed <= (SANITIZED ? 4 : 16); seed++) {
        struct rig_settings settings = {RIG_DEFAULTS};
        struct noise noise[2];
        pthread_t threads[2];

        settings.mode = seed % 2;
        settings.timeout_ms = 50;
        rig_init(&rig, settings);
        rig_share(&rig, 0);
        CHECK_EQ(rig_attach(&rig, 1, RIG_ENDPOINT), STATUS_OK);
        for (unsigned i = 0; i < 2; i++) {
            noise[i] = (struct noise){i == 0 ? rig.clients[0] : rig.servers[0], seed * 77 + i, i == 0};
            CHECK(pthread_create(&threads[i], NULL, make_noise, &noise[i]) == 0);
        }
        for (unsigned i = 0; i < 200; i++) {
            unsigned status = rig_map(&rig, 1, i % 4 * 4096ull, 4096, rig_page(i % 8), 3);

            CHECK(status == STATUS_OK || status == STATUS_INVAL || status == STATUS_DEVERR);
            if (i % 3 == 2) {
                rig_offer_unmap(&rig, 1, 0, 1u << 20);
                status = rig_status(&rig);
                CHECK(status == STATUS_OK || status == STATUS_DEVERR);
            }
        }
        for (unsigned i = 0; i < 2; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK_SOON(rig_stats(&rig, 0).state == VIOMMU_VFIO_USER_ABSENT);
        rig_fini(&rig);
    }
}

int main(void)
{
    RUN(headers_that_are_none);
    RUN(messages_in_single_bytes);
    RUN(messages_in_one_piece);
    RUN(descriptors_where_none_belong);
    RUN(requests_that_are_not_passed_on);
    RUN(memory_that_cannot_be);
    RUN(ranges_up_to_the_limit);
    RUN(answers_to_nothing);
    RUN(requests_of_the_server);
    RUN(server_dies);
    RUN(server_keeps_a_mapping);
    RUN(server_refuses_mappings);
    RUN(server_says_nothing);
    RUN(server_reads_nothing);
    RUN(client_reads_nothing);
    RUN(client_shrinks_its_file);
    RUN(noise_from_both_sides);
    return 0;
}
