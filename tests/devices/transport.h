/*
 * Bytes and descriptors of one vfio-user connection. Waiting ends at once when the program is asked to stop (SIGTERM
 * or SIGINT), also in the middle of a message.
 */
#ifndef TRANSPORT_H
#define TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

/* Block SIGTERM and SIGINT but for the waits below, which they end. Once, before anything else. */
void transport_catch_stop(void);
bool transport_stopped(void);

/* Listen on a UNIX socket at path, replacing what is there: a descriptor or -errno. */
int transport_listen(const char *path);
/* The next client: a descriptor, -EINTR when asked to stop, or -errno. */
int transport_accept(int listener);

/* Send all the bytes. 0, -EINTR when asked to stop, -EPIPE or another -errno when the peer is gone. */
int transport_send(int socket, struct iovec *parts, size_t count);

/*
 * Receive exactly length bytes. Descriptors that come with them are appended to fds (room for VFU_MAX_FDS in all),
 * the caller owns them; more than there is room for are closed by the kernel. 0, -ECONNRESET at the end of the stream,
 * -EINTR when asked to stop, or -errno.
 */
int transport_receive(int socket, void *buffer, size_t length, int *fds, size_t *fd_count);

#endif
