/*
 * What the client (QEMU) asks. Its DMA_MAPs and DMA_UNMAPs end here: they are the guest-physical memory. The rest is
 * the device's business and is passed on, under an ID of our own.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "counters.h"
#include "vfio_user.h"

int vfio_user_answer(struct viommu_vfio_user *user, const struct vfio_user_header *request, int error)
{
    struct vfio_user_header reply = vfio_user_reply_to(request, sizeof(reply), error);

    if (error != 0)
        count_add(&user->stats.answered, 1);
    if ((request->flags & VFIO_USER_NO_REPLY) != 0)
        return 0;
    return vfio_user_link_send(&user->client, &reply, sizeof(reply), NULL, 0, NULL);
}

int vfio_user_answer_all(struct viommu_vfio_user *user)
{
    struct vfio_user_call *call;
    uint16_t id;
    int rc = 0;

    while (rc == 0 && (call = vfio_user_calls_oldest(&user->calls, &id)) != NULL) {
        struct vfio_user_header request = {.id = call->client_id, .command = call->command};

        vfio_user_calls_release(&user->calls, id);
        rc = vfio_user_answer(user, &request, EIO);
    }
    return rc;
}

/* The client is served right here, but it is told so when the server has followed. */
static void defer(struct viommu_vfio_user *user, struct vfio_user_deferred *deferred)
{
    struct vfio_user_deferred **at = &user->deferred;

    while (*at != NULL) /* few wait at a time */
        at = &(*at)->next;
    deferred->deadline = vfio_user_now() + user->settings.timeout_ms * 1000000ull;
    *at = deferred;
    user->deferred_count++;
}

static struct vfio_user_deferred *make_deferred(const struct vfio_user_message *message)
{
    struct vfio_user_deferred *deferred = calloc(1, sizeof(*deferred));

    if (deferred == NULL)
        return NULL;
    /* The reply to DMA_UNMAP repeats the request; the one to DMA_MAP is a header. */
    deferred->size = message->header.command == VFIO_USER_DMA_UNMAP ? sizeof(deferred->request)
                                                                     : sizeof(deferred->request.header);
    memcpy(&deferred->request, message->bytes, deferred->size);
    return deferred;
}

int vfio_user_answer_deferred(struct viommu_vfio_user *user, uint64_t now, uint64_t *next)
{
    int rc = 0;

    *next = UINT64_MAX;
    for (struct vfio_user_deferred **at = &user->deferred; *at != NULL && rc == 0;) {
        struct vfio_user_deferred *deferred = *at;
        bool done;

        (void)pthread_mutex_lock(&user->lock);
        if (deferred->batch.outstanding != 0 && now >= deferred->deadline)
            vfio_user_cut(user, VIOMMU_VFIO_USER_TIMEOUT);
        done = deferred->batch.outstanding == 0;
        (void)pthread_mutex_unlock(&user->lock);
        if (!done) {
            if (deferred->deadline < *next)
                *next = deferred->deadline;
            at = &deferred->next;
            continue;
        }
        *at = deferred->next;
        user->deferred_count--;
        if ((deferred->request.header.flags & VFIO_USER_NO_REPLY) == 0) {
            /* A server that was cut off no longer stands in the way either. */
            deferred->request.header = vfio_user_reply_to(&deferred->request.header, deferred->size, 0);
            rc = vfio_user_link_send(&user->client, &deferred->request, deferred->size, NULL, 0, NULL);
        }
        free(deferred);
    }
    return rc;
}

void vfio_user_drop_deferred(struct viommu_vfio_user *user)
{
    struct vfio_user_deferred *deferred;

    while ((deferred = user->deferred) != NULL) {
        user->deferred = deferred->next;
        free(deferred);
    }
    user->deferred_count = 0;
}

/* Take over the table that goes with the memory as it is now. */
static void use_table(struct viommu_vfio_user *user, struct guest_memory *before)
{
    guest_memory_guard(user->memory.table);
    guest_memory_free(before);
    count_set(&user->stats.memory_bytes, user->memory.bytes);
    if (user->memory.bytes > user->stats.peak_memory_bytes)
        count_set(&user->stats.peak_memory_bytes, user->memory.bytes);
}

/* 0 or a positive errno. On success *deferred is in use if the server has been told. */
static int add_memory(struct viommu_vfio_user *user, const struct vfio_user_message *message,
                      struct vfio_user_deferred *deferred)
{
    struct vfio_user_range range = {0};
    struct vfio_user_dma_map map;
    struct guest_memory *before;
    int rc;

    if (message->fd_count > 1)
        return EINVAL;
    memcpy(&map, message->bytes, sizeof(map));
    if (map.size == 0 || (map.flags & ~(VFIO_USER_DMA_READABLE | VFIO_USER_DMA_WRITABLE)) != 0 ||
        __builtin_add_overflow(map.address, map.size - 1, &range.last))
        return EINVAL;
    range.first = map.address;
    range.flags = map.flags;
    if (message->fd_count == 1) {
        rc = viommu_region_map(map.address, map.size, 0, map.offset, message->fds[0], &range.region);
        /* A file open for reading only cannot be shared with a device that we serve: out of reach, like no file. */
        if (rc != 0 && !(rc == -EACCES && (map.flags & VFIO_USER_DMA_WRITABLE) == 0))
            return -rc;
    }
    (void)pthread_mutex_lock(&user->lock);
    rc = vfio_user_memory_add(&user->memory, &range, &before);
    if (rc == 0) {
        use_table(user, before);
        if (user->state == VIOMMU_VFIO_USER_UP)
            vfio_user_tell_range(user, &range, vfio_user_tell_map, &deferred->batch);
    }
    (void)pthread_mutex_unlock(&user->lock);
    if (rc != 0)
        viommu_region_free(range.region);
    return -rc;
}

