/*
 * Guest memory: the table of regions a front-end shared, and the only code that turns an address of the guest into
 * one of ours. A range is checked whole: base and every byte up to its end, across neighbouring regions.
 *
 * Regions are reference counted; a table is an immutable snapshot of them. The worker uses one table at a time and
 * the control plane replaces it only while the worker is parked.
 */
#ifndef VIOMMU_GUEST_MEMORY_H
#define VIOMMU_GUEST_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GUEST_PAGE_SHIFT 12 /* the unit of the dirty log (vhost-user: VHOST_LOG_PAGE) */

/* A mapped piece of a file that others have as well, and may shrink under us. */
struct shared_map {
    void *start;         /* NULL: none */
    size_t size;
    size_t page;         /* what the file can be mapped and cut in: more than a page of memory on hugetlbfs */
};

struct viommu_region {
    uint64_t gpa;
    uint64_t last;       /* guest-physical, inclusive */
    uint64_t user_addr;  /* the same memory in the front-end's address space */
    uint8_t *host;       /* our mapping of gpa */
    struct shared_map map; /* what was mapped: host is inside it */
    uint64_t fd_offset;  /* where gpa is in the file */
    int fd;              /* ours */
    unsigned refs;       /* control plane only */
};

struct dirty_log {
    _Atomic uint8_t *bitmap;
    uint64_t pages;      /* bits */
    struct shared_map map;
};

struct guest_memory {
    size_t count;
    const struct dirty_log *log;       /* NULL: not logging */
    const struct shared_map *inflight; /* not memory, but the front-end's to shrink as well; NULL: none */
    atomic_bool shrunk;                /* a file shrank under a mapping; seen by the SIGBUS guard */
    struct viommu_region *regions[];   /* by gpa, never overlapping */
};

/* Map [offset, offset + size) of a file; *at is where offset is. 0 or -errno. Closing what is not open is allowed. */
int shared_map_open(int fd, uint64_t size, uint64_t offset, struct shared_map *out, uint8_t **at);
void shared_map_close(struct shared_map *map);

/* A snapshot of count regions, a reference taken on each. -EINVAL when two overlap, -ENOMEM. */
int guest_memory_new(struct viommu_region *const *regions, size_t count, struct guest_memory **out);
void guest_memory_free(struct guest_memory *memory);

/* Every byte of [gpa, gpa + length) is guest memory. True for length 0. */
bool guest_memory_covers(const struct guest_memory *memory, uint64_t gpa, uint64_t length);
/* Some byte of [first, last] is guest memory. */
bool guest_memory_touches(const struct guest_memory *memory, uint64_t first, uint64_t last);

/* Copy out of or into guest memory, whole or not at all: 0 or -EFAULT. Writes are logged. */
int guest_memory_read(const struct guest_memory *memory, uint64_t gpa, void *buffer, size_t length);
int guest_memory_write(const struct guest_memory *memory, uint64_t gpa, const void *buffer, size_t length);
int guest_memory_zero(const struct guest_memory *memory, uint64_t gpa, size_t length);

/*
 * A pointer to a range that lies within one region, or NULL. by_gpa tells which kind of address it is. *region, if
 * asked for, is the one it lies in.
 */
void *guest_memory_span(const struct guest_memory *memory, uint64_t addr, uint64_t length, bool by_gpa,
                        const struct viommu_region **region);

/* Mark [gpa, gpa + length) dirty, if there is a log. */
void guest_memory_dirty(const struct guest_memory *memory, uint64_t gpa, uint64_t length);

/* A mapping of a dirty log in a file: 0 or -errno. */
int dirty_log_map(int fd, uint64_t size, uint64_t offset, struct dirty_log *out);
void dirty_log_unmap(struct dirty_log *log);

/*
 * A front-end may shrink the file behind guest memory at any time; the next access would be a SIGBUS. The guard
 * replaces the page by zeroes and sets memory->shrunk, so that the worker finds out at its next round. It belongs to
 * the calling thread and covers one table at a time (NULL: none); other faults go to the handler that was there.
 */
void guest_memory_guard(struct guest_memory *memory);

#endif
