/*
 * The relay: one thread per connected vfio-user endpoint, between its client and its server. It waits for either,
 * moves whole messages, and serves the server's DMA. It never waits for one of them alone, nor for the control plane.
 */
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "counters.h"
#include "vfio_user.h"

/* Messages of one side handled before the other is looked at. */
#define TURN 32u
/* How soon to try again when the kernel counts too many descriptors in flight. */
#define STARVED_MS 1

/* --------------------------------------------------------------------------------------- messages of the server */

/* Answer the server. If it does not take the answer it is lost. */
static void reply_to_server(struct viommu_vfio_user *user, const void *bytes, size_t size)
{
    int rc;

    (void)pthread_mutex_lock(&user->lock);
    if (user->state == VIOMMU_VFIO_USER_UP) {
        rc = vfio_user_link_send(&user->server, bytes, size, NULL, 0, NULL);
        if (rc != 0)
            vfio_user_cut(user, rc == -ENOMEM ? VIOMMU_VFIO_USER_NOMEM : VIOMMU_VFIO_USER_GONE);
    }
    (void)pthread_mutex_unlock(&user->lock);
}

/* DMA_READ or DMA_WRITE. The reply is built in the buffer of the request, which has room for any. */
static void serve_dma(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    struct vfio_user_dma_access access, reply = {.header = message->header};
    bool read = message->header.command == VFIO_USER_DMA_READ;
    uint8_t *data = message->bytes + sizeof(access);
    size_t size = sizeof(reply.header);
    int error = EINVAL;

    if (message->header.size >= sizeof(access)) {
        uint64_t payload = message->header.size - sizeof(access);

        memcpy(&access, message->bytes, sizeof(access));
        reply = access;
        if (access.count > user->limits.max_transfer)
            error = E2BIG;
        else if (payload == (read ? 0 : access.count))
            error = vfio_user_dma(user, read ? MAP_FLAG_READ : MAP_FLAG_WRITE, access.address, data, access.count);
    }
    if (error == 0)
        size = sizeof(reply) + (read ? (size_t)access.count : 0);
    else if (error == EINVAL || error == E2BIG)
        count_add(&user->stats.refused, 1);
    if ((message->header.flags & VFIO_USER_NO_REPLY) != 0)
        return;
    reply.header = vfio_user_reply_to(&message->header, size, error);
    memcpy(message->bytes, &reply, size < sizeof(reply) ? size : sizeof(reply));
    reply_to_server(user, message->bytes, size);
}

/* A request of the server: DMA, or nothing we know. */
static void serve(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    struct vfio_user_header reply = vfio_user_reply_to(&message->header, sizeof(reply), ENOTSUP);

    if (message->header.command == VFIO_USER_DMA_READ || message->header.command == VFIO_USER_DMA_WRITE)
        serve_dma(user, message);
    else if ((message->header.flags & VFIO_USER_NO_REPLY) == 0)
        reply_to_server(user, &reply, sizeof(reply));
}

/* The answer to a request of viommud. The lock is held. */
static void settle_own(struct viommu_vfio_user *user, struct vfio_user_call *call,
                      const struct vfio_user_message *message)
{
    if ((message->header.flags & VFIO_USER_ERROR) != 0) {
        vfio_user_cut(user, VIOMMU_VFIO_USER_REFUSED);
        return;
    }
    if (call->batch != NULL)
        call->batch->outstanding--;
    vfio_user_calls_release(&user->calls, message->header.id);
    (void)pthread_cond_broadcast(&user->changed);
}

/* What a reply of the server is to be used for. */
enum settled { SETTLED, TO_CLIENT, BROKEN };

static enum settled settle(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    struct vfio_user_header *header = (struct vfio_user_header *)message->bytes;
    struct vfio_user_call *call;

    if (user->state != VIOMMU_VFIO_USER_UP)
        return SETTLED;
    call = vfio_user_calls_find(&user->calls, header->id);
    if (call == NULL) {
        count_add(&user->stats.strays, 1);
        return SETTLED;
    }
    if (call->command != header->command)
        return BROKEN;
    if (message->fd_count != 0 && (!call->of_client || !vfio_user_rule(call->command)->reply_fds))
        return BROKEN;
    if (!call->of_client) {
        settle_own(user, call, message);
        return SETTLED;
    }
    if (message->fd_count != 0)
        user->direct = true; /* memory of the device, or eventfds that stand for its registers */
    header->id = call->client_id;
    vfio_user_calls_release(&user->calls, message->header.id);
    return TO_CLIENT;
}

/* 0, -EPROTO when the server cannot be understood, or another -errno when the client is gone. */
static int server_message(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    enum settled settled;
    int rc;

    if (!vfio_user_is_reply(&message->header)) {
        if (message->fd_count != 0)
            return -EPROTO;
        serve(user, message);
        return 0;
    }
    (void)pthread_mutex_lock(&user->lock);
    settled = settle(user, message);
    (void)pthread_mutex_unlock(&user->lock);
    if (settled != TO_CLIENT)
        return settled == BROKEN ? -EPROTO : 0;
    count_add(&user->stats.replies, 1);
    if ((message->header.flags & VFIO_USER_ERROR) != 0)
        count_add(&user->stats.errors, 1);
    rc = vfio_user_link_send(&user->client, message->bytes, message->header.size, message->fds, message->fd_count,
                             NULL);
    message->fd_count = 0;
    return rc == -EPROTO ? -EPIPE : rc;
}

