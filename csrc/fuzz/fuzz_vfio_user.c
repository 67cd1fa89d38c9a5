/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer target: a vfio-user relay between a client and a server that say anything, while the guest maps and
 * unmaps. The input is a program of 24-byte instructions: messages of either side, well-formed or not, in one piece
 * or two, with descriptors of all kinds; requests of the guest; time that passes.
 *
 * Everything runs in turn. The linker puts our functions in front of those in which the relay waits (--wrap, see
 * CMakeLists.txt): when it would wait for events, the next instruction is carried out; when the guest's side would
 * wait for the server, the relay goes on; and time is a number. So an input does the same whenever it runs.
 *
 * The relay has to keep its word to both: the client gets answers to what it asked and nothing else; the server hears
 * of ranges that do not overlap, is told to forget what it knows and nothing else, never more than it can keep, and
 * never gets a file in strict mode. Its DMA is served where the guest has mapped it. No descriptor stays behind.
 */
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../tests/check.h"
#include "vfio_user.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define GUEST_BYTES 65536u
#define MAX_TRANSFER 4096u
#define MAX_MESSAGE (MAX_TRANSFER + VFIO_USER_OVERHEAD)
#define PENDING 256u
#define DOMAINS 3u

struct header {
    uint8_t strict;
    uint8_t max_maps;
    uint8_t timeouts;
    uint8_t max_fds;
};

struct instruction {
    uint8_t code;
    uint8_t command;
    uint16_t id;
    uint8_t flags;    /* of the message */
    uint8_t fds;      /* how many, of which kind */
    int8_t size;      /* difference from the right one */
    uint8_t access;   /* rights, in a payload */
    uint16_t address; /* pages */
    uint16_t pages;
    uint16_t offset;  /* pages */
    uint16_t bytes;   /* added to address */
    uint8_t cut;      /* bytes sent at once; 0: all */
    uint8_t field;    /* a byte of the message to change ... */
    uint8_t by;       /* ... with these bits; 0: none */
    uint8_t far;      /* at the top of the address space */
    uint32_t unused;
};

struct peer {
    int fd;
    bool garbled;             /* it sent what need not be understood: nothing is known of what it is owed */
    bool ended;
    bool deaf;                /* it reads nothing for now */
    uint8_t out[2 * MAX_MESSAGE];
    size_t out_size;          /* bytes of a message that have not been sent */
    uint8_t in[2 * MAX_MESSAGE];
    size_t have;
    unsigned fds;             /* that came with the message under way */
    int first_fd;
    struct vfio_user_header pending[PENDING]; /* client: asked and not answered; server: asked of it */
    unsigned pending_count;
};

struct map {
    uint64_t address;
    uint64_t size;
};

/* A DMA_READ or DMA_WRITE of the server that has not been answered. They are answered in their order. */
struct access {
    uint16_t id;
    uint16_t command;
    bool allowed; /* as the guest has it mapped */
};

/* Whose turn it is: the relay's thread, or the one in which the guest's requests are carried out. */
struct guest_side {
    pthread_t thread;
    sem_t turn;
    sem_t back;
    void (*request)(const struct instruction *now);
    struct instruction argument;
    bool busy;
    bool quit;
};

static struct {
    struct viommu_vfio_user *user;
    struct viommu_vfio_user_limits limits;
    bool strict;
    const uint8_t *data;
    size_t left;
    uint64_t now;
    struct peer client;
    struct peer server;
    struct map maps[256];
    unsigned map_count;
    struct access accesses[PENDING];
    unsigned access_count;
    struct stage2_domain *domains[DOMAINS];
    struct iova_map *books[DOMAINS]; /* what the engine keeps of them */
    struct iova_pool *pool;
    unsigned attached;               /* index + 1; 0: blocked; DOMAINS + 1: identity */
    unsigned faults;
} run;

static struct guest_side guest_side;
static int guest_fd, small_fd, event_fd;
static void *(*relay)(void *);

/* ------------------------------------------------------------------------------------------ in front of the library */

int __real_epoll_wait(int epoll, struct epoll_event *events, int max, int ms);
int __wrap_epoll_wait(int epoll, struct epoll_event *events, int max, int ms);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *arg);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *arg);
int __real_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_cond_timedwait(pthread_cond_t *changed, pthread_mutex_t *lock, const struct timespec *time);
uint64_t __wrap_vfio_user_now(void);

