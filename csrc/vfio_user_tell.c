/* What viommud itself has to say to a vfio-user server, and how it ends when the server does not listen. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "counters.h"
#include "vfio_user.h"

#define NS_PER_S 1000000000ull

/* IDs that are left to the client. */
#define IDS_OF_CLIENT 2048u

uint64_t vfio_user_now(void)
{
    struct timespec time;

    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * NS_PER_S + (uint64_t)time.tv_nsec;
}

/* False at the deadline. */
static bool wait_for_change(struct viommu_vfio_user *user, uint64_t deadline)
{
    struct timespec time = {.tv_sec = (time_t)(deadline / NS_PER_S), .tv_nsec = (long)(deadline % NS_PER_S)};

    return pthread_cond_timedwait(&user->changed, &user->lock, &time) != ETIMEDOUT;
}

void vfio_user_watch_server(struct viommu_vfio_user *user, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = (uint32_t)user->server.fd};

    if (events == user->server_events)
        return;
    (void)epoll_ctl(user->epoll, EPOLL_CTL_MOD, user->server.fd, &event);
    user->server_events = events;
}

void vfio_user_forget(struct viommu_vfio_user *user, uint32_t state)
{
    vfio_user_calls_fail_own(&user->calls);
    vfio_user_link_drop(&user->server);
    user->maps = 0;
    user->reachable = 0;
    count_set(&user->stats.reachable_bytes, 0);
    user->state = state;
    count_set(&user->stats.state, state);
    (void)pthread_cond_broadcast(&user->changed);
    (void)eventfd_write(user->event, 1);
}

void vfio_user_cut(struct viommu_vfio_user *user, uint32_t cause)
{
    if (user->state != VIOMMU_VFIO_USER_UP)
        return;
    (void)shutdown(user->server.fd, SHUT_RDWR);
    count_set(&user->stats.cause, cause);
    count_add(&user->stats.failures, 1);
    vfio_user_forget(user, VIOMMU_VFIO_USER_FAILED);
    (void)eventfd_write(user->wake, 1); /* the client's requests are to be answered */
}

int vfio_user_reserve(struct viommu_vfio_user *user, uint32_t count, uint64_t deadline)
{
    int rc = 0;

    while (user->state == VIOMMU_VFIO_USER_UP) {
        if (user->server.queued < VFIO_USER_QUEUE_FULL &&
            VFIO_USER_IDS - user->calls.pending >= count + IDS_OF_CLIENT)
            return rc;
        rc = 1;
        if (!wait_for_change(user, deadline))
            vfio_user_cut(user, VIOMMU_VFIO_USER_TIMEOUT);
    }
    return -EIO;
}

int vfio_user_await(struct viommu_vfio_user *user, struct vfio_user_batch *batch, uint64_t deadline)
{
    while (!batch->failed && batch->outstanding != 0) {
        if (!wait_for_change(user, deadline) && !batch->failed && batch->outstanding != 0)
            vfio_user_cut(user, VIOMMU_VFIO_USER_TIMEOUT);
    }
    return batch->failed ? -EIO : 0;
}

/* Send a request of ours; its header is filled in here. */
static void request(struct viommu_vfio_user *user, struct vfio_user_header *header, uint16_t command, size_t size,
                    struct viommu_region *region, struct vfio_user_batch *batch)
{
    uint16_t id;
    int rc;

    if (user->state == VIOMMU_VFIO_USER_UP) {
        if (!vfio_user_calls_own(&user->calls, command, batch, &id)) {
            vfio_user_cut(user, VIOMMU_VFIO_USER_LIMIT);
        } else {
            *header = (struct vfio_user_header){.id = id, .command = command, .size = (uint32_t)size};
            rc = vfio_user_link_send(&user->server, header, size, NULL, 0, region);
            if (rc != 0)
                vfio_user_cut(user, rc == -ENOMEM ? VIOMMU_VFIO_USER_NOMEM : VIOMMU_VFIO_USER_GONE);
            else if (user->server.first != NULL)
                vfio_user_watch_server(user, user->server_events | EPOLLOUT);
        }
    }
    if (user->state != VIOMMU_VFIO_USER_UP && batch != NULL)
        batch->failed = true;
}

static void count_reachable(struct viommu_vfio_user *user, uint64_t reachable)
{
    user->reachable = reachable;
    count_set(&user->stats.reachable_bytes, reachable);
    if (reachable > user->stats.peak_reachable_bytes)
        count_set(&user->stats.peak_reachable_bytes, reachable);
}

