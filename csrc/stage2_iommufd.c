#include "stage2_iommufd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host_memory.h"
#include "iommufd_uapi.h"
#include "wire.h"

/* Object IDs that are tried in search of the monitor's IOAS: it makes a handful of objects, and IDs are given from 1. */
#define SEARCH_IDS 256u

enum reach {
    REACH_UNTOUCHED, /* where the monitor put it: all guest memory */
    REACH_NOTHING,
    REACH_IDENTITY,
    REACH_DOMAIN,
};

struct device {
    struct device *next;
    uint32_t endpoint;
    int fd;
    enum reach reach;
    enum reach wanted; /* other than reach: nobody has bound the device yet, or guest memory is not known yet */
    struct domain_ioas *domain;
};

struct domain_ioas {
    uint32_t id;
};

struct viommu_iommufd {
    struct stage2 stage2;
    int fd;
    host_ioctl_fn call;
    uint32_t source;
    uint32_t identity;
    uint32_t monitor;  /* the monitor's IOAS, as of the last change of memory; 0: none */
    bool has_memory;   /* there has been guest memory */
    uint64_t copied;   /* bytes of guest memory in the identity IOAS, by where they came from */
    uint64_t from_files;
    const struct guest_memory *memory; /* as last told */
    struct device *devices;
};

static struct viommu_iommufd *iommufd_of(struct stage2 *stage2)
{
    return (struct viommu_iommufd *)((char *)stage2 - offsetof(struct viommu_iommufd, stage2));
}

static struct domain_ioas *domain_of(struct stage2_domain *domain)
{
    return (struct domain_ioas *)domain;
}

/* ------------------------------------------------------------------------------------------- one ioctl per function */

static int ioas_alloc(struct viommu_iommufd *iommufd, uint32_t *id)
{
    struct host_iommu_ioas_alloc request = {.size = sizeof(request)};
    int rc = iommufd->call(iommufd->fd, HOST_IOMMU_IOAS_ALLOC, &request);

    *id = request.id;
    return rc;
}

static int destroy(struct viommu_iommufd *iommufd, uint32_t id)
{
    struct host_iommu_destroy request = {.size = sizeof(request), .id = id};

    return iommufd->call(iommufd->fd, HOST_IOMMU_DESTROY, &request);
}

static int ioas_copy(struct viommu_iommufd *iommufd, uint32_t to, uint64_t to_iova, uint32_t from, uint64_t from_iova,
                     uint64_t length, uint32_t access)
{
    struct host_iommu_ioas_copy request = {
        .size = sizeof(request),
        .flags = HOST_IOMMU_FIXED_IOVA | access,
        .to = to,
        .from = from,
        .length = length,
        .to_iova = to_iova,
        .from_iova = from_iova,
    };

    return iommufd->call(iommufd->fd, HOST_IOMMU_IOAS_COPY, &request);
}

static int ioas_map_file(struct viommu_iommufd *iommufd, uint32_t ioas, const struct viommu_region *region)
{
    struct host_iommu_ioas_map_file request = {
        .size = sizeof(request),
        .flags = HOST_IOMMU_FIXED_IOVA | HOST_IOMMU_READABLE | HOST_IOMMU_WRITEABLE,
        .ioas = ioas,
        .fd = region->fd,
        .start = region->fd_offset,
        .length = region->last - region->gpa + 1,
        .iova = region->gpa,
    };

    return iommufd->call(iommufd->fd, HOST_IOMMU_IOAS_MAP_FILE, &request);
}

/* Whatever lies in [iova, iova + length); there may be nothing. Length 2^64 is 0. */
static int ioas_unmap(struct viommu_iommufd *iommufd, uint32_t ioas, uint64_t iova, uint64_t length)
{
    struct host_iommu_ioas_unmap request = {.size = sizeof(request), .ioas = ioas, .iova = iova, .length = length};
    int rc;

    if (iova == 0 && length == 0)
        request.length = UINT64_MAX; /* the kernel's word for everything; otherwise its greatest length is one less */
    else if (length == UINT64_MAX)
        request.length--;
    rc = iommufd->call(iommufd->fd, HOST_IOMMU_IOAS_UNMAP, &request);
    return rc == -ENOENT ? 0 : rc;
}

static int device_attach(struct viommu_iommufd *iommufd, const struct device *device, uint32_t ioas)
{
    struct host_vfio_attach request = {.argsz = sizeof(request), .page_table = ioas};
    int rc = iommufd->call(device->fd, HOST_VFIO_DEVICE_ATTACH, &request);

    /* What the device reserves is mapped already: the guest is told that it does not fit into the domain. */
    return rc == -EADDRINUSE ? -EOPNOTSUPP : rc;
}