uint64_t __wrap_vfio_user_now(void)
{
    return run.now;
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *arg)
{
    if (routine != vfio_user_relay)
        return __real_pthread_create(thread, attributes, routine, arg);
    relay = routine;
    return 0;
}

int __wrap_pthread_join(pthread_t thread, void **result)
{
    if (relay == NULL)
        return __real_pthread_join(thread, result);
    relay = NULL; /* it has run already, in our thread */
    return 0;
}

/* The guest's side waits: the other's turn. */
int __wrap_pthread_cond_timedwait(pthread_cond_t *changed, pthread_mutex_t *lock, const struct timespec *time)
{
    uint64_t deadline = (uint64_t)time->tv_sec * 1000000000u + (uint64_t)time->tv_nsec;

    (void)changed;
    CHECK(pthread_equal(pthread_self(), guest_side.thread));
    if (run.now >= deadline)
        return ETIMEDOUT;
    CHECK_EQ(pthread_mutex_unlock(lock), 0);
    CHECK_EQ(sem_post(&guest_side.back), 0);
    CHECK_EQ(sem_wait(&guest_side.turn), 0);
    CHECK_EQ(pthread_mutex_lock(lock), 0);
    return 0;
}

static void *guest_thread(void *unused)
{
    (void)unused;
    for (;;) {
        CHECK_EQ(sem_wait(&guest_side.turn), 0);
        if (guest_side.quit)
            return NULL;
        guest_side.request(&guest_side.argument);
        guest_side.busy = false;
        CHECK_EQ(sem_post(&guest_side.back), 0);
    }
}

/* Let the guest's side go on until it is done or has to wait. */
static void guest_turn(void)
{
    CHECK_EQ(sem_post(&guest_side.turn), 0);
    CHECK_EQ(sem_wait(&guest_side.back), 0);
}

/* ------------------------------------------------------------------------------------------------------- the peers */

static void send_now(struct peer *peer, size_t size, const int *fds, unsigned count)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(16 * sizeof(int))];
    } control = {0};
    struct iovec iov = {peer->out, size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t sent;

    if (size == 0)
        return;
    if (count != 0) {
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(count * sizeof(int));
        CMSG_FIRSTHDR(&msg)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&msg)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&msg)->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&msg)), fds, count * sizeof(int));
    }
    sent = sendmsg(peer->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent != (ssize_t)size) { /* gone, or not reading */
        peer->garbled = true;
        peer->out_size = 0;
        return;
    }
    peer->out_size -= size;
    memmove(peer->out, peer->out + size, peer->out_size);
}

/* Send a message, or the first bytes of it; the rest goes before the next one. */
static void say(struct peer *peer, const uint8_t *bytes, size_t size, const struct instruction *now)
{
    const int kinds[] = {guest_fd, event_fd, small_fd, peer->fd};
    unsigned count = now->fds % 16;
    int fds[16];

    send_now(peer, peer->out_size, NULL, 0);
    for (unsigned i = 0; i < 16; i++)
        fds[i] = kinds[(now->fds >> 4) % 4];
    memcpy(peer->out, bytes, size);
    peer->out_size = size;
    send_now(peer, now->cut != 0 && now->cut < size ? now->cut : size, fds, count);
}

static bool receive_until(struct peer *peer, size_t end)
{
    while (peer->have < end) {
        union {
            struct cmsghdr align;
            char space[CMSG_SPACE(64 * sizeof(int))];
        } control;
        struct iovec iov = {peer->in + peer->have, end - peer->have};
        struct msghdr msg = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof(control.space)};
        ssize_t got = recvmsg(peer->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        if (got <= 0) {
            if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
                peer->ended = true;
            return false;
        }
        peer->have += (size_t)got;
        for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
            size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

            for (size_t i = 0; i < count; i++) {
                int fd;

                memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(int));
                if (peer->fds++ == 0)
                    peer->first_fd = fd;
                else
                    CHECK(close(fd) == 0);
            }
        }
    }
    return true;
}

/* The next whole message, or NULL. Its first descriptor is in first_fd while fds is not 0. */
static const struct vfio_user_header *hear(struct peer *peer)
{
    struct vfio_user_header *header = (struct vfio_user_header *)(void *)peer->in;

    if (peer->ended || peer->deaf || !receive_until(peer, sizeof(*header)))
        return NULL;
    CHECK(header->size >= sizeof(*header) && header->size <= MAX_MESSAGE);
    return receive_until(peer, header->size) ? header : NULL;
}

