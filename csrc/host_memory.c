#include "host_memory.h"

#include <sys/stat.h>

#include "wire.h"

bool host_piece_of(const struct iova_mapping *mapping, const struct viommu_region *region, struct host_piece *out)
{
    uint64_t last = mapping->phys + (mapping->last - mapping->first);
    uint64_t from = mapping->phys > region->gpa ? mapping->phys : region->gpa;
    uint64_t to = last < region->last ? last : region->last;

    if (from > to)
        return false;
    *out = (struct host_piece){
        .iova = mapping->first + (from - mapping->phys),
        .length = to - from + 1,
        .region = region,
        .offset = from - region->gpa,
        .flags = mapping->flags,
    };
    return true;
}

bool host_mapping_counts(const struct iova_mapping *mapping)
{
    return (mapping->flags & MAP_FLAG_MMIO) == 0 && (mapping->flags & (MAP_FLAG_READ | MAP_FLAG_WRITE)) != 0;
}

static bool same_memory(const struct viommu_region *a, const struct viommu_region *b)
{
    struct stat file_a, file_b;

    if (a == b)
        return true;
    if (a->gpa != b->gpa || a->last != b->last || a->fd_offset != b->fd_offset)
        return false;
    return fstat(a->fd, &file_a) == 0 && fstat(b->fd, &file_b) == 0 && file_a.st_dev == file_b.st_dev &&
           file_a.st_ino == file_b.st_ino;
}

bool host_memory_has(const struct guest_memory *memory, const struct viommu_region *region)
{
    for (size_t i = 0; memory != NULL && i < memory->count; i++) {
        if (same_memory(memory->regions[i], region))
            return true;
    }
    return false;
}

int host_pieces_map(const struct guest_memory *memory, const struct iova_mapping *mapping, host_piece_fn fn,
                    host_piece_fn undo, void *context)
{
    struct host_piece piece;
    int rc;

    if (memory == NULL || !host_mapping_counts(mapping))
        return 0;
    for (size_t i = 0; i < memory->count; i++) {
        if (!host_piece_of(mapping, memory->regions[i], &piece))
            continue;
        rc = fn(context, &piece);
        if (rc == 0)
            continue;
        while (i-- > 0) {
            if (host_piece_of(mapping, memory->regions[i], &piece))
                (void)undo(context, &piece);
        }
        return rc;
    }
    return 0;
}

/* Calls fn for the pieces of all mappings in the regions that others lacks. */
static int for_difference(const struct iova_map *map, const struct guest_memory *memory,
                          const struct guest_memory *others, host_piece_fn fn, void *context, bool go_on)
{
    int first_error = 0;

    for (size_t i = 0; memory != NULL && i < memory->count; i++) {
        const struct viommu_region *region = memory->regions[i];
        struct iova_mapping mapping;

        if (host_memory_has(others, region))
            continue;
        for (uint64_t from = 0; iova_map_next(map, from, &mapping);) {
            struct host_piece piece;

            if (host_mapping_counts(&mapping) && host_piece_of(&mapping, region, &piece)) {
                int rc = fn(context, &piece);

                if (rc != 0 && !go_on)
                    return rc;
                first_error = first_error != 0 ? first_error : rc;
            }
            from = mapping.last + 1;
            if (from == 0)
                break;
        }
    }
    return first_error;
}

int host_pieces_follow(const struct iova_map *map, const struct guest_memory *before, const struct guest_memory *now,
                       host_piece_fn remove, host_piece_fn add, void *context)
{
    int rc = for_difference(map, before, now, remove, context, true);

    return rc != 0 ? rc : for_difference(map, now, before, add, context, false);
}