static int device_detach(struct viommu_iommufd *iommufd, const struct device *device)
{
    struct host_vfio_detach request = {.argsz = sizeof(request)};

    return iommufd->call(device->fd, HOST_VFIO_DEVICE_DETACH, &request);
}

/* ---------------------------------------------------------------------------------------------------------- devices */

static struct device *find_device(const struct viommu_iommufd *iommufd, uint32_t endpoint)
{
    struct device *device = iommufd->devices;

    while (device != NULL && device->endpoint != endpoint)
        device = device->next;
    return device;
}

static int cut_off(struct viommu_iommufd *iommufd, struct device *device)
{
    int rc = device_detach(iommufd, device);

    device->domain = NULL;
    device->wanted = REACH_NOTHING;
    if (rc == -EINVAL) /* not bound: it cannot do DMA at all, but whoever binds it may let it */
        return 0;
    device->reach = REACH_NOTHING;
    return rc == -ENODEV ? 0 : rc;
}

static int to_identity(struct viommu_iommufd *iommufd, struct device *device)
{
    int rc;

    device->wanted = REACH_IDENTITY;
    if (!iommufd->has_memory) /* the monitor's own attachment is as good, and has the memory */
        return 0;
    rc = device_attach(iommufd, device, iommufd->identity);
    if (rc == -EINVAL && device->reach == REACH_UNTOUCHED)
        return 0;
    if (rc == 0) {
        device->reach = REACH_IDENTITY;
        device->domain = NULL;
    } else {
        device->wanted = device->reach;
    }
    return rc;
}

void stage2_iommufd_settle(struct viommu_iommufd *iommufd)
{
    for (struct device *device = iommufd->devices; device != NULL; device = device->next) {
        if (device->wanted == device->reach)
            continue;
        if (device->wanted == REACH_NOTHING)
            (void)cut_off(iommufd, device);
        else if (device->wanted == REACH_IDENTITY && to_identity(iommufd, device) != 0)
            (void)cut_off(iommufd, device);
    }
}

int stage2_iommufd_add(struct viommu_iommufd *iommufd, uint32_t endpoint, int fd)
{
    struct device *device;

    if (find_device(iommufd, endpoint) != NULL)
        return -EEXIST;
    device = calloc(1, sizeof(*device));
    if (device == NULL)
        return -ENOMEM;
    device->endpoint = endpoint;
    device->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (device->fd < 0) {
        free(device);
        return -errno;
    }
    device->next = iommufd->devices;
    iommufd->devices = device;
    return 0;
}

void stage2_iommufd_remove(struct viommu_iommufd *iommufd, uint32_t endpoint)
{
    for (struct device **link = &iommufd->devices; *link != NULL; link = &(*link)->next) {
        struct device *device = *link;

        if (device->endpoint != endpoint)
            continue;
        if (device->reach != REACH_UNTOUCHED)
            (void)cut_off(iommufd, device);
        *link = device->next;
        (void)close(device->fd);
        free(device);
        return;
    }
}

/* ---------------------------------------------------------------------------------------------------------- domains */

struct into {
    struct viommu_iommufd *iommufd;
    uint32_t ioas;
};

static int map_piece(void *context, const struct host_piece *piece)
{
    const struct into *into = context;
    uint32_t access = ((piece->flags & MAP_FLAG_READ) != 0 ? HOST_IOMMU_READABLE : 0) |
                      ((piece->flags & MAP_FLAG_WRITE) != 0 ? HOST_IOMMU_WRITEABLE : 0);

    return ioas_copy(into->iommufd, into->ioas, piece->iova, into->iommufd->identity,
                     piece->region->gpa + piece->offset, piece->length, access);
}

static int unmap_piece(void *context, const struct host_piece *piece)
{
    const struct into *into = context;

    return ioas_unmap(into->iommufd, into->ioas, piece->iova, piece->length);
}

static int open_domain(struct stage2 *stage2, uint32_t id, struct stage2_domain **out)
{
    struct viommu_iommufd *iommufd = iommufd_of(stage2);
    struct domain_ioas *domain = calloc(1, sizeof(*domain));
    int rc;

    (void)id;
    if (domain == NULL)
        return -ENOMEM;
    rc = ioas_alloc(iommufd, &domain->id);
    if (rc != 0) {
        free(domain);
        return rc;
    }
    *out = (struct stage2_domain *)domain;
    return 0;
}

