#include "vfio_user_link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "viommu.h"

/* A message that waits to be sent. */
struct vfio_user_packet {
    struct vfio_user_packet *next;
    size_t size;
    size_t sent;
    struct viommu_region *region; /* its file goes along; a reference */
    uint8_t *bytes;               /* behind the descriptors */
    unsigned fd_count;
    int fds[];
};

static void close_all(const int *fds, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        (void)close(fds[i]);
}

int vfio_user_link_init(struct vfio_user_link *link, int fd, size_t max_size, unsigned max_fds)
{
    memset(link, 0, sizeof(*link));
    link->in.bytes = malloc(max_size); /* mostly never touched: messages are small */
    if (link->in.bytes == NULL)
        return -ENOMEM;
    link->fd = fd;
    link->max_size = max_size;
    link->max_fds = max_fds < VFIO_USER_MAX_FDS ? max_fds : VFIO_USER_MAX_FDS;
    return 0;
}

void vfio_user_link_fini(struct vfio_user_link *link)
{
    vfio_user_link_drop(link);
    vfio_user_message_close(&link->in);
    close_all(link->late, link->late_count);
    free(link->in.bytes);
    (void)close(link->fd);
    memset(link, 0, sizeof(*link));
    link->fd = -1;
}

void vfio_user_message_close(struct vfio_user_message *message)
{
    close_all(message->fds, message->fd_count);
    message->fd_count = 0;
}

/* ---------------------------------------------------------------------------------------------------- receiving */

/* Take over the descriptors of one read. -EPROTO when there are more than the message may have. */
static int take_fds(struct vfio_user_link *link, struct msghdr *msg)
{
    int rc = (msg->msg_flags & MSG_CTRUNC) != 0 ? -EPROTO : 0;

    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg != NULL; cmsg = CMSG_NXTHDR(msg, cmsg)) {
        size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(int));
            if (link->late_count < link->max_fds) {
                link->late[link->late_count++] = fd;
            } else {
                (void)close(fd);
                rc = -EPROTO;
            }
        }
    }
    return rc;
}

