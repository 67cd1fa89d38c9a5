#include "vfio_user_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "viommu.h"
#include "wire.h"

void vfio_user_memory_fini(struct vfio_user_memory *memory)
{
    guest_memory_free(memory->table);
    for (size_t i = 0; i < memory->count; i++)
        viommu_region_free(memory->ranges[i].region);
    free(memory->ranges);
    memset(memory, 0, sizeof(*memory));
}

/* Index of the first range that ends at or after gpa. */
static size_t range_from(const struct vfio_user_memory *memory, uint64_t gpa)
{
    size_t low = 0, high = memory->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (memory->ranges[middle].last < gpa)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* A table of the regions behind these ranges. */
static int make_table(const struct vfio_user_range *ranges, size_t count, struct guest_memory **out)
{
    struct viommu_region *regions[VFIO_USER_MAX_RANGES];
    size_t backed = 0;

    for (size_t i = 0; i < count; i++) {
        if (ranges[i].region != NULL)
            regions[backed++] = ranges[i].region;
    }
    return guest_memory_new(regions, backed, out);
}

/* Put new ranges (owned) in place of the old ones. */
static int replace(struct vfio_user_memory *memory, struct vfio_user_range *ranges, size_t count,
                   struct guest_memory **before)
{
    struct guest_memory *table;
    int rc = make_table(ranges, count, &table);

    if (rc != 0) {
        free(ranges);
        return rc;
    }
    free(memory->ranges);
    memory->ranges = ranges;
    memory->count = count;
    *before = memory->table;
    memory->table = table;
    memory->bytes = 0;
    for (size_t i = 0; i < count; i++) {
        if (ranges[i].region != NULL)
            memory->bytes += ranges[i].last - ranges[i].first + 1; /* a file's size: it cannot wrap */
    }
    return 0;
}

int vfio_user_memory_add(struct vfio_user_memory *memory, const struct vfio_user_range *range,
                         struct guest_memory **before)
{
    struct vfio_user_range *ranges;
    size_t at = range_from(memory, range->first);

    if (at < memory->count && memory->ranges[at].first <= range->last)
        return -EEXIST;
    if (memory->count >= VFIO_USER_MAX_RANGES)
        return -ENOSPC;
    ranges = malloc((memory->count + 1) * sizeof(*ranges));
    if (ranges == NULL)
        return -ENOMEM;
    if (memory->count != 0) {
        memcpy(ranges, memory->ranges, at * sizeof(*ranges));
        memcpy(&ranges[at + 1], &memory->ranges[at], (memory->count - at) * sizeof(*ranges));
    }
    ranges[at] = *range;
    return replace(memory, ranges, memory->count + 1, before);
}

int vfio_user_memory_select(const struct vfio_user_memory *memory, uint64_t first, uint64_t last, size_t *begin,
                            size_t *end)
{
    size_t i = range_from(memory, first);

    *begin = i;
    for (; i < memory->count && memory->ranges[i].first <= last; i++) {
        if (memory->ranges[i].first < first || memory->ranges[i].last > last)
            return -EINVAL;
    }
    *end = i;
    return 0;
}

int vfio_user_memory_remove(struct vfio_user_memory *memory, size_t begin, size_t end, struct guest_memory **before)
{
    struct viommu_region *gone[VFIO_USER_MAX_RANGES];
    size_t left = memory->count - (end - begin);
    struct vfio_user_range *ranges = malloc((left + 1) * sizeof(*ranges));
    int rc;

    if (ranges == NULL)
        return -ENOMEM;
    for (size_t i = begin; i < end; i++)
        gone[i - begin] = memory->ranges[i].region;
    memcpy(ranges, memory->ranges, begin * sizeof(*ranges));
    memcpy(&ranges[begin], &memory->ranges[end], (memory->count - end) * sizeof(*ranges));
    rc = replace(memory, ranges, left, before);
    for (size_t i = begin; rc == 0 && i < end; i++)
        viommu_region_free(gone[i - begin]);
    return rc;
}

bool vfio_user_piece_in(const struct vfio_user_range *range, const struct iova_mapping *mapping,
                        struct vfio_user_piece *out)
{
    uint64_t last = mapping->phys + (mapping->last - mapping->first); /* checked when it was mapped */
    uint64_t from = mapping->phys > range->first ? mapping->phys : range->first;
    uint64_t to = last < range->last ? last : range->last;
    uint32_t flags = mapping->flags & range->flags & (MAP_FLAG_READ | MAP_FLAG_WRITE);

    if (from > to || flags == 0 || range->region == NULL)
        return false;
    *out = (struct vfio_user_piece){
        .iova = mapping->first + (from - mapping->phys),
        .size = to - from + 1,
        .offset = range->region->fd_offset + (from - range->first),
        .flags = flags,
        .region = range->region,
    };
    return true;
}

bool vfio_user_memory_next_piece(const struct vfio_user_memory *memory, const struct iova_mapping *mapping,
                                 size_t *index, struct vfio_user_piece *out)
{
    uint64_t last = mapping->phys + (mapping->last - mapping->first);
    size_t i = *index != 0 ? *index : range_from(memory, mapping->phys);

    for (; i < memory->count && memory->ranges[i].first <= last; i++) {
        if (vfio_user_piece_in(&memory->ranges[i], mapping, out)) {
            *index = i + 1;
            return true;
        }
    }
    *index = memory->count;
    return false;
}

bool vfio_user_memory_allows(const struct vfio_user_memory *memory, uint64_t gpa, uint64_t length, uint32_t access)
{
    uint64_t last = gpa + (length - 1);

    for (size_t i = range_from(memory, gpa); i < memory->count; i++) {
        const struct vfio_user_range *range = &memory->ranges[i];

        if (range->first > gpa || range->region == NULL || (access & ~range->flags) != 0)
            return false;
        if (range->last >= last)
            return true;
        gpa = range->last + 1;
    }
    return false;
}