static void heard(struct peer *peer)
{
    if (peer->fds != 0)
        CHECK(close(peer->first_fd) == 0);
    peer->fds = 0;
    peer->have = 0;
}

static void remember(struct peer *peer, const struct vfio_user_header *header)
{
    if (peer->pending_count == PENDING)
        peer->garbled = true; /* we lose count */
    else
        peer->pending[peer->pending_count++] = *header;
}

static bool forget(struct peer *peer, unsigned at)
{
    if (at >= peer->pending_count)
        return false;
    peer->pending[at] = peer->pending[--peer->pending_count];
    return true;
}

static unsigned find(const struct peer *peer, uint16_t id, uint16_t command)
{
    unsigned at = 0;

    while (at < peer->pending_count && (peer->pending[at].id != id || peer->pending[at].command != command))
        at++;
    return at;
}

/* The client is answered what it asked, and asked nothing. */
static void hear_client(void)
{
    const struct vfio_user_header *header;

    while ((header = hear(&run.client)) != NULL) {
        CHECK_EQ(header->flags & ~VFIO_USER_ERROR, VFIO_USER_REPLY);
        CHECK((header->flags & VFIO_USER_ERROR) == 0 || run.server.garbled || header->error != 0);
        if (!run.client.garbled)
            CHECK(forget(&run.client, find(&run.client, header->id, header->command)));
        heard(&run.client);
    }
}

static void server_maps(const struct vfio_user_dma_map *map)
{
    struct stat status;

    CHECK_EQ(map->header.size, sizeof(*map));
    CHECK(map->size != 0 && map->address <= UINT64_MAX - (map->size - 1));
    CHECK((map->flags & ~3u) == 0 && map->flags != 0);
    CHECK(run.map_count < run.limits.max_dma_maps);
    for (unsigned i = 0; i < run.map_count; i++)
        CHECK(map->address > run.maps[i].address + (run.maps[i].size - 1) ||
              map->address + (map->size - 1) < run.maps[i].address);
    run.maps[run.map_count++] = (struct map){map->address, map->size};
    CHECK_EQ(run.server.fds, !run.strict);
    if (run.strict)
        return;
    CHECK(fstat(run.server.first_fd, &status) == 0);
    CHECK(map->offset <= (uint64_t)status.st_size && map->size <= (uint64_t)status.st_size - map->offset);
}

static void server_unmaps(const struct vfio_user_dma_unmap *unmap)
{
    unsigned at = 0;

    CHECK_EQ(unmap->header.size, sizeof(*unmap));
    CHECK_EQ(run.server.fds, 0);
    if (unmap->flags == VFIO_USER_UNMAP_ALL) {
        CHECK(unmap->address == 0 && unmap->size == 0);
        run.map_count = 0;
        return;
    }
    CHECK_EQ(unmap->flags, 0);
    while (at < run.map_count && run.maps[at].address != unmap->address)
        at++;
    CHECK(at < run.map_count);
    CHECK_EQ(run.maps[at].size, unmap->size);
    run.maps[at] = run.maps[--run.map_count];
}

static bool mapped(uint64_t address, uint64_t count, uint32_t flag)
{
    struct iova_mapping mapping;

    if (count == 0 || run.attached == DOMAINS + 1)
        return true;
    if (run.attached == 0 || address > UINT64_MAX - (count - 1))
        return false;
    for (uint64_t done = 0; done < count; done += mapping.last - (address + done) + 1) {
        if (!iova_map_find(run.books[run.attached - 1], address + done, &mapping) || (mapping.flags & flag) == 0)
            return false;
        if (mapping.last - (address + done) >= count - done - 1)
            return true;
    }
    return true;
}