static void close_domain(struct stage2 *stage2, struct stage2_domain *handle)
{
    struct viommu_iommufd *iommufd = iommufd_of(stage2);
    struct domain_ioas *domain = domain_of(handle);

    if (destroy(iommufd, domain->id) != 0) {
        /* A device is in it that could not be moved out. It stays there, with nothing to reach. */
        (void)ioas_unmap(iommufd, domain->id, 0, 0);
    }
    free(domain);
}

static int map(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_mapping *mapping)
{
    struct into into = {iommufd_of(stage2), domain_of(domain)->id};

    return host_pieces_map(into.iommufd->memory, mapping, map_piece, unmap_piece, &into);
}

static int unmap(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *mappings, uint64_t first,
                 uint64_t last)
{
    struct viommu_iommufd *iommufd = iommufd_of(stage2);
    int rc = ioas_unmap(iommufd, domain_of(domain)->id, first, last - first + 1);

    (void)mappings; /* none is cut by the ends, and the kernel goes by the range as we do */
    if (rc == 0)
        return 0;
    for (struct device *device = iommufd->devices; device != NULL; device = device->next) {
        if (device->domain == domain_of(domain))
            (void)cut_off(iommufd, device);
    }
    return rc;
}

static int follow(struct stage2 *stage2, struct stage2_domain *domain, const struct iova_map *mappings,
                  const struct guest_memory *before, const struct guest_memory *now)
{
    struct into into = {iommufd_of(stage2), domain_of(domain)->id};

    return host_pieces_follow(mappings, before, now, unmap_piece, map_piece, &into);
}

static int attach(struct stage2 *stage2, uint32_t endpoint, struct stage2_domain *domain)
{
    struct viommu_iommufd *iommufd = iommufd_of(stage2);
    struct device *device = find_device(iommufd, endpoint);
    int rc;

    if (device == NULL)
        return -ENODEV;
    rc = device_attach(iommufd, device, domain_of(domain)->id);
    if (rc != 0)
        return rc;
    device->reach = device->wanted = REACH_DOMAIN;
    device->domain = domain_of(domain);
    return 0;
}

static int identity(struct stage2 *stage2, uint32_t endpoint)
{
    struct device *device = find_device(iommufd_of(stage2), endpoint);

    return device == NULL ? -ENODEV : to_identity(iommufd_of(stage2), device);
}

static int block(struct stage2 *stage2, uint32_t endpoint)
{
    struct device *device = find_device(iommufd_of(stage2), endpoint);

    return device == NULL ? 0 : cut_off(iommufd_of(stage2), device);
}

/* ----------------------------------------------------------------------------------------------------------- memory */

/* Whether an IOAS that is not ours has every region of a table at its own addresses. */
static bool has_all(struct viommu_iommufd *iommufd, uint32_t candidate, const struct guest_memory *memory)
{
    uint32_t scratch;
    bool all = true;

    if (ioas_alloc(iommufd, &scratch) != 0)
        return false;
    /* A copy into an IOAS without a device pins nothing and touches no page table. */
    for (size_t i = 0; all && i < memory->count; i++) {
        const struct viommu_region *region = memory->regions[i];

        all = ioas_copy(iommufd, scratch, region->gpa, candidate, region->gpa, region->last - region->gpa + 1,
                        HOST_IOMMU_READABLE | HOST_IOMMU_WRITEABLE) == 0;
    }
    (void)destroy(iommufd, scratch);
    return all;
}

static bool is_ioas(struct viommu_iommufd *iommufd, uint32_t id)
{
    struct host_iommu_ioas_iova_ranges request = {.size = sizeof(request), .ioas = id};
    int rc = iommufd->call(iommufd->fd, HOST_IOMMU_IOAS_IOVA_RANGES, &request);

    return rc == 0 || rc == -EMSGSIZE;
}

static bool is_ours(const struct viommu_iommufd *iommufd, uint32_t id)
{
    if (id == iommufd->identity)
        return true;
    for (const struct device *device = iommufd->devices; device != NULL; device = device->next) {
        if (device->domain != NULL && device->domain->id == id)
            return true;
    }
    return false;
}

/*
 * The monitor's IOAS. Nobody tells its ID, so it is known by what it has: all guest memory at its own addresses. Two
 * such are one too many. 0: there is none to rely on.
 */
static uint32_t find_monitor(struct viommu_iommufd *iommufd, const struct guest_memory *memory)
{
    uint32_t found = 0;

    if (memory->count == 0)
        return 0;
    for (uint32_t id = 1; id <= SEARCH_IDS; id++) {
        if (is_ours(iommufd, id) || !is_ioas(iommufd, id) || !has_all(iommufd, id, memory))
            continue;
        if (found != 0)
            return 0;
        found = id;
    }
    return found;
}

