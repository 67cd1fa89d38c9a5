/* One end of a vfio-user connection: whatever pieces a stream comes in, the messages and their descriptors are these. */
#include "vfio_user_link.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

#define MAX_SIZE 40000u
#define MAX_FDS 4u
#define MESSAGES 3000u

static struct vfio_user_link link_;
static int peer;

static void set_up(void)
{
    int ends[2];

    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    CHECK_EQ(vfio_user_link_init(&link_, ends[0], MAX_SIZE, MAX_FDS), 0);
    peer = ends[1];
}

static void tear_down(void)
{
    vfio_user_link_fini(&link_);
    if (peer >= 0)
        CHECK_EQ(close(peer), 0);
}

/* A file whose size tells it from others. */
static int file_of(off_t size)
{
    int fd = memfd_create("link", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, size), 0);
    return fd;
}

static off_t size_of(int fd)
{
    struct stat st;

    CHECK_EQ(fstat(fd, &st), 0);
    return st.st_size;
}

/* As much as the socket takes, with count files whose sizes are first, first + 1, ...; how much that was. */
static size_t put(const void *bytes, size_t size, unsigned count, off_t first)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(8 * sizeof(int))];
    } control = {0};
    struct iovec iov = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    int fds[8];
    ssize_t sent;

    for (unsigned i = 0; i < count; i++)
        fds[i] = file_of(first + (off_t)i);
    if (count != 0) {
        struct cmsghdr *cmsg = (struct cmsghdr *)control.space;

        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(count * sizeof(int));
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, count * sizeof(int));
    }
    sent = sendmsg(peer, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    CHECK(sent >= 0 || errno == EAGAIN);
    for (unsigned i = 0; i < count; i++)
        (void)close(fds[i]);
    return sent < 0 ? 0 : (size_t)sent;
}

static struct vfio_user_header header_of(uint16_t id, size_t size)
{
    return (struct vfio_user_header){.id = id, .command = VFIO_USER_REGION_WRITE, .size = (uint32_t)size};
}

/* A whole message without payload. */
static void put_header(uint16_t id, unsigned fds)
{
    struct vfio_user_header header = header_of(id, sizeof(header));

    CHECK_EQ(put(&header, sizeof(header), fds, id * 10), sizeof(header));
}

/* What there is to receive, as a loop that waits for events would find it: the first "nothing" may be a guess. */
static int receive(struct vfio_user_message **message)
{
    int rc = vfio_user_link_receive(&link_, message);

    CHECK(rc != 0 || !vfio_user_link_pending(&link_));
    return rc != 0 ? rc : vfio_user_link_receive(&link_, message);
}

static void expect(uint16_t id, unsigned fds)
{
    struct vfio_user_message *message;

    CHECK_EQ(receive(&message), 1);
    CHECK_EQ(message->header.id, id);
    CHECK_EQ(message->fd_count, fds);
    for (unsigned i = 0; i < fds; i++)
        CHECK_EQ(size_of(message->fds[i]), id * 10 + (int)i);
}

static unsigned open_files(void)
{
    unsigned count = 0;

    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
    return count;
}

/* Messages that wait together are read together, and descriptors are those of the message they were sent with. */
static void descriptors_stay_with_their_message(void)
{
    unsigned before = open_files();
    struct vfio_user_message *message;

    set_up();
    put_header(1, 0);
    put_header(2, 2);
    put_header(3, 0);
    put_header(4, 0);
    put_header(5, MAX_FDS);
    put_header(6, 1);
    expect(1, 0);
    CHECK(vfio_user_link_pending(&link_));
    expect(2, 2);
    CHECK(!vfio_user_link_pending(&link_));
    expect(3, 0);
    CHECK(vfio_user_link_pending(&link_));
    expect(4, 0);
    expect(5, MAX_FDS);
    expect(6, 1);
    CHECK_EQ(receive(&message), 0);
    tear_down();
    CHECK_EQ(open_files(), before);
}

/* A message whose end waits for another read keeps its descriptors; those of the next one are not mixed in. */
static void descriptors_of_a_message_in_two_parts(void)
{
    struct vfio_user_header header = header_of(2, sizeof(header));
    struct vfio_user_message *message;

    set_up();
    put_header(1, 0);
    CHECK_EQ(put(&header, 10, 2, 20), 10);
    expect(1, 0);
    CHECK_EQ(receive(&message), 0);
    CHECK_EQ(put((const uint8_t *)&header + 10, 6, 0, 0), 6);
    put_header(3, 3);
    expect(2, 2);
    expect(3, 3);
    tear_down();
}