/* The server has asked for DMA. sure: all of it is there to be understood now. */
static void asks_dma(const uint8_t *bytes, size_t size, bool sure)
{
    struct vfio_user_dma_access access;

    if (run.access_count == PENDING || size < sizeof(access)) {
        sure = false;
        size = sizeof(access.header);
    }
    memset(&access, 0, sizeof(access));
    memcpy(&access, bytes, size < sizeof(access) ? size : sizeof(access));
    if ((access.header.flags & VFIO_USER_NO_REPLY) != 0)
        return;
    if (run.access_count == PENDING) {
        run.server.garbled = true; /* we lose count */
        return;
    }
    run.accesses[run.access_count++] = (struct access){
        access.header.id, access.header.command,
        !sure || guest_side.busy ||
            mapped(access.address, access.count,
                   access.header.command == VFIO_USER_DMA_READ ? MAP_FLAG_READ : MAP_FLAG_WRITE)};
}

static void dma_answered(const struct vfio_user_header *reply)
{
    unsigned at = 0;

    if (run.server.garbled)
        return;
    while (at < run.access_count && (run.accesses[at].id != reply->id || run.accesses[at].command != reply->command))
        at++;
    CHECK_EQ(at, 0);
    CHECK(run.access_count != 0);
    CHECK((reply->flags & VFIO_USER_ERROR) != 0 || run.accesses[0].allowed);
    memmove(&run.accesses[0], &run.accesses[1], --run.access_count * sizeof(run.accesses[0]));
}

static void hear_server(void)
{
    const struct vfio_user_header *header;

    while ((header = hear(&run.server)) != NULL) {
        if (vfio_user_is_reply(header)) {
            CHECK(header->command == VFIO_USER_DMA_READ || header->command == VFIO_USER_DMA_WRITE ||
                  (header->flags & VFIO_USER_ERROR) != 0);
            CHECK_EQ(run.server.fds, 0);
            if (header->command == VFIO_USER_DMA_READ || header->command == VFIO_USER_DMA_WRITE)
                dma_answered(header);
        } else {
            CHECK_EQ(header->flags & ~VFIO_USER_NO_REPLY, VFIO_USER_REQUEST);
            if (header->command == VFIO_USER_DMA_MAP)
                server_maps((const struct vfio_user_dma_map *)(const void *)run.server.in);
            else if (header->command == VFIO_USER_DMA_UNMAP)
                server_unmaps((const struct vfio_user_dma_unmap *)(const void *)run.server.in);
            else
                CHECK(vfio_user_rule(header->command)->forward);
            if ((header->flags & VFIO_USER_NO_REPLY) == 0) {
                for (unsigned i = 0; i < run.server.pending_count && !run.server.garbled; i++)
                    CHECK(run.server.pending[i].id != header->id);
                remember(&run.server, header);
            }
        }
        heard(&run.server);
    }
}

/* ------------------------------------------------------------------------------------------------- the instructions */

static uint64_t address_of(const struct instruction *now)
{
    uint64_t base = (now->far & 1) != 0 ? UINT64_MAX - 0xfffff : 0;

    return base + ((uint64_t)(now->address % 64) << 12) + ((now->far & 2) != 0 ? now->bytes : 0);
}

/* Payload of a message by its command; returns its size. */
static size_t build_payload(const struct instruction *now, uint16_t command, uint8_t *bytes)
{
    struct vfio_user_dma_map map = {
        .argsz = 32,
        .flags = now->access & ((now->far & 4) != 0 ? 0xff : 3),
        .offset = (uint64_t)(now->offset % 32) << 12,
        .address = address_of(now),
        .size = (uint64_t)(now->pages % 32) << 12 | ((now->far & 8) != 0 ? now->bytes % 4096u : 0),
    };
    struct vfio_user_dma_unmap unmap = {.argsz = 24,
                                        .flags = now->access & 3,
                                        .address = (now->access & 2) != 0 ? 0 : map.address,
                                        .size = (now->access & 2) != 0 ? 0 : map.size};
    struct vfio_user_dma_access access = {.address = address_of(now), .count = now->pages % 5000u};

    switch (command) {
    case VFIO_USER_DMA_MAP:
        memcpy(bytes, &map.argsz, 32);
        return 32;
    case VFIO_USER_DMA_UNMAP:
        memcpy(bytes, &unmap.argsz, 24);
        return 24;
    case VFIO_USER_DMA_READ:
        memcpy(bytes, &access.address, 16);
        return 16;
    case VFIO_USER_DMA_WRITE:
        access.count %= 2048;
        memcpy(bytes, &access.address, 16);
        memset(bytes + 16, 0x5a, access.count);
        return 16 + (size_t)access.count;
    default:
        memset(bytes, 0x33, 4096);
        return now->bytes % 64u;
    }
}

