/*
 * The host's kernel as iommufd and type1 show it: address spaces with areas, devices attached to them, and a call that
 * fails when the test says so. Only for what no kernel does on demand; that a real one behaves so is for the lab to show.
 */
#ifndef VIOMMU_TESTS_HOST_KERNEL_H
#define VIOMMU_TESTS_HOST_KERNEL_H

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "iommufd_uapi.h"

#define KERNEL_SPACES 32u
#define KERNEL_AREAS 64u
#define KERNEL_DEVICES 4u
#define KERNEL_NOWHERE UINT64_MAX

struct kernel_area {
    uint64_t iova;
    uint64_t length;
    uint64_t backing; /* offset in the file of guest memory, or an address of ours */
    uint32_t flags;
};

struct kernel_space {
    bool exists;
    unsigned count;
    struct kernel_area areas[KERNEL_AREAS];
};

struct kernel_device {
    int fd; /* as the back-end has it; learnt at the first call */
    bool bound;
    uint32_t space; /* 0: none */
};

static struct {
    struct kernel_space spaces[KERNEL_SPACES]; /* by ID; 0 is that of a type1 container */
    struct kernel_device devices[KERNEL_DEVICES];
    unsigned device_count;
    unsigned calls;
    unsigned fail_at; /* this call fails; 0: none */
    unsigned long fail_request; /* or every call of this request */
    int error;
    unsigned most_areas; /* of a container: then ENOSPC */
} kernel;

static inline int kernel_add(struct kernel_space *space, struct kernel_area area)
{
    for (unsigned i = 0; i < space->count; i++) {
        if (area.iova < space->areas[i].iova + space->areas[i].length &&
            space->areas[i].iova < area.iova + area.length)
            return -EEXIST;
    }
    CHECK(space->count < KERNEL_AREAS);
    space->areas[space->count++] = area;
    return 0;
}

/* Areas in [first, last] go; none may be cut. */
static inline int kernel_remove(struct kernel_space *space, uint64_t first, uint64_t last, int none, int cut)
{
    bool any = false;

    for (unsigned i = 0; i < space->count; i++) {
        const struct kernel_area *area = &space->areas[i];

        if (area->iova <= last && area->iova + area->length - 1 >= first &&
            (area->iova < first || area->iova + area->length - 1 > last))
            return cut;
    }
    for (unsigned i = 0; i < space->count;) {
        if (space->areas[i].iova >= first && space->areas[i].iova <= last) {
            space->areas[i] = space->areas[--space->count];
            any = true;
        } else {
            i++;
        }
    }
    return any ? 0 : none;
}

static inline const struct kernel_area *kernel_find(const struct kernel_space *space, uint64_t iova)
{
    for (unsigned i = 0; i < space->count; i++) {
        if (iova >= space->areas[i].iova && iova - space->areas[i].iova < space->areas[i].length)
            return &space->areas[i];
    }
    return NULL;
}

static inline struct kernel_space *kernel_space(uint32_t id)
{
    return id != 0 && id < KERNEL_SPACES && kernel.spaces[id].exists ? &kernel.spaces[id] : NULL;
}

static inline uint32_t kernel_new_space(void)
{
    for (uint32_t id = 1; id < KERNEL_SPACES; id++) {
        if (!kernel.spaces[id].exists) {
            kernel.spaces[id] = (struct kernel_space){.exists = true};
            return id;
        }
    }
    CHECK(false);
    return 0;
}

static inline int kernel_copy(const struct host_iommu_ioas_copy *request)
{
    const struct kernel_space *from = kernel_space(request->from);
    struct kernel_space *to = kernel_space(request->to);
    uint64_t at = 0;

    if (from == NULL || to == NULL)
        return -ENOENT;
    for (uint64_t done = 0; done < request->length; done += at) { /* all of it must be there */
        const struct kernel_area *area = kernel_find(from, request->from_iova + done);

        if (area == NULL)
            return -ENOENT;
        at = area->iova + area->length - (request->from_iova + done);
    }
    for (uint64_t done = 0; done < request->length; done += at) {
        const struct kernel_area *area = kernel_find(from, request->from_iova + done);
        uint64_t offset = request->from_iova + done - area->iova;
        int rc;

        at = area->length - offset < request->length - done ? area->length - offset : request->length - done;
        rc = kernel_add(to, (struct kernel_area){request->to_iova + done, at, area->backing + offset, request->flags});
        if (rc != 0)
            return rc;
    }
    return 0;
}