/* -------------------------------------------------------------------------------------------------- the two sides */

static void cut(struct viommu_vfio_user *user, uint32_t cause)
{
    (void)pthread_mutex_lock(&user->lock);
    vfio_user_cut(user, cause);
    (void)pthread_mutex_unlock(&user->lock);
}

static bool deaf_to_server(const struct viommu_vfio_user *user)
{
    return user->client.queued >= VFIO_USER_QUEUE_DEAF || user->server.queued >= VFIO_USER_QUEUE_DEAF;
}

static bool deaf_to_client(const struct viommu_vfio_user *user)
{
    return user->client.queued >= VFIO_USER_QUEUE_FULL || user->server.queued >= VFIO_USER_QUEUE_FULL ||
           user->calls.of_client >= VFIO_USER_CLIENT_CALLS || user->deferred_count >= VFIO_USER_CLIENT_CALLS;
}

/* Whether messages that were read ahead can be handled now; nobody listens to a server that was cut off. */
static bool more_of_server(const struct viommu_vfio_user *user)
{
    return user->state == VIOMMU_VFIO_USER_UP && vfio_user_link_pending(&user->server) && !deaf_to_server(user);
}

static bool more_of_client(const struct viommu_vfio_user *user)
{
    return vfio_user_link_pending(&user->client) && !deaf_to_client(user);
}

/* Under the lock what is asked of the queues; the answer may be a message late, and the limits are soft. */
static bool ask(struct viommu_vfio_user *user, bool (*what)(const struct viommu_vfio_user *))
{
    bool answer;

    (void)pthread_mutex_lock(&user->lock);
    answer = what(user);
    (void)pthread_mutex_unlock(&user->lock);
    return answer;
}

/* 0, or -errno when the client is gone. The server's trouble ends here. */
static int read_server(struct viommu_vfio_user *user, bool hung_up)
{
    for (unsigned i = 0; i < TURN; i++) {
        struct vfio_user_message *message;
        int rc;

        if (!hung_up && ask(user, deaf_to_server))
            return 0;
        rc = vfio_user_link_receive(&user->server, &message);
        if (rc == 0)
            return 0;
        if (rc < 0) {
            cut(user, rc == -ENOTCONN || rc == -ECONNRESET ? VIOMMU_VFIO_USER_GONE : VIOMMU_VFIO_USER_PROTOCOL);
            return 0;
        }
        rc = server_message(user, message);
        if (rc == -EPROTO) {
            cut(user, VIOMMU_VFIO_USER_PROTOCOL);
            return 0;
        }
        if (rc != 0)
            return rc;
    }
    return 0;
}

static int read_client(struct viommu_vfio_user *user)
{
    for (unsigned i = 0; i < TURN; i++) {
        struct vfio_user_message *message;
        int rc;

        if (ask(user, deaf_to_client))
            return 0;
        rc = vfio_user_link_receive(&user->client, &message);
        if (rc > 0)
            rc = vfio_user_client_message(user, message);
        else if (rc == 0)
            return 0;
        if (rc != 0)
            return rc;
    }
    return 0;
}

static void flush_server(struct viommu_vfio_user *user)
{
    (void)pthread_mutex_lock(&user->lock);
    if (user->state == VIOMMU_VFIO_USER_UP && vfio_user_link_flush(&user->server) != 0)
        vfio_user_cut(user, VIOMMU_VFIO_USER_GONE);
    (void)pthread_cond_broadcast(&user->changed); /* there is room now */
    (void)pthread_mutex_unlock(&user->lock);
}

static void watch_client(struct viommu_vfio_user *user, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = (uint32_t)user->client.fd};

    if (events == user->client_events)
        return;
    (void)epoll_ctl(user->epoll, EPOLL_CTL_MOD, user->client.fd, &event);
    user->client_events = events;
}

/*
 * Before waiting: look after deadlines and after a server that was cut off, and have epoll look for what is of use.
 * The time to wake up at in any case, UINT64_MAX for none, in *until. 0, or -errno when the client is gone.
 */
