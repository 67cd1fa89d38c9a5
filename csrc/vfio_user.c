/* A vfio-user endpoint as the control plane has it: made, connected, disconnected, looked at. */
#include "vfio_user.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "counters.h"

#define MIN_TRANSFER 4096u
#define MAX_TRANSFER (16u << 20)

int vfio_user_new(const struct viommu_vfio_user_settings *settings, const struct vfio_user_faults *faults,
                  struct viommu_vfio_user **out)
{
    struct viommu_vfio_user *user;
    pthread_condattr_t attributes;

    if (settings->mode > VIOMMU_VFIO_USER_STRICT || settings->timeout_ms == 0)
        return -EINVAL;
    user = calloc(1, sizeof(*user));
    if (user == NULL)
        return -ENOMEM;
    user->stage2.ops = &vfio_user_stage2_ops;
    user->settings = *settings;
    user->faults = *faults;
    user->epoll = user->server.fd = user->client.fd = -1;
    user->pool = iova_pool_new(NULL);
    user->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    user->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (user->pool == NULL || user->event < 0 || user->wake < 0) {
        int rc = user->pool == NULL ? -ENOMEM : -errno;

        iova_pool_free(user->pool);
        if (user->event >= 0)
            (void)close(user->event);
        if (user->wake >= 0)
            (void)close(user->wake);
        free(user);
        return rc;
    }
    (void)pthread_mutex_init(&user->lock, NULL);
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&user->changed, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    *out = user;
    return 0;
}

void viommu_vfio_user_disconnect(struct viommu_vfio_user *user)
{
    if (!user->started)
        return;
    atomic_store(&user->stop, true);
    (void)eventfd_write(user->wake, 1);
    (void)pthread_join(user->thread, NULL);
    user->started = false;
}

void vfio_user_free(struct viommu_vfio_user *user)
{
    viommu_vfio_user_disconnect(user);
    (void)pthread_cond_destroy(&user->changed);
    (void)pthread_mutex_destroy(&user->lock);
    iova_pool_free(user->pool);
    (void)close(user->event);
    (void)close(user->wake);
    free(user);
}

static int watch(int epoll, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = (uint32_t)fd};

    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0 ? 0 : -errno;
}

static int open_link(struct vfio_user_link *link, int fd, const struct viommu_vfio_user_limits *limits)
{
    int mine = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    int rc;

    if (mine < 0)
        return -errno;
    rc = vfio_user_link_init(link, mine, (size_t)limits->max_transfer + VFIO_USER_OVERHEAD, limits->max_fds);
    if (rc != 0)
        (void)close(mine);
    return rc;
}

/* Signals are for the control plane, but for those that the thread's own accesses raise. */
static int start_thread(struct viommu_vfio_user *user)
{
    sigset_t all, before;
    int rc;

    (void)sigfillset(&all);
    (void)sigdelset(&all, SIGBUS);
    (void)sigdelset(&all, SIGSEGV);
    (void)sigdelset(&all, SIGFPE);
    (void)sigdelset(&all, SIGILL);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = -pthread_create(&user->thread, NULL, vfio_user_relay, user);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

int viommu_vfio_user_connect(struct viommu_vfio_user *user, int client_fd, int server_fd,
                             const struct viommu_vfio_user_limits *limits)
{
    struct vfio_user_link client, server;
    bool ended;
    int rc;

    if (limits->max_transfer < MIN_TRANSFER || limits->max_transfer > MAX_TRANSFER || limits->max_fds == 0 ||
        limits->max_dma_maps == 0)
        return -EINVAL;
    (void)pthread_mutex_lock(&user->lock);
    ended = user->state == VIOMMU_VFIO_USER_ABSENT;
    (void)pthread_mutex_unlock(&user->lock);
    if (!ended)
        return -EBUSY;
    viommu_vfio_user_disconnect(user); /* its thread, if there was one, is about to end */
    rc = open_link(&client, client_fd, limits);
    if (rc != 0)
        return rc;
    rc = open_link(&server, server_fd, limits);
    if (rc != 0)
        goto no_server;
    (void)pthread_mutex_lock(&user->lock);
    rc = vfio_user_calls_init(&user->calls);
    if (rc != 0)
        goto no_calls;
    user->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (user->epoll < 0) {
        rc = -errno;
        goto no_epoll;
    }
    if ((rc = watch(user->epoll, user->wake, EPOLLIN)) != 0 || (rc = watch(user->epoll, client.fd, EPOLLIN)) != 0 ||
        (rc = watch(user->epoll, server.fd, EPOLLIN)) != 0)
        goto no_watch;
    user->client = client;
    user->server = server;
    user->client_events = user->server_events = EPOLLIN;
    user->limits = *limits;
    if (user->limits.max_dma_maps > VFIO_USER_MAX_MAPS)
        user->limits.max_dma_maps = VFIO_USER_MAX_MAPS;
    user->direct = false;
    user->state = VIOMMU_VFIO_USER_UP;
    count_set(&user->stats.state, user->state);
    count_add(&user->stats.connections, 1);
    atomic_store(&user->stop, false);
    user->started = true;
    rc = start_thread(user);
    if (rc == 0) {
        (void)pthread_mutex_unlock(&user->lock);
        return 0;
    }
    user->started = false;
    user->state = VIOMMU_VFIO_USER_ABSENT;
    count_set(&user->stats.state, user->state);
    user->client.fd = user->server.fd = -1;
no_watch:
    (void)close(user->epoll);
    user->epoll = -1;
no_epoll:
    vfio_user_calls_fini(&user->calls);
no_calls:
    (void)pthread_mutex_unlock(&user->lock);
    vfio_user_link_fini(&server);
no_server:
    vfio_user_link_fini(&client);
    return rc;
}

int viommu_vfio_user_event_fd(struct viommu_vfio_user *user)
{
    return user->event;
}

void viommu_vfio_user_stats(struct viommu_vfio_user *user, struct viommu_vfio_user_stats *out)
{
    const uint64_t *from = (const uint64_t *)&user->stats;
    uint64_t *to = (uint64_t *)out;

    _Static_assert(sizeof(*out) % sizeof(uint64_t) == 0, "stats are words");
    for (size_t i = 0; i < sizeof(*out) / sizeof(uint64_t); i++)
        to[i] = count_get(&from[i]);
}