static inline struct kernel_device *kernel_device(int fd)
{
    for (unsigned i = 0; i < kernel.device_count; i++) {
        if (kernel.devices[i].fd == fd)
            return &kernel.devices[i];
    }
    CHECK(false);
    return NULL;
}

static inline int kernel_device_call(int fd, unsigned long request, void *argument)
{
    struct kernel_device *device = kernel_device(fd);
    const struct host_vfio_attach *attach = argument;

    if (!device->bound)
        return -EINVAL;
    if (request == HOST_VFIO_DEVICE_ATTACH && kernel_space(attach->page_table) == NULL)
        return -ENOENT;
    device->space = request == HOST_VFIO_DEVICE_ATTACH ? attach->page_table : 0;
    return 0;
}

static inline int kernel_destroy(uint32_t id)
{
    if (kernel_space(id) == NULL)
        return -ENOENT;
    for (unsigned i = 0; i < kernel.device_count; i++) {
        if (kernel.devices[i].space == id)
            return -EBUSY;
    }
    kernel.spaces[id].exists = false;
    return 0;
}

/* A host_ioctl_fn. */
static inline int kernel_call(int fd, unsigned long request, void *argument)
{
    kernel.calls++;
    if (kernel.calls == kernel.fail_at || (request == kernel.fail_request && kernel.fail_request != 0))
        return -kernel.error;
    switch (request) {
    case HOST_VFIO_DEVICE_ATTACH:
    case HOST_VFIO_DEVICE_DETACH:
        return kernel_device_call(fd, request, argument);
    case HOST_IOMMU_IOAS_ALLOC:
        ((struct host_iommu_ioas_alloc *)argument)->id = kernel_new_space();
        return 0;
    case HOST_IOMMU_DESTROY:
        return kernel_destroy(((struct host_iommu_destroy *)argument)->id);
    case HOST_IOMMU_IOAS_COPY:
        return kernel_copy(argument);
    case HOST_IOMMU_IOAS_IOVA_RANGES:
        return kernel_space(((struct host_iommu_ioas_iova_ranges *)argument)->ioas) != NULL ? -EMSGSIZE : -ENOENT;
    case HOST_IOMMU_IOAS_UNMAP: {
        const struct host_iommu_ioas_unmap *unmap = argument;
        uint64_t last = unmap->length == UINT64_MAX ? UINT64_MAX : unmap->iova + unmap->length - 1;

        CHECK(kernel_space(unmap->ioas) != NULL);
        return kernel_remove(kernel_space(unmap->ioas), unmap->iova, last, -ENOENT, -ENOENT);
    }
    case HOST_IOMMU_IOAS_MAP_FILE: {
        const struct host_iommu_ioas_map_file *map = argument;

        CHECK(kernel_space(map->ioas) != NULL);
        return kernel_add(kernel_space(map->ioas),
                          (struct kernel_area){map->iova, map->length, map->start, map->flags});
    }
    case HOST_VFIO_IOMMU_MAP: {
        const struct host_vfio_map *map = argument;

        if (kernel.most_areas != 0 && kernel.spaces[0].count == kernel.most_areas)
            return -ENOSPC;
        return kernel_add(&kernel.spaces[0], (struct kernel_area){map->iova, map->size, map->vaddr, map->flags});
    }
    case HOST_VFIO_IOMMU_UNMAP: {
        const struct host_vfio_unmap *unmap = argument;

        if ((unmap->flags & HOST_VFIO_UNMAP_ALL) != 0)
            return kernel_remove(&kernel.spaces[0], 0, UINT64_MAX, 0, -EINVAL);
        if (unmap->size == 0 || (unmap->iova | unmap->size) % 4096 != 0)
            return -EINVAL;
        return kernel_remove(&kernel.spaces[0], unmap->iova, unmap->iova + unmap->size - 1, 0, -EINVAL);
    }
    default:
        return -ENOTTY;
    }
}

/* Where an access of a device ends, as an offset in the file of guest memory; KERNEL_NOWHERE: it is stopped. */
static inline uint64_t kernel_reach(unsigned device, uint64_t iova)
{
    const struct kernel_space *space = kernel_space(kernel.devices[device].space);
    const struct kernel_area *area = space != NULL ? kernel_find(space, iova) : NULL;

    return area != NULL ? area->backing + (iova - area->iova) : KERNEL_NOWHERE;
}

static inline unsigned kernel_space_count(void)
{
    unsigned count = 0;

    for (uint32_t id = 1; id < KERNEL_SPACES; id++)
        count += kernel.spaces[id].exists;
    return count;
}

#endif