static int prepare(struct viommu_vfio_user *user, uint64_t now, uint64_t *until)
{
    struct vfio_user_call *oldest;
    uint16_t id;
    int rc = vfio_user_answer_deferred(user, now, until);

    if (rc != 0)
        return rc;
    (void)pthread_mutex_lock(&user->lock);
    oldest = vfio_user_calls_oldest(&user->calls, &id);
    if (oldest != NULL && now >= oldest->deadline)
        vfio_user_cut(user, VIOMMU_VFIO_USER_SILENT);
    else if (oldest != NULL && oldest->deadline < *until)
        *until = oldest->deadline;
    if (user->state == VIOMMU_VFIO_USER_UP) {
        bool out = user->server.first != NULL && !user->server.starved;

        vfio_user_watch_server(user, (deaf_to_server(user) ? 0 : EPOLLIN) | (out ? EPOLLOUT : 0));
        if (user->server.starved && now + STARVED_MS * 1000000ull < *until)
            *until = now + STARVED_MS * 1000000ull;
    } else if (user->server_events != UINT32_MAX) {
        /* One that hung up would be reported for ever. */
        (void)epoll_ctl(user->epoll, EPOLL_CTL_DEL, user->server.fd, NULL);
        user->server_events = UINT32_MAX;
    }
    if (user->state == VIOMMU_VFIO_USER_FAILED) {
        rc = vfio_user_answer_all(user);
        if (rc == 0 && user->deferred != NULL)
            *until = 0; /* those are done with as well */
    }
    if (more_of_client(user) || more_of_server(user))
        *until = 0; /* what was read ahead is no event */
    watch_client(user, (deaf_to_client(user) ? 0 : EPOLLIN) |
                           (user->client.first != NULL && !user->client.starved ? EPOLLOUT : 0));
    if (user->client.starved && now + STARVED_MS * 1000000ull < *until)
        *until = now + STARVED_MS * 1000000ull;
    (void)pthread_mutex_unlock(&user->lock);
    return rc;
}

/* -1 to wait for ever, else milliseconds, rounded up. */
static int wait_ms(uint64_t now, uint64_t until)
{
    uint64_t ms;

    if (until == UINT64_MAX)
        return -1;
    if (until <= now)
        return 0;
    ms = (until - now + 999999) / 1000000;
    return ms < 60000 ? (int)ms : 60000;
}

/* Poll for a while before sleeping: the other side of a register access mostly answers at once. */
static int wait_for_events(struct viommu_vfio_user *user, struct epoll_event *events, int max, uint64_t now, int ms)
{
    uint64_t end = now + user->settings.spin_us * 1000ull;
    int count = 0;

    while (count == 0 && ms != 0 && vfio_user_now() < end)
        count = epoll_wait(user->epoll, events, max, 0);
    if (count == 0)
        count = epoll_wait(user->epoll, events, max, ms);
    return count < 0 && errno == EINTR ? 0 : count;
}

/* Until the client is gone or the control plane says stop. */
static void relay(struct viommu_vfio_user *user)
{
    int rc = 0;

    while (rc == 0 && !atomic_load_explicit(&user->stop, memory_order_relaxed)) {
        struct epoll_event events[3];
        uint64_t now = vfio_user_now(), until;
        int count;

        rc = prepare(user, now, &until);
        if (rc != 0)
            return;
        count = wait_for_events(user, events, 3, now, wait_ms(now, until));
        if (count < 0)
            return;
        for (int i = 0; i < count && rc == 0; i++) {
            int fd = (int)events[i].data.u32;
            uint32_t what = events[i].events;
            eventfd_t ignored;

            if (fd == user->wake) {
                (void)eventfd_read(user->wake, &ignored);
            } else if (fd == user->client.fd) {
                if ((what & EPOLLOUT) != 0)
                    rc = vfio_user_link_flush(&user->client);
                if (rc == 0 && (what & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0)
                    rc = (what & EPOLLIN) != 0 ? read_client(user) : -ENOTCONN;
            } else {
                if ((what & EPOLLOUT) != 0)
                    flush_server(user);
                if ((what & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0)
                    rc = read_server(user, (what & (EPOLLHUP | EPOLLERR)) != 0);
            }
        }
        if (rc == 0 && ask(user, more_of_client))
            rc = read_client(user);
        if (rc == 0 && ask(user, more_of_server))
            rc = read_server(user, false);
        if (rc == 0 && user->client.starved)
            rc = vfio_user_link_flush(&user->client);
        if (rc == 0 && user->server.starved)
            flush_server(user);
        /* The client took its file back: what was read since is not guest memory. */
        if (user->memory.table != NULL && atomic_load_explicit(&user->memory.table->shrunk, memory_order_relaxed))
            return;
    }
}

/* Nothing of the connection stays, but for what the guest has mapped. */
static void end(struct viommu_vfio_user *user)
{
    (void)pthread_mutex_lock(&user->lock);
    guest_memory_guard(NULL);
    vfio_user_memory_fini(&user->memory);
    count_set(&user->stats.memory_bytes, 0);
    vfio_user_forget(user, VIOMMU_VFIO_USER_ABSENT); /* whoever sees that sees that the memory is gone */
    vfio_user_link_fini(&user->server);
    vfio_user_calls_fini(&user->calls);
    (void)pthread_mutex_unlock(&user->lock);
    vfio_user_drop_deferred(user);
    vfio_user_link_fini(&user->client);
    (void)close(user->epoll);
    user->epoll = -1;
}

void *vfio_user_relay(void *arg)
{
    struct viommu_vfio_user *user = arg;

    (void)prctl(PR_SET_NAME, "viommu-relay");
    relay(user);
    end(user);
    return NULL;
}
