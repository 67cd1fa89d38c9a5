#include "transport.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vfio_user.h"

static volatile sig_atomic_t stopped;
static sigset_t while_waiting;

static void on_stop(int number)
{
    (void)number;
    stopped = 1;
}

void transport_catch_stop(void)
{
    struct sigaction action = {.sa_handler = on_stop};
    sigset_t stop;

    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    sigprocmask(SIG_BLOCK, &stop, &while_waiting);
    sigdelset(&while_waiting, SIGTERM);
    sigdelset(&while_waiting, SIGINT);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
}

bool transport_stopped(void)
{
    return stopped != 0;
}

static int wait_for(int fd, short events)
{
    struct pollfd poll_fd = {.fd = fd, .events = events};

    for (;;) {
        if (ppoll(&poll_fd, 1, NULL, &while_waiting) >= 0)
            return stopped ? -EINTR : 0;
        if (errno != EINTR)
            return -errno;
        if (stopped)
            return -EINTR;
    }
}

int transport_listen(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd, error;

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    memcpy(address.sun_path, path, strlen(path) + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    unlink(path);
    if (bind(fd, (const struct sockaddr *)&address, sizeof(address)) == 0 && listen(fd, 1) == 0)
        return fd;
    error = -errno;
    close(fd);
    return error;
}

int transport_accept(int listener)
{
    for (;;) {
        int error = wait_for(listener, POLLIN);
        int fd;

        if (error != 0)
            return error;
        fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            return fd;
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            return -errno;
    }
}

int transport_send(int socket, struct iovec *parts, size_t count)
{
    while (count > 0) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent < 0) {
            int error = errno == EAGAIN ? wait_for(socket, POLLOUT) : -errno;

            if (error != 0 && error != -EINTR)
                return error;
            if (stopped)
                return -EINTR;
            continue;
        }
        for (; count > 0 && (size_t)sent >= parts->iov_len; parts++, count--)
            sent -= (ssize_t)parts->iov_len;
        if (count > 0) {
            parts->iov_base = (char *)parts->iov_base + sent;
            parts->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

static void take_fds(struct msghdr *message, int *fds, size_t *fd_count)
{
    for (struct cmsghdr *control = CMSG_FIRSTHDR(message); control != NULL; control = CMSG_NXTHDR(message, control)) {
        size_t count;

        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
            continue;
        count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
            if (*fd_count < VFU_MAX_FDS)
                fds[(*fd_count)++] = fd;
            else
                close(fd);
        }
    }
}

int transport_receive(int socket, void *buffer, size_t length, int *fds, size_t *fd_count)
{
    char *at = buffer;

    while (length > 0) {
        union {
            char bytes[CMSG_SPACE(VFU_MAX_FDS * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec part = {.iov_base = at, .iov_len = length};
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
        ssize_t received = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        if (received == 0)
            return -ECONNRESET;
        if (received < 0) {
            int error = errno == EAGAIN ? wait_for(socket, POLLIN) : -errno;

            if (error != 0 && error != -EINTR)
                return error;
            if (stopped)
                return -EINTR;
            continue;
        }
        take_fds(&message, fds, fd_count);
        at += received;
        length -= (size_t)received;
    }
    return 0;
}
