#include "stage2_type1.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host_memory.h"
#include "iommufd_uapi.h"
#include "wire.h"

enum reach { REACH_NOTHING, REACH_IDENTITY, REACH_DOMAIN };

/* What a domain maps is kept here too: the container may have to be filled with it at any time. */
struct type1_domain {
    struct iova_map *map;
};

struct stage2_type1 {
    struct stage2 stage2;
    int fd;
    host_ioctl_fn call;
    uint64_t page; /* bytes of the host's pages */
    enum reach reach;
    struct type1_domain *domain; /* in REACH_DOMAIN */
    const struct guest_memory *memory;
    struct iova_pool *pool;
};

static struct stage2_type1 *type1_of(struct stage2 *stage2)
{
    return (struct stage2_type1 *)((char *)stage2 - offsetof(struct stage2_type1, stage2));
}

static struct type1_domain *domain_of(struct stage2_domain *domain)
{
    return (struct type1_domain *)domain;
}

/* ------------------------------------------------------------------------------------------------------- container */

static int map_piece(void *context, const struct host_piece *piece)
{
    struct stage2_type1 *type1 = context;
    struct host_vfio_map request = {
        .argsz = sizeof(request),
        .flags = ((piece->flags & MAP_FLAG_READ) != 0 ? HOST_VFIO_MAP_READ : 0) |
                 ((piece->flags & MAP_FLAG_WRITE) != 0 ? HOST_VFIO_MAP_WRITE : 0),
        .vaddr = (uintptr_t)(piece->region->host + piece->offset),
        .iova = piece->iova,
        .size = piece->length,
    };

    return type1->call(type1->fd, HOST_VFIO_IOMMU_MAP, &request);
}

static int unmap_range(struct stage2_type1 *type1, uint64_t iova, uint64_t size)
{
    struct host_vfio_unmap request = {.argsz = sizeof(request), .iova = iova, .size = size};

    return type1->call(type1->fd, HOST_VFIO_IOMMU_UNMAP, &request);
}

/* The same for what lies in a range that need not be of whole pages. No mapping is cut by its ends. */
static int unmap_within(struct stage2_type1 *type1, uint64_t first, uint64_t last)
{
    uint64_t start, end;

    if (__builtin_add_overflow(first, type1->page - 1, &start))
        return 0;
    start &= -type1->page;
    end = (last + 1) & -type1->page; /* 0: the end of the address space */
    return end != 0 && end <= start ? 0 : unmap_range(type1, start, end - start);
}

static int unmap_piece(void *context, const struct host_piece *piece)
{
    return unmap_range(context, piece->iova, piece->length);
}

static int unmap_all(struct stage2_type1 *type1)
{
    struct host_vfio_unmap request = {.argsz = sizeof(request), .flags = HOST_VFIO_UNMAP_ALL};
    int rc = type1->call(type1->fd, HOST_VFIO_IOMMU_UNMAP, &request);

    if (rc != -EINVAL)
        return rc;
    /* Linux before 5.12 cannot be told so: two halves, of which no mapping is in both as long as memory is smaller. */
    rc = unmap_range(type1, 0, 1ull << 63);
    return rc != 0 ? rc : unmap_range(type1, 1ull << 63, 1ull << 63);
}

/* Memory at its own addresses: each region is a mapping onto itself. */
static struct iova_mapping itself(const struct viommu_region *region)
{
    return (struct iova_mapping){region->gpa, region->last, region->gpa, MAP_FLAG_READ | MAP_FLAG_WRITE};
}

static int fill_identity(struct stage2_type1 *type1)
{
    for (size_t i = 0; type1->memory != NULL && i < type1->memory->count; i++) {
        struct iova_mapping mapping = itself(type1->memory->regions[i]);
        int rc = host_pieces_map(type1->memory, &mapping, map_piece, unmap_piece, type1);

        if (rc != 0)
            return rc;
    }
    return 0;
}

static int fill_domain(struct stage2_type1 *type1, const struct type1_domain *domain)
{
    struct iova_mapping mapping;

    for (uint64_t from = 0; iova_map_next(domain->map, from, &mapping);) {
        int rc = host_pieces_map(type1->memory, &mapping, map_piece, unmap_piece, type1);

        if (rc != 0)
            return rc;
        from = mapping.last + 1;
        if (from == 0)
            break;
    }
    return 0;
}

static int fill(struct stage2_type1 *type1, enum reach reach, const struct type1_domain *domain)
{
    switch (reach) {
    case REACH_DOMAIN:
        return fill_domain(type1, domain);
    case REACH_IDENTITY:
        return fill_identity(type1);
    default:
        return 0;
    }
}

/* Rewrite the container. When the new content cannot be had, the old one comes back; if it cannot either, nothing. */
static int rewrite(struct stage2_type1 *type1, enum reach reach, struct type1_domain *domain)
{
    int rc = unmap_all(type1);

    if (rc != 0)
        return rc;
    rc = fill(type1, reach, domain);
    if (rc == 0) {
        type1->reach = reach;
        type1->domain = domain;
        return 0;
    }
    (void)unmap_all(type1);
    if (fill(type1, type1->reach, type1->domain) != 0)
        (void)unmap_all(type1);
    return rc;
}

/* ---------------------------------------------------------------------------------------------------------- domains */

static int open_domain(struct stage2 *stage2, uint32_t id, struct stage2_domain **out)
{
    struct type1_domain *domain = calloc(1, sizeof(*domain));

    (void)id;
    if (domain == NULL)
        return -ENOMEM;
    domain->map = iova_map_new(type1_of(stage2)->pool);
    if (domain->map == NULL) {
        free(domain);
        return -ENOMEM;
    }
    *out = (struct stage2_domain *)domain;
    return 0;
}

