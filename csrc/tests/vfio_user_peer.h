/*
 * The two peers of a relay, for tests: plain blocking sockets and messages, written from the protocol
 * (libvfio-user's docs/vfio-user.rst), so that they can also say what no client and no server should.
 */
#ifndef VIOMMU_TESTS_VFIO_USER_PEER_H
#define VIOMMU_TESTS_VFIO_USER_PEER_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "check.h"
#include "vfio_user_message.h"

#define PEER_DATA (1u << 20)

struct peer_message {
    struct vfio_user_header header;
    uint8_t payload[PEER_DATA + 64];
    int fds[32];
    unsigned fd_count;
};

/* ends[0] is the test's, ends[1] the relay's. */
static inline void peer_pair(int ends[2])
{
    struct timeval patience = {.tv_sec = 60};

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK(setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) == 0);
    CHECK(setsockopt(ends[0], SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) == 0);
}

/* Bytes as they are, with descriptors; they stay the caller's. */
static inline void peer_send_raw(int fd, const void *bytes, size_t size, const int *fds, unsigned fd_count)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(253 * sizeof(int))];
    } control = {0};
    struct iovec iov = {(void *)(uintptr_t)bytes, size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

    if (fd_count != 0) {
        struct cmsghdr *cmsg;

        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, fd_count * sizeof(int));
    }
    while (iov.iov_len != 0) {
        ssize_t sent = sendmsg(fd, &msg, MSG_NOSIGNAL);

        CHECK(sent > 0);
        iov.iov_base = (uint8_t *)iov.iov_base + sent;
        iov.iov_len -= (size_t)sent;
        msg.msg_control = NULL;
        msg.msg_controllen = 0;
    }
}

static inline void peer_send_fds(int fd, uint16_t id, uint16_t command, uint32_t flags, uint32_t error,
                                 const void *payload, size_t size, const int *fds, unsigned fd_count)
{
    static uint8_t bytes[16 + PEER_DATA + 64];
    struct vfio_user_header header = {id, command, (uint32_t)(sizeof(header) + size), flags, error};

    memcpy(bytes, &header, sizeof(header));
    if (size != 0)
        memcpy(bytes + sizeof(header), payload, size);
    peer_send_raw(fd, bytes, sizeof(header) + size, fds, fd_count);
}

static inline void peer_send(int fd, uint16_t id, uint16_t command, uint32_t flags, const void *payload, size_t size)
{
    peer_send_fds(fd, id, command, flags, 0, payload, size, NULL, 0);
}

/* Exactly size bytes; false when the other end closed first. Descriptors are collected. */
static inline bool peer_read(int fd, void *bytes, size_t size, struct peer_message *message)
{
    size_t have = 0;

    while (have < size) {
        union {
            struct cmsghdr align;
            char space[CMSG_SPACE(32 * sizeof(int))];
        } control;
        struct iovec iov = {(uint8_t *)bytes + have, size - have};
        struct msghdr msg = {
            .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof(control.space)};
        ssize_t got = recvmsg(fd, &msg, MSG_CMSG_CLOEXEC);

        if (got == 0 || (got < 0 && errno == ECONNRESET))
            return false;
        CHECK(got > 0);
        have += (size_t)got;
        for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
            size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

            memcpy(&message->fds[message->fd_count], CMSG_DATA(cmsg), count * sizeof(int));
            message->fd_count += (unsigned)count;
        }
    }
    return true;
}

/* The next message, or false at the end of the connection. */
static inline bool peer_receive(int fd, struct peer_message *message)
{
    message->fd_count = 0;
    if (!peer_read(fd, &message->header, sizeof(message->header), message))
        return false;
    CHECK(message->header.size >= sizeof(message->header));
    CHECK(message->header.size - sizeof(message->header) <= sizeof(message->payload));
    return peer_read(fd, message->payload, message->header.size - sizeof(message->header), message);
}

/* Something can be read at once. */
static inline bool peer_readable(int fd)
{
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};

    return poll(&pollfd, 1, 0) == 1;
}

static inline void peer_close_fds(struct peer_message *message)
{
    for (unsigned i = 0; i < message->fd_count; i++)
        CHECK(close(message->fds[i]) == 0);
    message->fd_count = 0;
}

/* Answer a request that was received; error is a positive errno or 0. */
static inline void peer_reply(int fd, const struct peer_message *request, int error, const void *payload, size_t size)
{
    peer_send_fds(fd, request->header.id, request->header.command,
                  VFIO_USER_REPLY | (error != 0 ? VFIO_USER_ERROR : 0), (uint32_t)error, payload, size, NULL, 0);
}

#endif
