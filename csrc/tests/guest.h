/*
 * A guest's memory for tests: a memfd, mapped once by the test (the guest's view) and again by the engine. Pieces of
 * it are handed out from the bottom up and never come back.
 */
#ifndef VIOMMU_TESTS_GUEST_H
#define VIOMMU_TESTS_GUEST_H

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "viommu.h"

#define GUEST_GPA 0x40000000ull

struct guest {
    int fd;
    uint8_t *ram;   /* our mapping */
    uint64_t size;
    uint64_t next;  /* offset of the first byte not handed out */
    struct viommu_region *region;
};

static inline void guest_init(struct guest *guest, uint64_t size)
{
    guest->fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(guest->fd >= 0);
    CHECK(ftruncate(guest->fd, (off_t)size) == 0);
    guest->ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, guest->fd, 0);
    CHECK(guest->ram != MAP_FAILED);
    guest->size = size;
    guest->next = 0;
    CHECK_EQ(viommu_region_map(GUEST_GPA, size, (uint64_t)(uintptr_t)guest->ram, 0, guest->fd, &guest->region), 0);
}

static inline void guest_fini(struct guest *guest)
{
    viommu_region_free(guest->region);
    CHECK(munmap(guest->ram, guest->size) == 0);
    CHECK(close(guest->fd) == 0);
}

/* A piece of guest memory, by guest-physical address. */
static inline uint64_t guest_alloc(struct guest *guest, uint64_t size, uint64_t align)
{
    uint64_t at = (guest->next + align - 1) & ~(align - 1);

    CHECK(at + size <= guest->size);
    guest->next = at + size;
    return GUEST_GPA + at;
}

static inline uint8_t *guest_at(const struct guest *guest, uint64_t gpa)
{
    CHECK(gpa >= GUEST_GPA && gpa - GUEST_GPA < guest->size);
    return guest->ram + (gpa - GUEST_GPA);
}

#endif
