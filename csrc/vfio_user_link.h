/*
 * One end of a vfio-user connection: whole messages in, whole messages out, never blocking.
 *
 * Most messages are small, so a read takes what is there, several of them if it happens so. Descriptors are not mixed
 * up by that: a read ends behind the first bytes that descriptors were sent with (unix(7), SCM_RIGHTS), and so they are
 * those of the last message that begins in it. What the peer does not take at once is kept in a queue, in order;
 * whoever sends looks at its length first, so that it stays bounded.
 *
 * Receiving and sending share nothing: they may be done by two threads, if each is done by one at a time.
 */
#ifndef VIOMMU_VFIO_USER_LINK_H
#define VIOMMU_VFIO_USER_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest_memory.h"
#include "vfio_user_message.h"

/* Most descriptors one message may carry here; what is agreed on in VERSION may be less. */
#define VFIO_USER_MAX_FDS 64u
/* Bytes read ahead at most. */
#define VFIO_USER_AHEAD 4096u

struct vfio_user_message {
    struct vfio_user_header header; /* checked: a copy of what bytes begins with */
    uint8_t *bytes;                 /* the whole message; belongs to the link until the next receive */
    int fds[VFIO_USER_MAX_FDS];     /* close-on-exec, owned by the message */
    unsigned fd_count;
};

struct vfio_user_packet;

struct vfio_user_link {
    int fd;
    /* receiving */
    size_t max_size;
    unsigned max_fds;
    size_t have;                    /* bytes of the message under way */
    bool delivered;                 /* the message is complete and was handed out */
    struct vfio_user_message in;
    size_t ahead_at;                /* what was read and is in no message yet: ahead[ahead_at..ahead_end) */
    size_t ahead_end;
    bool drained;                   /* there was no more when it was read */
    unsigned late_count;
    int late[VFIO_USER_MAX_FDS];    /* descriptors of the last message in it */
    uint8_t ahead[VFIO_USER_AHEAD];
    /* sending */
    struct vfio_user_packet *first;
    struct vfio_user_packet *last;
    size_t queued;                  /* bytes that wait, bookkeeping included */
    bool starved;                   /* too many descriptors in flight: try again soon, no event will tell */
};

/* Messages of at most max_size bytes and max_fds descriptors come in. The link owns fd from success on. */
int vfio_user_link_init(struct vfio_user_link *link, int fd, size_t max_size, unsigned max_fds);
void vfio_user_link_fini(struct vfio_user_link *link);

/*
 * The next message: 1 and *out, 0 when it has not all arrived, -ENOTCONN when the peer closed between two messages,
 * another negative errno when the peer cannot be understood any more. Descriptors that nobody took out of the
 * message are closed at the next call.
 */
int vfio_user_link_receive(struct vfio_user_link *link, struct vfio_user_message **out);

/*
 * Whether there is something to receive that was read from the socket already: no event will tell. Never so when the
 * last receive gave no message.
 */
static inline bool vfio_user_link_pending(const struct vfio_user_link *link)
{
    return link->ahead_at != link->ahead_end;
}

/* Close the descriptors of a message; those taken out (count 0) are left alone. */
void vfio_user_message_close(struct vfio_user_message *message);

/*
 * Send, or queue behind what waits. fds are consumed in any case. A region's file goes along where region is not
 * NULL (and fds is); it is referenced while the message waits. 0, or -errno when the peer is gone or memory is short.
 */
int vfio_user_link_send(struct vfio_user_link *link, const void *bytes, size_t size, const int *fds,
                        unsigned fd_count, struct viommu_region *region);

/* Send what waits, as far as the peer takes it: 0 or -errno. */
int vfio_user_link_flush(struct vfio_user_link *link);
/* Forget what waits. */
void vfio_user_link_drop(struct vfio_user_link *link);

#endif