static int add_region(struct viommu_iommufd *iommufd, const struct viommu_region *region, bool *copied)
{
    *copied = iommufd->monitor != 0 &&
              ioas_copy(iommufd, iommufd->identity, region->gpa, iommufd->monitor, region->gpa,
                        region->last - region->gpa + 1, HOST_IOMMU_READABLE | HOST_IOMMU_WRITEABLE) == 0;
    if (*copied)
        return 0;
    return ioas_map_file(iommufd, iommufd->identity, region);
}

static void remove_region(struct viommu_iommufd *iommufd, const struct viommu_region *region)
{
    (void)ioas_unmap(iommufd, iommufd->identity, region->gpa, region->last - region->gpa + 1);
}

/* Guest memory that comes and goes is added and removed in the identity IOAS; what stays is not touched. */
static int memory_changed(struct stage2 *stage2, const struct guest_memory *memory)
{
    struct viommu_iommufd *iommufd = iommufd_of(stage2);
    const struct guest_memory *before = iommufd->memory;
    uint64_t *count[] = {&iommufd->from_files, &iommufd->copied};
    int rc = 0;

    iommufd->monitor = iommufd->source == VIOMMU_IOMMUFD_FROM_MONITOR ? find_monitor(iommufd, memory) : 0;
    for (size_t i = 0; before != NULL && i < before->count; i++) {
        if (!host_memory_has(memory, before->regions[i]))
            remove_region(iommufd, before->regions[i]);
    }
    for (size_t i = 0; i < memory->count; i++) {
        const struct viommu_region *region = memory->regions[i];
        bool copied;

        if (host_memory_has(before, region))
            continue;
        rc = add_region(iommufd, region, &copied);
        if (rc != 0) {
            while (i-- > 0) {
                if (!host_memory_has(before, memory->regions[i]))
                    remove_region(iommufd, memory->regions[i]);
            }
            break;
        }
        *count[copied] += region->last - region->gpa + 1;
    }
    if (rc != 0) {
        for (size_t i = 0; before != NULL && i < before->count; i++) {
            bool copied;

            if (!host_memory_has(memory, before->regions[i]))
                (void)add_region(iommufd, before->regions[i], &copied);
        }
        return rc;
    }
    iommufd->memory = memory;
    iommufd->has_memory = iommufd->has_memory || memory->count != 0;
    stage2_iommufd_settle(iommufd);
    return 0;
}

/* -------------------------------------------------------------------------------------------------------- life cycle */

struct stage2 *stage2_iommufd_stage2(struct viommu_iommufd *iommufd)
{
    return &iommufd->stage2;
}

void stage2_iommufd_info(const struct viommu_iommufd *iommufd, struct viommu_iommufd_info *out)
{
    *out = (struct viommu_iommufd_info){
        .monitor_ioas = iommufd->monitor,
        .bytes_from_monitor = iommufd->copied,
        .bytes_from_files = iommufd->from_files,
    };
    for (const struct device *device = iommufd->devices; device != NULL; device = device->next)
        out->unsettled += device->wanted != device->reach;
}

int stage2_iommufd_new(int fd, uint32_t source, host_ioctl_fn call, struct viommu_iommufd **out)
{
    static const struct stage2_ops ops = {
        .name = "iommufd",
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
    struct viommu_iommufd *iommufd;
    int rc;

    if (source > VIOMMU_IOMMUFD_FROM_FILES)
        return -EINVAL;
    iommufd = calloc(1, sizeof(*iommufd));
    if (iommufd == NULL)
        return -ENOMEM;
    iommufd->stage2.ops = &ops;
    iommufd->call = call;
    iommufd->source = source;
    iommufd->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    rc = iommufd->fd < 0 ? -errno : ioas_alloc(iommufd, &iommufd->identity);
    if (rc != 0) {
        if (iommufd->fd >= 0)
            (void)close(iommufd->fd);
        free(iommufd);
        return rc;
    }
    *out = iommufd;
    return 0;
}

void stage2_iommufd_free(struct viommu_iommufd *iommufd)
{
    if (iommufd == NULL)
        return;
    while (iommufd->devices != NULL)
        stage2_iommufd_remove(iommufd, iommufd->devices->endpoint);
    (void)destroy(iommufd, iommufd->identity);
    (void)close(iommufd->fd);
    free(iommufd);
}