/* One read: how many bytes came, 0 when there are none now, -errno. */
static ssize_t read_some(struct vfio_user_link *link, void *bytes, size_t size)
{
    union {
        struct cmsghdr align;
        /* As many as the kernel lets a message carry (SCM_MAX_FD), so that none is lost unseen. */
        char space[CMSG_SPACE(253 * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = bytes, .iov_len = size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t got;
    int rc;

    if (link->drained) { /* more may have come; whoever waits for it is told */
        link->drained = false;
        return 0;
    }
    do {
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
        got = recvmsg(link->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
    rc = take_fds(link, &msg);
    if (rc != 0)
        return rc;
    if (got == 0)
        return link->have == 0 ? -ENOTCONN : -EPROTO;
    link->drained = (size_t)got < size && link->late_count == 0;
    return got;
}

/* What was read ahead ends in the message under way: that is the one the descriptors came with. */
static int adopt_fds(struct vfio_user_link *link)
{
    if (link->late_count > link->max_fds - link->in.fd_count)
        return -EPROTO;
    for (unsigned i = 0; i < link->late_count; i++)
        link->in.fds[link->in.fd_count++] = link->late[i];
    link->late_count = 0;
    return 0;
}

/* Complete the message up to the given byte: 1 when that is so, 0 when not yet, -errno. */
static int fill_until(struct vfio_user_link *link, size_t end)
{
    while (link->have < end) {
        size_t missing = end - link->have, ahead = link->ahead_end - link->ahead_at;
        ssize_t got;
        int rc;

        if (ahead != 0) {
            size_t part = ahead < missing ? ahead : missing;

            memcpy(link->in.bytes + link->have, link->ahead + link->ahead_at, part);
            link->have += part;
            link->ahead_at += part;
            rc = link->ahead_at == link->ahead_end ? adopt_fds(link) : 0;
            if (rc != 0)
                return rc;
        } else if (missing >= sizeof(link->ahead)) { /* much of one message: straight to its place */
            got = read_some(link, link->in.bytes + link->have, missing);
            if (got <= 0)
                return (int)got;
            link->have += (size_t)got;
            rc = adopt_fds(link);
            if (rc != 0)
                return rc;
        } else {
            got = read_some(link, link->ahead, sizeof(link->ahead));
            if (got <= 0)
                return (int)got;
            link->ahead_at = 0;
            link->ahead_end = (size_t)got;
        }
    }
    return 1;
}

int vfio_user_link_receive(struct vfio_user_link *link, struct vfio_user_message **out)
{
    int rc;

    if (link->delivered) {
        vfio_user_message_close(&link->in);
        link->delivered = false;
        link->have = 0;
    }
    if (link->have < sizeof(link->in.header)) {
        rc = fill_until(link, sizeof(link->in.header));
        if (rc <= 0)
            return rc;
        memcpy(&link->in.header, link->in.bytes, sizeof(link->in.header));
        if (!vfio_user_header_valid(&link->in.header, link->max_size))
            return -EPROTO;
    }
    rc = fill_until(link, link->in.header.size);
    if (rc <= 0)
        return rc;
    link->delivered = true;
    *out = &link->in;
    return 1;
}

/* ------------------------------------------------------------------------------------------------------ sending */

/* How many bytes the peer took; the descriptors go with the first. -EAGAIN when it takes none now. */
static ssize_t send_some(struct vfio_user_link *link, const uint8_t *bytes, size_t size, const int *fds,
                         unsigned fd_count)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(VFIO_USER_MAX_FDS * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t sent;

    if (fd_count != 0) {
        struct cmsghdr *cmsg;

        memset(&control, 0, sizeof(control));
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, fd_count * sizeof(int));
    }
    do
        sent = sendmsg(link->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return sent;
    if (errno == ETOOMANYREFS) {
        /* The user has too many descriptors in flight, in whichever sockets. They become fewer as peers read. */
        link->starved = true;
        return -EAGAIN;
    }
    return errno == EWOULDBLOCK ? -EAGAIN : -errno;
}

static int enqueue(struct vfio_user_link *link, const uint8_t *bytes, size_t size, size_t sent, const int *fds,
                   unsigned fd_count, struct viommu_region *region)
{
    struct vfio_user_packet *packet = malloc(sizeof(*packet) + fd_count * sizeof(int) + size);

    if (packet == NULL) {
        close_all(fds, fd_count);
        return -ENOMEM;
    }
    packet->next = NULL;
    packet->size = size;
    packet->sent = sent;
    packet->bytes = (uint8_t *)&packet->fds[fd_count];
    packet->fd_count = fd_count;
    packet->region = region;
    if (region != NULL)
        region->refs++;
    if (fd_count != 0)
        memcpy(packet->fds, fds, fd_count * sizeof(int));
    memcpy(packet->bytes, bytes, size);
    if (link->last != NULL)
        link->last->next = packet;
    else
        link->first = packet;
    link->last = packet;
    link->queued += sizeof(*packet) + size;
    return 0;
}

int vfio_user_link_send(struct vfio_user_link *link, const void *bytes, size_t size, const int *fds,
                        unsigned fd_count, struct viommu_region *region)
{
    size_t sent = 0;

    if (link->first == NULL) {
        ssize_t rc = region != NULL ? send_some(link, bytes, size, &region->fd, 1)
                                    : send_some(link, bytes, size, fds, fd_count);

        if (rc < 0 && rc != -EAGAIN) {
            close_all(fds, fd_count);
            return (int)rc;
        }
        if (rc > 0) { /* descriptors are with the peer */
            close_all(fds, fd_count);
            fd_count = 0;
            region = NULL;
            sent = (size_t)rc;
        }
        if (sent == size)
            return 0;
    }
    return enqueue(link, bytes, size, sent, fds, fd_count, region);
}

static void drop_first(struct vfio_user_link *link)
{
    struct vfio_user_packet *packet = link->first;

    link->first = packet->next;
    if (link->first == NULL)
        link->last = NULL;
    link->queued -= sizeof(*packet) + packet->size;
    close_all(packet->fds, packet->fd_count);
    viommu_region_free(packet->region);
    free(packet);
}

int vfio_user_link_flush(struct vfio_user_link *link)
{
    link->starved = false;
    while (link->first != NULL) {
        struct vfio_user_packet *packet = link->first;
        const int *fds = packet->region != NULL ? &packet->region->fd : packet->fds;
        unsigned fd_count = packet->region != NULL ? 1 : packet->fd_count;
        ssize_t rc = send_some(link, packet->bytes + packet->sent, packet->size - packet->sent, fds, fd_count);

        if (rc == -EAGAIN)
            return 0;
        if (rc < 0)
            return (int)rc;
        close_all(packet->fds, packet->fd_count);
        packet->fd_count = 0;
        viommu_region_free(packet->region);
        packet->region = NULL;
        packet->sent += (size_t)rc;
        if (packet->sent == packet->size)
            drop_first(link);
    }
    return 0;
}

void vfio_user_link_drop(struct vfio_user_link *link)
{
    while (link->first != NULL)
        drop_first(link);
    link->starved = false;
}