static void message_of(struct peer *peer, const struct instruction *now, struct vfio_user_header header)
{
    static uint8_t bytes[MAX_MESSAGE];
    size_t payload = build_payload(now, header.command, bytes + sizeof(header));
    long size = (long)(sizeof(header) + payload) + now->size;
    bool intact = now->by == 0;

    if (size < (long)sizeof(header))
        size = sizeof(header);
    if (size > (long)sizeof(bytes))
        size = sizeof(bytes);
    header.size = (uint32_t)size;
    memcpy(bytes, &header, sizeof(header));
    bytes[now->field % (size_t)size] ^= now->by;
    if (!intact && now->field % (size_t)size < sizeof(header))
        peer->garbled = true;
    if (now->fds % 16 > run.limits.max_fds || !vfio_user_header_valid(&header, MAX_MESSAGE))
        peer->garbled = true; /* the end of the connection */
    if (peer == &run.client && !vfio_user_is_reply(&header) && (header.flags & VFIO_USER_NO_REPLY) == 0)
        remember(peer, &header);
    if (peer == &run.server && !vfio_user_is_reply(&header) &&
        (header.command == VFIO_USER_DMA_READ || header.command == VFIO_USER_DMA_WRITE))
        asks_dma(bytes, (size_t)size, now->cut == 0);
    say(peer, bytes, (size_t)size, now);
}

/* The server answers something it was asked, or all of that, or something else. */
static void reply_of_server(const struct instruction *now)
{
    unsigned at = run.server.pending_count != 0 ? now->id % run.server.pending_count : 0;
    struct instruction mine = *now;

    if (run.server.pending_count == 0)
        return;
    do {
        struct vfio_user_header header = run.server.pending[at];

        (void)forget(&run.server, at);
        header.flags = VFIO_USER_REPLY | (now->flags & VFIO_USER_ERROR);
        header.error = (header.flags & VFIO_USER_ERROR) != 0 ? now->access : 0;
        if (header.error == 0 && (header.flags & VFIO_USER_ERROR) != 0)
            run.server.garbled = true; /* an error that is none, passed on as it is */
        if ((now->far & 0x80) != 0)
            header.command = now->command % 20;
        message_of(&run.server, &mine, header);
        at = 0;
    } while ((now->far & 0x40) != 0 && run.server.pending_count != 0);
}

static void raw(struct peer *peer, const struct instruction *now)
{
    size_t size = now->bytes % 300u;

    size = size < run.left ? size : run.left;
    if (size != 0)
        say(peer, run.data, size, now);
    run.data += size;
    run.left -= size;
    peer->garbled = true;
}

static void guest_attach(const struct instruction *now)
{
    unsigned to = now->id % (DOMAINS + 2);
    struct stage2 *stage2 = &run.user->stage2;
    int rc;

    if (to == 0) {
        (void)stage2->ops->block(stage2, 1);
        run.attached = 0;
        return;
    }
    rc = to == DOMAINS + 1 ? stage2->ops->identity(stage2, 1) : stage2->ops->attach(stage2, 1, run.domains[to - 1]);
    if (rc == 0)
        run.attached = to;
}

static void guest_map(const struct instruction *now)
{
    unsigned to = now->id % DOMAINS;
    uint64_t first = address_of(now) & ~4095ull, pages = now->pages % 16u;
    struct iova_mapping mapping = {first, first + (pages << 12 | 4095), (uint64_t)(now->offset % 64) << 12,
                                   now->access % 3u + 1};
    struct stage2 *stage2 = &run.user->stage2;

    if (mapping.last < mapping.first || iova_map_count(run.books[to]) >= 64 ||
        iova_map_insert(run.books[to], &mapping) != 0)
        return;
    if (stage2->ops->map(stage2, run.domains[to], &mapping) != 0)
        CHECK_EQ(iova_map_remove(run.books[to], mapping.first, mapping.last, NULL), 0);
}

