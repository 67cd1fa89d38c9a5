/* Stage 2 of an endpoint whose device is a vfio-user server: the domains' mappings become its DMA_MAPs. */
#include <errno.h>
#include <stdlib.h>

#include "vfio_user.h"

static struct viommu_vfio_user *user_of(struct stage2 *stage2)
{
    return (struct viommu_vfio_user *)stage2;
}

static struct vfio_user_domain *domain_of(struct stage2_domain *domain)
{
    return (struct vfio_user_domain *)domain;
}

static uint64_t deadline_of(const struct viommu_vfio_user *user)
{
    return vfio_user_now() + user->settings.timeout_ms * 1000000ull;
}

static bool is_up(const struct viommu_vfio_user *user)
{
    return user->state == VIOMMU_VFIO_USER_UP;
}

static bool in_view(const struct viommu_vfio_user *user, const struct vfio_user_domain *domain)
{
    return user->view.reach == REACH_DOMAIN && user->view.domain == domain;
}

/*
 * A server that is cut off does not make requests of the guest fail: nothing more can be reached by it, the books go
 * on, and other endpoints of the domain are served. Only the request that found out is told.
 */
static int open_domain(struct stage2 *stage2, uint32_t id, struct stage2_domain **out)
{
    struct viommu_vfio_user *user = user_of(stage2);
    struct vfio_user_domain *domain = calloc(1, sizeof(*domain));

    (void)id;
    if (domain == NULL)
        return -ENOMEM;
    (void)pthread_mutex_lock(&user->lock);
    domain->map = iova_map_new(user->pool);
    (void)pthread_mutex_unlock(&user->lock);
    if (domain->map == NULL) {
        free(domain);
        return -ENOMEM;
    }
    *out = (struct stage2_domain *)domain;
    return 0;
}

/* Tell the server to forget everything, and wait until it has. */
static int withdraw_all(struct viommu_vfio_user *user, uint64_t deadline)
{
    struct vfio_user_batch batch = {0};

    if (!is_up(user) || user->maps == 0)
        return 0;
    if (vfio_user_reserve(user, 1, deadline) < 0)
        return -EIO;
    vfio_user_tell_unmap_all(user, &batch);
    return vfio_user_await(user, &batch, deadline);
}

/* Have the endpoint reach something else. The lock is held, and given up while waiting. */
static int change_view(struct viommu_vfio_user *user, struct vfio_user_view view)
{
    const struct vfio_user_view nothing = {.reach = REACH_NOTHING}, before = user->view;
    uint64_t deadline = deadline_of(user);
    struct vfio_user_batch batch = {0};
    bool up;
    int rc;

    if (view.reach == before.reach && view.domain == before.domain)
        return 0;
    if (is_up(user) && vfio_user_pieces(user, &view, 0, UINT64_MAX) > user->limits.max_dma_maps)
        return -ENOSPC;
    user->view = nothing;
    rc = withdraw_all(user, deadline);
    while (rc == 0 && is_up(user)) {
        rc = vfio_user_reserve(user, vfio_user_pieces(user, &view, 0, UINT64_MAX), deadline);
        if (rc == 0)
            break;
        rc = rc == 1 ? 0 : rc;
    }
    up = is_up(user);
    if (rc == 0) {
        user->view = view;
        if (up)
            vfio_user_tell_pieces(user, 0, UINT64_MAX, vfio_user_tell_map, user->direct ? &batch : NULL);
        rc = user->direct ? vfio_user_await(user, &batch, deadline) : up && !is_up(user) ? -EIO : 0;
    }
    if (rc != 0)
        user->view = before;
    return rc;
}

static void close_domain(struct stage2 *stage2, struct stage2_domain *handle)
{
    struct viommu_vfio_user *user = user_of(stage2);
    struct vfio_user_domain *domain = domain_of(handle);

    (void)pthread_mutex_lock(&user->lock);
    iova_map_free(domain->map);
    (void)pthread_mutex_unlock(&user->lock);
    free(domain);
}