static int remove_memory(struct viommu_vfio_user *user, const struct vfio_user_message *message,
                         struct vfio_user_deferred *deferred)
{
    struct vfio_user_dma_unmap unmap;
    struct guest_memory *before;
    uint64_t last = UINT64_MAX;
    size_t begin, end;
    int rc;

    memcpy(&unmap, message->bytes, sizeof(unmap));
    if (unmap.flags == VFIO_USER_UNMAP_ALL) {
        if (unmap.address != 0 || unmap.size != 0)
            return EINVAL;
    } else if (unmap.flags != 0 || unmap.size == 0 || __builtin_add_overflow(unmap.address, unmap.size - 1, &last)) {
        return EINVAL;
    }
    (void)pthread_mutex_lock(&user->lock);
    rc = vfio_user_memory_select(&user->memory, unmap.address, last, &begin, &end);
    if (rc == 0 && begin == end) {
        rc = unmap.flags == 0 ? -ENOENT : 0;
    } else if (rc == 0) {
        for (size_t i = begin; i < end && user->state == VIOMMU_VFIO_USER_UP; i++)
            vfio_user_tell_range(user, &user->memory.ranges[i], vfio_user_tell_unmap, &deferred->batch);
        rc = vfio_user_memory_remove(&user->memory, begin, end, &before);
        if (rc == 0)
            use_table(user, before);
        else
            vfio_user_cut(user, VIOMMU_VFIO_USER_NOMEM); /* it has been told what did not come to be */
    }
    (void)pthread_mutex_unlock(&user->lock);
    return -rc;
}

static int change_memory(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    bool map = message->header.command == VFIO_USER_DMA_MAP;
    struct vfio_user_deferred *deferred;
    int error;

    if (message->header.size != (map ? sizeof(struct vfio_user_dma_map) : sizeof(struct vfio_user_dma_unmap)))
        return vfio_user_answer(user, &message->header, EINVAL);
    deferred = make_deferred(message);
    if (deferred == NULL)
        return -ENOMEM;
    error = map ? add_memory(user, message, deferred) : remove_memory(user, message, deferred);
    if (error == 0) {
        defer(user, deferred);
        return 0;
    }
    free(deferred);
    return vfio_user_answer(user, &message->header, error);
}

/*
 * Interrupts are signalled through eventfds; any other descriptor could be memory, and memory goes to a server by
 * DMA_MAP alone. The kernel has no call that tells an eventfd; the name of its inode does.
 */
static bool only_eventfds(const struct vfio_user_message *message)
{
    static const char wanted[] = "anon_inode:[eventfd]";

    for (unsigned i = 0; i < message->fd_count; i++) {
        char path[32], name[sizeof(wanted)];

        (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", message->fds[i]);
        if (readlink(path, name, sizeof(name)) != sizeof(wanted) - 1 || memcmp(name, wanted, sizeof(wanted) - 1) != 0)
            return false;
    }
    return true;
}

static int forward(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    struct vfio_user_header *header = (struct vfio_user_header *)message->bytes;
    bool posted = (header->flags & VFIO_USER_NO_REPLY) != 0;
    uint64_t deadline = UINT64_MAX;
    bool sent = false;
    uint16_t id = 0;
    int rc;

    if (user->settings.reply_timeout_ms != 0 && !posted)
        deadline = vfio_user_now() + user->settings.reply_timeout_ms * 1000000ull;
    (void)pthread_mutex_lock(&user->lock);
    if (user->state == VIOMMU_VFIO_USER_UP &&
        (posted || vfio_user_calls_client(&user->calls, &message->header, deadline, &id))) {
        header->id = id;
        rc = vfio_user_link_send(&user->server, header, header->size, message->fds, message->fd_count, NULL);
        message->fd_count = 0;
        sent = true; /* if it fails, so do all requests that wait for an answer, this one among them */
        if (rc != 0)
            vfio_user_cut(user, rc == -ENOMEM ? VIOMMU_VFIO_USER_NOMEM : VIOMMU_VFIO_USER_GONE);
        else if (user->server.first != NULL)
            vfio_user_watch_server(user, user->server_events | EPOLLOUT);
    }
    (void)pthread_mutex_unlock(&user->lock);
    if (!sent)
        return vfio_user_answer(user, &message->header, EIO);
    count_add(&user->stats.requests, 1);
    return 0;
}

int vfio_user_client_message(struct viommu_vfio_user *user, struct vfio_user_message *message)
{
    const struct vfio_user_rule *rule = vfio_user_rule(message->header.command);
    bool posted = (message->header.flags & VFIO_USER_NO_REPLY) != 0;

    if (vfio_user_is_reply(&message->header)) { /* it is never asked for anything */
        count_add(&user->stats.strays, 1);
        return 0;
    }
    if ((posted && !rule->posted) || (message->fd_count != 0 && !rule->request_fds))
        return vfio_user_answer(user, &message->header, EINVAL);
    if (message->header.command == VFIO_USER_DMA_MAP || message->header.command == VFIO_USER_DMA_UNMAP)
        return change_memory(user, message);
    if (!rule->forward)
        return vfio_user_answer(user, &message->header, ENOTSUP);
    if (!only_eventfds(message))
        return vfio_user_answer(user, &message->header, EINVAL);
    return forward(user, message);
}