static void guest_unmap(const struct instruction *now)
{
    unsigned to = now->id % DOMAINS;
    uint64_t first = address_of(now) & ~4095ull, last = first + ((uint64_t)(now->pages % 64u) << 12 | 4095);
    struct stage2 *stage2 = &run.user->stage2;
    struct iova_mapping mapping;

    if ((now->far & 0x10) != 0)
        first = 0, last = UINT64_MAX;
    if (last < first)
        return;
    if (iova_map_find(run.books[to], first, &mapping) && mapping.first < first) /* none is cut by the ends */
        first = mapping.first;
    if (iova_map_find(run.books[to], last, &mapping) && mapping.last > last)
        last = mapping.last;
    (void)stage2->ops->unmap(stage2, run.domains[to], run.books[to], first, last);
    CHECK_EQ(iova_map_remove(run.books[to], first, last, NULL), 0);
}

static void guest(void (*request)(const struct instruction *), const struct instruction *now)
{
    if (guest_side.busy)
        return;
    guest_side.busy = true;
    guest_side.request = request;
    guest_side.argument = *now;
    guest_turn();
}

/* True when time has passed. */
static bool carry_out(const struct instruction *now)
{
    static const uint16_t of_server[] = {VFIO_USER_DMA_READ, VFIO_USER_DMA_WRITE};
    struct vfio_user_header header = {.id = now->id, .command = now->command % 20, .flags = now->flags & 0x30};

    switch (now->code % 16) {
    case 0:
    case 1:
        if ((now->flags & 0x40) != 0)
            header.flags |= now->flags & 15;
        message_of(&run.client, now, header);
        break;
    case 2:
        header.command = now->command % 2 == 0 ? VFIO_USER_DMA_MAP : VFIO_USER_DMA_UNMAP;
        header.flags = 0;
        message_of(&run.client, now, header);
        break;
    case 3:
        header.command = of_server[now->command % 2];
        header.flags &= VFIO_USER_NO_REPLY;
        message_of(&run.server, now, header);
        break;
    case 4:
        header.flags |= now->flags & 15;
        message_of(&run.server, now, header);
        break;
    case 5:
    case 6:
    case 7:
        reply_of_server(now);
        break;
    case 8:
        raw((now->flags & 1) != 0 ? &run.client : &run.server, now);
        break;
    case 9:
        guest(guest_attach, now);
        break;
    case 10:
    case 11:
        guest(guest_map, now);
        break;
    case 12:
        guest(guest_unmap, now);
        break;
    case 13:
        run.now += (uint64_t)now->bytes << (now->far % 32);
        return true;
    case 14:
        if (now->by == 0xee) {
            (void)shutdown(run.server.fd, (now->flags & 1) != 0 ? SHUT_WR : SHUT_RDWR);
        } else if (now->by == 0xdd) { /* with memory that is shared and mapped, perhaps */
            CHECK(ftruncate(small_fd, 0) == 0);
        } else {
            run.client.deaf = (now->flags & 1) != 0;
            run.server.deaf = (now->flags & 2) != 0;
        }
        break;
    default:
        (void)send_now(&run.client, run.client.out_size, NULL, 0);
        (void)send_now(&run.server, run.server.out_size, NULL, 0);
        break;
    }
    return false;
}

/* The relay has nothing to do: what was said has been understood. */
static void check_idle(void)
{
    uint64_t bytes = 0;

    if (run.user->state != VIOMMU_VFIO_USER_UP || run.user->server.first != NULL || run.server.ended ||
        run.server.deaf)
        return;
    for (unsigned i = 0; i < run.map_count; i++)
        bytes += run.maps[i].size;
    CHECK_EQ(run.user->maps, run.map_count);
    CHECK_EQ(run.user->stats.reachable_bytes, bytes);
}

int __wrap_epoll_wait(int epoll, struct epoll_event *events, int max, int ms)
{
    for (;;) {
        int count = __real_epoll_wait(epoll, events, max, 0);
        struct instruction now;

        hear_client();
        hear_server();
        if (count != 0 || ms == 0)
            return count;
        if (guest_side.busy) { /* what it waits for may have come */
            guest_turn();
            if ((count = __real_epoll_wait(epoll, events, max, 0)) != 0)
                return count;
            hear_server();
        }
        check_idle();
        if (run.left < sizeof(now)) {
            CHECK(shutdown(run.client.fd, SHUT_RDWR) == 0 || errno == ENOTCONN);
            ms = 0;
            continue;
        }
        memcpy(&now, run.data, sizeof(now));
        run.data += sizeof(now);
        run.left -= sizeof(now);
        if (carry_out(&now))
            return 0;
    }
}

/* -------------------------------------------------------------------------------------------------------- one input */