/* Too many descriptors for one message, at once or in parts: an error, and none stays open. */
static void too_many_descriptors(void)
{
    struct vfio_user_header header = header_of(2, sizeof(header));
    unsigned before = open_files();
    struct vfio_user_message *message;

    set_up();
    put_header(1, MAX_FDS + 1);
    CHECK_EQ(receive(&message), -EPROTO);
    tear_down();
    set_up();
    CHECK_EQ(put(&header, 10, 3, 1), 10);
    CHECK_EQ(put((const uint8_t *)&header + 10, 6, 2, 1), 6);
    CHECK_EQ(receive(&message), -EPROTO);
    tear_down();
    CHECK_EQ(open_files(), before);
}

/* Descriptors of messages that were read ahead and never asked for are closed with the link. */
static void descriptors_that_nobody_asked_for(void)
{
    unsigned before = open_files();

    set_up();
    put_header(1, 0);
    put_header(2, 3);
    expect(1, 0);
    CHECK(vfio_user_link_pending(&link_));
    tear_down();
    CHECK_EQ(open_files(), before);
}

/* The end of the stream: between two messages, also when they were read ahead; and within one. */
static void the_end_of_the_stream(void)
{
    struct vfio_user_header header = header_of(3, sizeof(header));
    struct vfio_user_message *message;

    for (unsigned within = 0; within < 2; within++) {
        set_up();
        put_header(1, 0);
        put_header(2, 0);
        if (within != 0)
            CHECK_EQ(put(&header, 15, 0, 0), 15);
        CHECK_EQ(close(peer), 0);
        peer = -1;
        expect(1, 0);
        expect(2, 0);
        CHECK_EQ(receive(&message), within != 0 ? -EPROTO : -ENOTCONN);
        tear_down();
    }
}

static unsigned fds_of[MESSAGES];
static uint16_t received;

/* Take a message if there is one; it is the next, as it was sent. */
static bool take_next(void)
{
    struct vfio_user_message *message;
    int rc = receive(&message);

    if (rc == 0)
        return false;
    CHECK_EQ(rc, 1);
    CHECK_EQ(message->header.id, received);
    for (size_t i = sizeof(message->header); i < message->header.size; i++)
        CHECK_EQ(message->bytes[i], received & 0xff);
    CHECK_EQ(message->fd_count, fds_of[received]);
    for (unsigned i = 0; i < message->fd_count; i++)
        CHECK_EQ(size_of(message->fds[i]), received * 10 + (int)i);
    received++;
    return true;
}

/* Messages of any size, sent in pieces of any size and read whenever: all arrive, as they were, with their files. */
static void random_streams(void)
{
    static uint8_t bytes[MAX_SIZE];
    uint64_t state = 7;

    set_up();
    for (uint16_t id = 0; id < MESSAGES; id++) {
        size_t size = sizeof(struct vfio_user_header), at = 0;
        struct vfio_user_header header;

        size += check_random(&state) % (id % 7 == 0 ? MAX_SIZE - size : 100);
        fds_of[id] = id % 5 == 3 ? (unsigned)(check_random(&state) % (MAX_FDS + 1)) : 0;
        header = header_of(id, size);
        memset(bytes, id & 0xff, size);
        memcpy(bytes, &header, sizeof(header));
        while (at < size) {
            size_t piece = check_random(&state) % 3 == 0 ? 1 + check_random(&state) % (size - at) : size - at;
            size_t sent = put(bytes + at, piece, at == 0 ? fds_of[id] : 0, id * 10);

            at += sent;
            while ((sent == 0 || check_random(&state) % 8 == 0) && take_next())
                sent = 1;
        }
    }
    while (take_next())
        continue;
    CHECK_EQ(received, MESSAGES);
    tear_down();
}

int main(void)
{
    RUN(descriptors_stay_with_their_message);
    RUN(descriptors_of_a_message_in_two_parts);
    RUN(too_many_descriptors);
    RUN(descriptors_that_nobody_asked_for);
    RUN(the_end_of_the_stream);
    RUN(random_streams);
    return 0;
}