static int map_locked(struct viommu_vfio_user *user, struct vfio_user_domain *domain,
                      const struct iova_mapping *mapping)
{
    uint64_t deadline = deadline_of(user);
    struct vfio_user_batch batch = {0};
    bool tell = in_view(user, domain);
    int rc;

    while (tell && is_up(user)) {
        struct vfio_user_piece piece;
        uint32_t count = 0;

        for (size_t i = 0; vfio_user_memory_next_piece(&user->memory, mapping, &i, &piece);)
            count++;
        if (count > user->limits.max_dma_maps - user->maps)
            return -ENOSPC;
        rc = vfio_user_reserve(user, count, deadline);
        if (rc == 0)
            break;
        if (rc < 0)
            return rc;
    }
    rc = iova_map_insert(domain->map, mapping);
    if (rc != 0)
        return rc;
    if (!tell || !is_up(user))
        return 0;
    vfio_user_tell_pieces(user, mapping->first, mapping->last, vfio_user_tell_map, user->direct ? &batch : NULL);
    /* A doorbell rung through us comes behind DMA_MAP; one that the guest reaches directly could overtake it. */
    rc = user->direct ? vfio_user_await(user, &batch, deadline) : is_up(user) ? 0 : -EIO;
    if (rc != 0)
        (void)iova_map_remove(domain->map, mapping->first, mapping->last, NULL);
    return rc;
}

static int map(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_mapping *mapping)
{
    struct viommu_vfio_user *user = user_of(stage2);
    int rc;

    (void)pthread_mutex_lock(&user->lock);
    rc = map_locked(user, domain_of(domain), mapping);
    (void)pthread_mutex_unlock(&user->lock);
    return rc;
}

static int unmap_locked(struct viommu_vfio_user *user, struct vfio_user_domain *domain, uint64_t first, uint64_t last)
{
    uint64_t deadline = deadline_of(user);
    struct vfio_user_batch batch = {0};
    bool tell = in_view(user, domain);
    int rc = 0;

    while (tell && is_up(user)) {
        uint32_t count = vfio_user_pieces(user, &user->view, first, last);

        rc = vfio_user_reserve(user, count, deadline);
        if (rc == 0) {
            if (count != 0 && count == user->maps && count > 1)
                vfio_user_tell_unmap_all(user, &batch);
            else
                vfio_user_tell_pieces(user, first, last, vfio_user_tell_unmap, &batch);
            break;
        }
        if (rc < 0)
            break;
    }
    /* From here on no access through us is let in, whatever the server makes of it. */
    (void)iova_map_remove(domain->map, first, last, NULL);
    return rc < 0 ? rc : vfio_user_await(user, &batch, deadline);
}

static int unmap(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *map_before,
                 uint64_t first, uint64_t last)
{
    struct viommu_vfio_user *user = user_of(stage2);
    int rc;

    (void)map_before; /* ours says the same */
    (void)pthread_mutex_lock(&user->lock);
    rc = unmap_locked(user, domain_of(domain), first, last);
    (void)pthread_mutex_unlock(&user->lock);
    return rc;
}

static int set_view(struct stage2 *stage2, struct vfio_user_view view)
{
    struct viommu_vfio_user *user = user_of(stage2);
    int rc;

    (void)pthread_mutex_lock(&user->lock);
    rc = change_view(user, view);
    (void)pthread_mutex_unlock(&user->lock);
    return rc;
}

static int attach(struct stage2 *stage2, uint32_t endpoint, struct stage2_domain *domain)
{
    (void)endpoint; /* each has a back-end of its own */
    return set_view(stage2, (struct vfio_user_view){.reach = REACH_DOMAIN, .domain = domain_of(domain)});
}

static int identity(struct stage2 *stage2, uint32_t endpoint)
{
    (void)endpoint;
    return set_view(stage2, (struct vfio_user_view){.reach = REACH_MEMORY});
}

static int block(struct stage2 *stage2, uint32_t endpoint)
{
    struct viommu_vfio_user *user = user_of(stage2);
    int rc;

    (void)endpoint;
    (void)pthread_mutex_lock(&user->lock);
    user->view = (struct vfio_user_view){.reach = REACH_NOTHING};
    rc = withdraw_all(user, deadline_of(user));
    (void)pthread_mutex_unlock(&user->lock);
    return rc;
}

/* The memory of this endpoint is what its own client shares, which may be more or less than the IOMMU device sees. */
static int memory_changed(struct stage2 *stage2, const struct guest_memory *memory)
{
    (void)stage2;
    (void)memory;
    return 0;
}

const struct stage2_ops vfio_user_stage2_ops = {
    .name = "vfio-user",
    .open = open_domain,
    .close = close_domain,
    .map = map,
    .unmap = unmap,
    .attach = attach,
    .identity = identity,
    .block = block,
    .memory = memory_changed,
};