static void close_domain(struct stage2 *stage2, struct stage2_domain *handle)
{
    struct stage2_type1 *type1 = type1_of(stage2);
    struct type1_domain *domain = domain_of(handle);

    if (type1->domain == domain) { /* nobody took the endpoint out: it must not keep what it reaches */
        (void)unmap_all(type1);
        type1->reach = REACH_NOTHING;
        type1->domain = NULL;
    }
    iova_map_free(domain->map);
    free(domain);
}

static int map(struct stage2 *stage2, struct stage2_domain *handle, const struct iova_mapping *mapping)
{
    struct stage2_type1 *type1 = type1_of(stage2);
    struct type1_domain *domain = domain_of(handle);
    int rc = iova_map_insert(domain->map, mapping);

    if (rc != 0 || type1->domain != domain)
        return rc;
    rc = host_pieces_map(type1->memory, mapping, map_piece, unmap_piece, type1);
    if (rc != 0)
        (void)iova_map_remove(domain->map, mapping->first, mapping->last, NULL);
    return rc;
}

static int unmap(struct stage2 *stage2, struct stage2_domain *handle, const struct iova_map *mappings, uint64_t first,
                 uint64_t last)
{
    struct stage2_type1 *type1 = type1_of(stage2);
    struct type1_domain *domain = domain_of(handle);
    int rc = 0;

    (void)mappings; /* ours says the same */
    if (type1->domain == domain)
        rc = first == 0 && last == UINT64_MAX ? unmap_all(type1) : unmap_within(type1, first, last);
    if (rc != 0)
        (void)rewrite(type1, REACH_NOTHING, NULL);
    (void)iova_map_remove(domain->map, first, last, NULL);
    return rc;
}

static int follow(struct stage2 *stage2, struct stage2_domain *handle, const struct iova_map *mappings,
                  const struct guest_memory *before, const struct guest_memory *now)
{
    struct stage2_type1 *type1 = type1_of(stage2);

    if (type1->domain != domain_of(handle))
        return 0;
    return host_pieces_follow(mappings, before, now, unmap_piece, map_piece, type1);
}

static int attach(struct stage2 *stage2, uint32_t endpoint, struct stage2_domain *domain)
{
    (void)endpoint; /* there is one */
    return rewrite(type1_of(stage2), REACH_DOMAIN, domain_of(domain));
}

static int identity(struct stage2 *stage2, uint32_t endpoint)
{
    (void)endpoint;
    return rewrite(type1_of(stage2), REACH_IDENTITY, NULL);
}

static int block(struct stage2 *stage2, uint32_t endpoint)
{
    (void)endpoint;
    return rewrite(type1_of(stage2), REACH_NOTHING, NULL);
}

/* Where the endpoint reaches all memory, that follows here; its domain's part of it in follow(). */
static int memory_changed(struct stage2 *stage2, const struct guest_memory *memory)
{
    struct stage2_type1 *type1 = type1_of(stage2);
    const struct guest_memory *before = type1->memory;
    int rc = 0;

    type1->memory = memory;
    if (type1->reach != REACH_IDENTITY)
        return 0;
    for (size_t i = 0; before != NULL && i < before->count; i++) {
        const struct viommu_region *region = before->regions[i];

        if (!host_memory_has(memory, region))
            (void)unmap_range(type1, region->gpa, region->last - region->gpa + 1);
    }
    for (size_t i = 0; rc == 0 && i < memory->count; i++) {
        struct iova_mapping mapping = itself(memory->regions[i]);
        struct host_piece piece;

        if (!host_memory_has(before, memory->regions[i]) && host_piece_of(&mapping, memory->regions[i], &piece))
            rc = map_piece(type1, &piece);
    }
    if (rc != 0) {
        type1->memory = before;
        (void)rewrite(type1, REACH_IDENTITY, NULL);
    }
    return rc;
}

/* ------------------------------------------------------------------------------------------------------- life cycle */

struct stage2 *stage2_type1_stage2(struct stage2_type1 *type1)
{
    return &type1->stage2;
}

int stage2_type1_new(int fd, host_ioctl_fn call, struct stage2_type1 **out)
{
    static const struct stage2_ops ops = {
        .name = "type1",
        .open = open_domain,
        .close = close_domain,
        .map = map,
        .unmap = unmap,
        .attach = attach,
        .identity = identity,
        .block = block,
        .memory = memory_changed,
        .follow = follow,
    };
    struct stage2_type1 *type1 = calloc(1, sizeof(*type1));
    int rc = -ENOMEM;

    if (type1 == NULL)
        return -ENOMEM;
    type1->stage2.ops = &ops;
    type1->call = call;
    type1->fd = -1;
    type1->page = (uint64_t)sysconf(_SC_PAGESIZE);
    type1->pool = iova_pool_new(NULL);
    if (type1->pool == NULL)
        goto fail;
    type1->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    rc = type1->fd < 0 ? -errno : unmap_all(type1);
    if (rc != 0)
        goto fail;
    *out = type1;
    return 0;
fail:
    if (type1->fd >= 0)
        (void)close(type1->fd);
    if (type1->pool != NULL)
        iova_pool_free(type1->pool);
    free(type1);
    return rc;
}

void stage2_type1_free(struct stage2_type1 *type1)
{
    if (type1 == NULL)
        return;
    (void)unmap_all(type1);
    (void)close(type1->fd);
    iova_pool_free(type1->pool);
    free(type1);
}