static void raise_fault(void *context, uint32_t endpoint, enum fault_reason reason, uint32_t flags, uint64_t address)
{
    (void)context;
    (void)address;
    CHECK_EQ(endpoint, 1);
    CHECK(reason <= FAULT_MAPPING && (flags & FAULT_FLAG_ADDRESS) != 0);
    run.faults++;
}

static int peer_open(struct peer *peer)
{
    int ends[2], room = 1; /* the least there is, so that a few messages fill it */

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK(setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) == 0);
    peer->fd = ends[0];
    return ends[1];
}

static void init(void)
{
    uint8_t *ram;

    guest_fd = memfd_create("guest", MFD_CLOEXEC);
    small_fd = memfd_create("small", MFD_CLOEXEC);
    event_fd = eventfd(0, EFD_CLOEXEC);
    CHECK(guest_fd >= 0 && small_fd >= 0 && event_fd >= 0);
    CHECK(ftruncate(guest_fd, GUEST_BYTES) == 0 && ftruncate(small_fd, 4096) == 0);
    ram = mmap(NULL, GUEST_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, guest_fd, 0);
    CHECK(ram != MAP_FAILED);
    CHECK(sem_init(&guest_side.turn, 0, 0) == 0 && sem_init(&guest_side.back, 0, 0) == 0);
    CHECK_EQ(pthread_create(&guest_side.thread, NULL, guest_thread, NULL), 0);
}

static int lowest_fd(void)
{
    int fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 3);

    CHECK(fd >= 0 && close(fd) == 0);
    return fd;
}

static void begin(const struct header *header)
{
    const struct viommu_vfio_user_settings settings = {
        .endpoint = 1,
        .mode = header->strict % 2,
        .timeout_ms = 1 + header->timeouts % 8u * 1000,
        .reply_timeout_ms = header->timeouts / 8 % 8u * 1000,
    };
    const struct vfio_user_faults faults = {.raise = raise_fault};
    int client, server;

    CHECK(ftruncate(small_fd, 4096) == 0);
    run.now = 1000000000000;
    run.strict = settings.mode == VIOMMU_VFIO_USER_STRICT;
    run.limits = (struct viommu_vfio_user_limits){header->max_fds % 12u + 1, header->max_maps % 200u + 1, MAX_TRANSFER};
    CHECK_EQ(vfio_user_new(&settings, &faults, &run.user), 0);
    run.pool = iova_pool_new(NULL);
    CHECK(run.pool != NULL);
    for (unsigned i = 0; i < DOMAINS; i++) {
        CHECK_EQ(run.user->stage2.ops->open(&run.user->stage2, i, &run.domains[i]), 0);
        run.books[i] = iova_map_new(run.pool);
        CHECK(run.books[i] != NULL);
    }
    client = peer_open(&run.client);
    server = peer_open(&run.server);
    CHECK_EQ(viommu_vfio_user_connect(run.user, client, server, &run.limits), 0);
    CHECK(close(client) == 0 && close(server) == 0);
}

static void end(void)
{
    while (guest_side.busy) /* the connection it waits for has ended */
        guest_turn();
    run.client.deaf = run.server.deaf = false;
    hear_client();
    hear_server();
    heard(&run.client);
    heard(&run.server);
    CHECK_EQ(run.user->state, VIOMMU_VFIO_USER_ABSENT);
    CHECK_EQ(run.user->stats.reachable_bytes, 0);
    CHECK_EQ(run.user->stats.memory_bytes, 0);
    CHECK_EQ(run.user->stage2.ops->block(&run.user->stage2, 1), 0);
    for (unsigned i = 0; i < DOMAINS; i++) {
        run.user->stage2.ops->close(&run.user->stage2, run.domains[i]);
        iova_map_free(run.books[i]);
    }
    iova_pool_free(run.pool);
    vfio_user_free(run.user);
    CHECK(close(run.client.fd) == 0 && close(run.server.fd) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct header header = {0};
    size_t head = size < sizeof(header) ? size : sizeof(header);
    int before;

    if (guest_fd == 0)
        init();
    if (head != 0)
        memcpy(&header, data, head);
    memset(&run, 0, sizeof(run));
    run.data = data + head;
    run.left = size - head;
    before = lowest_fd();
    begin(&header);
    (void)relay(run.user);
    end();
    CHECK_EQ(lowest_fd(), before);
    return 0;
}