void vfio_user_tell_map(struct viommu_vfio_user *user, const struct vfio_user_piece *piece,
                        struct vfio_user_batch *batch)
{
    bool shared = user->settings.mode == VIOMMU_VFIO_USER_SHARED;
    struct vfio_user_dma_map message = {
        .argsz = sizeof(message) - sizeof(message.header),
        .flags = piece->flags,
        .offset = shared ? piece->offset : 0,
        .address = piece->iova,
        .size = piece->size,
    };

    if (user->maps >= user->limits.max_dma_maps)
        vfio_user_cut(user, VIOMMU_VFIO_USER_LIMIT);
    request(user, &message.header, VFIO_USER_DMA_MAP, sizeof(message), shared ? piece->region : NULL, batch);
    if (user->state != VIOMMU_VFIO_USER_UP)
        return;
    user->maps++;
    count_add(&user->stats.maps, 1);
    count_reachable(user, user->reachable + piece->size);
}

void vfio_user_tell_unmap(struct viommu_vfio_user *user, const struct vfio_user_piece *piece,
                          struct vfio_user_batch *batch)
{
    struct vfio_user_dma_unmap message = {
        .argsz = sizeof(message) - sizeof(message.header),
        .address = piece->iova,
        .size = piece->size,
    };

    request(user, &message.header, VFIO_USER_DMA_UNMAP, sizeof(message), NULL, batch);
    if (user->state != VIOMMU_VFIO_USER_UP)
        return;
    user->maps--;
    count_add(&user->stats.unmaps, 1);
    count_reachable(user, user->reachable - piece->size);
}

void vfio_user_tell_unmap_all(struct viommu_vfio_user *user, struct vfio_user_batch *batch)
{
    struct vfio_user_dma_unmap message = {
        .argsz = sizeof(message) - sizeof(message.header),
        .flags = VFIO_USER_UNMAP_ALL,
    };

    request(user, &message.header, VFIO_USER_DMA_UNMAP, sizeof(message), NULL, batch);
    if (user->state != VIOMMU_VFIO_USER_UP)
        return;
    user->maps = 0;
    count_add(&user->stats.unmaps, 1);
    count_reachable(user, 0);
}

/* ------------------------------------------------------------------------------------------------------ the view */

/* The first mapping of the view that ends at or after from; false when there is none. */
static bool next_mapping(const struct vfio_user_view *view, uint64_t from, struct iova_mapping *out)
{
    switch (view->reach) {
    case REACH_DOMAIN:
        return iova_map_next(view->domain->map, from, out);
    case REACH_MEMORY:
        *out = (struct iova_mapping){.last = UINT64_MAX, .flags = MAP_FLAG_READ | MAP_FLAG_WRITE};
        return true;
    default:
        return false;
    }
}

uint32_t vfio_user_pieces(const struct viommu_vfio_user *user, const struct vfio_user_view *view, uint64_t first,
                          uint64_t last)
{
    struct iova_mapping mapping;
    uint32_t count = 0;

    while (next_mapping(view, first, &mapping) && mapping.first <= last) {
        struct vfio_user_piece piece;

        for (size_t i = 0; vfio_user_memory_next_piece(&user->memory, &mapping, &i, &piece);) {
            if (++count == UINT32_MAX)
                return count;
        }
        if (mapping.last >= last)
            break;
        first = mapping.last + 1;
    }
    return count;
}

void vfio_user_tell_pieces(struct viommu_vfio_user *user, uint64_t first, uint64_t last, vfio_user_tell *tell,
                           struct vfio_user_batch *batch)
{
    struct iova_mapping mapping;

    while (next_mapping(&user->view, first, &mapping) && mapping.first <= last) {
        struct vfio_user_piece piece;

        for (size_t i = 0; vfio_user_memory_next_piece(&user->memory, &mapping, &i, &piece);)
            tell(user, &piece, batch);
        if (mapping.last >= last)
            break;
        first = mapping.last + 1;
    }
}

void vfio_user_tell_range(struct viommu_vfio_user *user, const struct vfio_user_range *range, vfio_user_tell *tell,
                          struct vfio_user_batch *batch)
{
    struct iova_mapping mapping;
    uint64_t from = 0;

    while (next_mapping(&user->view, from, &mapping)) {
        struct vfio_user_piece piece;

        if (vfio_user_piece_in(range, &mapping, &piece))
            tell(user, &piece, batch);
        from = mapping.last + 1;
        if (from == 0)
            break;
    }
}
