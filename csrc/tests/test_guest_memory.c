/*
 * Guest memory: what is covered and what is not (adjacent regions, holes, both ends of the address space), copies
 * that are whole or not at all, the dirty log, what may be mapped, and files that shrink under the mapping.
 */
#include "guest_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "viommu.h"

#define PAGE 4096u

static int file_of(uint64_t size)
{
    int fd = memfd_create("memory", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK(ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static struct viommu_region *region_of(uint64_t gpa, uint64_t size, uint64_t user_addr, uint64_t offset, int fd)
{
    struct viommu_region *region;

    CHECK_EQ(viommu_region_map(gpa, size, user_addr, offset, fd, &region), 0);
    return region;
}

static struct guest_memory *memory_of(struct viommu_region **regions, size_t count)
{
    struct guest_memory *memory;

    CHECK_EQ(guest_memory_new(regions, count, &memory), 0);
    for (size_t i = 0; i < count; i++)
        viommu_region_free(regions[i]); /* the table has its own reference */
    return memory;
}

/* Pages of this process that are mapped from the file; tells whether an unmap really happened. */
static unsigned mappings_of(const char *name)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    unsigned count = 0;

    CHECK(maps != NULL);
    while (fgets(line, sizeof(line), maps) != NULL)
        count += strstr(line, name) != NULL;
    (void)fclose(maps);
    return count;
}

/* rule: H3 */
/* What cannot be a region is refused, with nothing left mapped. */
static void test_region_refused(void)
{
    int fd = file_of(2 * PAGE), other;
    struct viommu_region *region = NULL;

    CHECK_EQ(viommu_region_map(0, 0, 0, 0, fd, &region), -EINVAL);
    CHECK_EQ(viommu_region_map(UINT64_MAX - PAGE + 2, PAGE, 0, 0, fd, &region), -EINVAL);
    CHECK_EQ(viommu_region_map(0, PAGE, UINT64_MAX - PAGE + 2, 0, fd, &region), -EINVAL);
    CHECK_EQ(viommu_region_map(0, PAGE, 0, UINT64_MAX - 1, fd, &region), -EINVAL);
    CHECK_EQ(viommu_region_map(0, PAGE, 0, INT64_MAX, fd, &region), -EINVAL);
    CHECK_EQ(viommu_region_map(0, 1ull << 62, 0, 0, fd, &region), -ENXIO);
    CHECK_EQ(viommu_region_map(0, UINT64_MAX, 0, 0, fd, &region), -EINVAL);
    CHECK_EQ(viommu_region_map(0, 2 * PAGE + 1, 0, 0, fd, &region), -ENXIO); /* the file is one byte short */
    CHECK_EQ(viommu_region_map(0, PAGE, 0, PAGE + 1, fd, &region), -ENXIO);
    CHECK_EQ(viommu_region_map(0, PAGE, 0, 0, -1, &region), -EBADF);
    other = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK_EQ(viommu_region_map(0, PAGE, 0, 0, other, &region), -EBADF);
    (void)close(other);
    other = open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK_EQ(viommu_region_map(0, PAGE, 0, 0, other, &region), -EBADF);
    (void)close(other);
    CHECK(region == NULL);
    CHECK_EQ(mappings_of("memfd:memory"), 0);
    /* the last byte of both address spaces can be had */
    CHECK_EQ(viommu_region_map(UINT64_MAX - PAGE + 1, PAGE, UINT64_MAX - PAGE + 1, PAGE, fd, &region), 0);
    CHECK_EQ(mappings_of("memfd:memory"), 1);
    viommu_region_free(region);
    CHECK_EQ(mappings_of("memfd:memory"), 0);
    viommu_region_free(NULL);
    (void)close(fd);
}

/* An offset that is no multiple of a page is honoured to the byte. */
static void test_unaligned_offset(void)
{
    int fd = file_of(3 * PAGE);
    struct viommu_region *region = region_of(0x1000, PAGE, 0x5000, 5000, fd);
    struct guest_memory *memory = memory_of(&region, 1);
    uint8_t byte = 0x5a, back = 0;

    CHECK_EQ(guest_memory_write(memory, 0x1000 + 17, &byte, 1), 0);
    CHECK(pread(fd, &back, 1, 5017) == 1);
    CHECK_EQ(back, 0x5a);
    guest_memory_free(memory);
    CHECK_EQ(mappings_of("memfd:memory"), 0);
    (void)close(fd);
}

/* Regions that share a guest-physical byte are refused, in any order, and keep their references. */
static void test_overlap(void)
{
    int fd = file_of(4 * PAGE);
    struct viommu_region *regions[3] = {
        region_of(0x3000, PAGE, 0x3000, 0, fd),
        region_of(0x1000, 0x2001, 0x1000, PAGE, fd),
        region_of(0x8000, PAGE, 0x8000, 0, fd),
    };
    struct viommu_region *twice[2] = {regions[0], regions[0]};
    struct guest_memory *memory = NULL;

    CHECK_EQ(guest_memory_new(regions, 3, &memory), -EINVAL);
    CHECK_EQ(guest_memory_new(twice, 2, &memory), -EINVAL);
    CHECK(memory == NULL);
    for (int i = 0; i < 3; i++)
        viommu_region_free(regions[i]);
    CHECK_EQ(mappings_of("memfd:memory"), 0);
    (void)close(fd);
}

/*
 * 0x1000-0x1fff, 0x2000-0x3fff (adjacent, other file), a hole, 0x6000-0x6fff, and the last page of the address space.
 */
static struct guest_memory *landscape(int *first, int *second)
{
    struct viommu_region *regions[4];

    *first = file_of(4 * PAGE);
    *second = file_of(2 * PAGE);
    regions[0] = region_of(0x6000, PAGE, 0x106000, PAGE, *first);
    regions[1] = region_of(UINT64_MAX - PAGE + 1, PAGE, 0x200000, 2 * PAGE, *first);
    regions[2] = region_of(0x2000, 2 * PAGE, 0x102000, 0, *second);
    regions[3] = region_of(0x1000, PAGE, 0x101000, 0, *first);
    return memory_of(regions, 4);
}

/* rule: H7 */
/* Every byte counts: ranges across neighbours are covered, ranges with one byte in a hole or past the top are not. */
static void test_covers(void)
{
    int first, second;
    struct guest_memory *memory = landscape(&first, &second);

    CHECK(guest_memory_covers(memory, 0x1000, 1));
    CHECK(!guest_memory_covers(memory, 0xfff, 1));
    CHECK(!guest_memory_covers(memory, 0xfff, 2));
    CHECK(guest_memory_covers(memory, 0x1000, 3 * PAGE));
    CHECK(guest_memory_covers(memory, 0x1fff, 2));
    CHECK(!guest_memory_covers(memory, 0x1000, 3 * PAGE + 1));
    CHECK(guest_memory_covers(memory, 0x3fff, 1));
    CHECK(!guest_memory_covers(memory, 0x4000, 1));
    CHECK(!guest_memory_covers(memory, 0x3000, 0x4000));
    CHECK(guest_memory_covers(memory, UINT64_MAX, 1));
    CHECK(guest_memory_covers(memory, UINT64_MAX - PAGE + 1, PAGE));
    CHECK(!guest_memory_covers(memory, UINT64_MAX, 2));
    CHECK(!guest_memory_covers(memory, UINT64_MAX - PAGE + 1, PAGE + 1));
    CHECK(!guest_memory_covers(memory, 0x1000, UINT64_MAX));
    CHECK(!guest_memory_covers(memory, 0, UINT64_MAX));
    CHECK(guest_memory_covers(memory, 0x5000, 0)); /* no byte is always covered */
    CHECK(guest_memory_touches(memory, 0, UINT64_MAX));
    CHECK(guest_memory_touches(memory, 0x3fff, 0x5fff));
    CHECK(guest_memory_touches(memory, 0x4000, 0x6000));
    CHECK(!guest_memory_touches(memory, 0x4000, 0x5fff));
    CHECK(!guest_memory_touches(memory, 0, 0xfff));
    CHECK(guest_memory_touches(memory, 0, 0x1000));
    CHECK(guest_memory_touches(memory, UINT64_MAX, UINT64_MAX));
    CHECK(!guest_memory_touches(memory, 0x7000, UINT64_MAX - PAGE));
    guest_memory_free(memory);
    (void)close(first);
    (void)close(second);
}

/* Copies go across neighbours byte for byte, and a copy with a byte outside leaves everything untouched. */
static void test_copies(void)
{
    int first, second;
    struct guest_memory *memory = landscape(&first, &second);
    uint8_t out[3 * PAGE], in[3 * PAGE], file[2 * PAGE];

    for (size_t i = 0; i < sizeof(out); i++)
        out[i] = (uint8_t)(i * 7 + i / 256);
    CHECK_EQ(guest_memory_write(memory, 0x1000, out, sizeof(out)), 0);
    CHECK_EQ(guest_memory_read(memory, 0x1000, in, sizeof(in)), 0);
    CHECK(memcmp(in, out, sizeof(in)) == 0);
    CHECK(pread(first, file, PAGE, 0) == PAGE);
    CHECK(memcmp(file, out, PAGE) == 0);
    CHECK(pread(second, file, 2 * PAGE, 0) == 2 * PAGE);
    CHECK(memcmp(file, out + PAGE, 2 * PAGE) == 0);

    memset(in, 0xee, sizeof(in));
    CHECK_EQ(guest_memory_write(memory, 0x3ff0, in, 17), -EFAULT);
    CHECK_EQ(guest_memory_zero(memory, 0x3ff0, 17), -EFAULT);
    CHECK_EQ(guest_memory_read(memory, 0x3ff0, in, 17), -EFAULT);
    CHECK_EQ(in[0], 0xee);
    CHECK_EQ(guest_memory_read(memory, 0x3ff0, in, 16), 0);
    CHECK(memcmp(in, out + 0x2ff0, 16) == 0);

    CHECK_EQ(guest_memory_zero(memory, 0x1ffe, 4), 0);
    CHECK_EQ(guest_memory_read(memory, 0x1ffd, in, 6), 0);
    CHECK(in[0] == out[0xffd] && in[5] == out[0x1002] && in[1] == 0 && in[2] == 0 && in[3] == 0 && in[4] == 0);

    CHECK_EQ(guest_memory_write(memory, UINT64_MAX - 1, out, 2), 0);
    CHECK_EQ(guest_memory_read(memory, UINT64_MAX - 1, in, 2), 0);
    CHECK(in[0] == out[0] && in[1] == out[1]);
    CHECK_EQ(guest_memory_write(memory, UINT64_MAX - 1, out, 3), -EFAULT);
    CHECK_EQ(guest_memory_write(memory, 0x5000, out, 0), 0);
    guest_memory_free(memory);
    (void)close(first);
    (void)close(second);
}

/* rule: H4 */
/* A span lies in one region, by either kind of address; regions that only touch do not make one. */
static void test_span(void)
{
    int first, second;
    struct guest_memory *memory = landscape(&first, &second);
    const struct viommu_region *region = NULL;
    uint8_t *at = guest_memory_span(memory, 0x1000, PAGE, true, &region);

    CHECK(at != NULL && region != NULL && region->gpa == 0x1000 && at == region->host);
    CHECK(guest_memory_span(memory, 0x101000, PAGE, false, NULL) == at);
    CHECK(guest_memory_span(memory, 0x101fff, 1, false, NULL) == at + 0xfff);
    CHECK(guest_memory_span(memory, 0x1fff, 2, true, NULL) == NULL);
    CHECK(guest_memory_span(memory, 0x101fff, 2, false, NULL) == NULL);
    CHECK(guest_memory_span(memory, 0x1000, 0, true, NULL) == NULL);
    CHECK(guest_memory_span(memory, 0x1000, UINT64_MAX, true, NULL) == NULL);
    CHECK(guest_memory_span(memory, 0x4000, 1, true, NULL) == NULL);
    CHECK(guest_memory_span(memory, UINT64_MAX, 1, true, NULL) != NULL);
    CHECK(guest_memory_span(memory, UINT64_MAX, 2, true, NULL) == NULL);
    CHECK(guest_memory_span(memory, 0x200fff, 1, false, NULL) != NULL);
    guest_memory_free(memory);
    (void)close(first);
    (void)close(second);
}

/* Exactly the pages that were written are marked, and nothing past a log that is too short. */
static void test_dirty_log(void)
{
    int fd = file_of(64 * PAGE), log_fd = file_of(PAGE);
    struct viommu_region *region = region_of(0, 64 * PAGE, 0, 0, fd);
    struct guest_memory *memory = memory_of(&region, 1);
    struct dirty_log log;
    uint8_t bytes[2 * PAGE] = {1}, bits[16];

    CHECK_EQ(dirty_log_map(log_fd, 4, 8, &log), 0); /* 32 pages, eight bytes into the file */
    guest_memory_write(memory, 0, bytes, 1);
    CHECK(pread(log_fd, bits, 16, 0) == 16 && bits[8] == 0); /* no log set: nothing marked */
    memory->log = &log;
    CHECK_EQ(guest_memory_write(memory, PAGE - 1, bytes, 2), 0);           /* pages 0 and 1 */
    CHECK_EQ(guest_memory_zero(memory, 9 * PAGE, PAGE), 0);                /* 9 */
    CHECK_EQ(guest_memory_write(memory, 30 * PAGE, bytes, 2 * PAGE), 0);   /* 30 and 31 */
    CHECK_EQ(guest_memory_write(memory, 31 * PAGE, bytes, 2 * PAGE), 0);   /* 32 has no bit */
    CHECK_EQ(guest_memory_write(memory, 40 * PAGE, bytes, 1), 0);          /* nor has 40 */
    CHECK_EQ(guest_memory_read(memory, 20 * PAGE, bytes, 1), 0);           /* reading marks nothing */
    guest_memory_dirty(memory, 12 * PAGE, 0);
    guest_memory_dirty(memory, UINT64_MAX, UINT64_MAX);
    CHECK(pread(log_fd, bits, 16, 0) == 16);
    CHECK(memcmp(bits, "\0\0\0\0\0\0\0\0\x03\x02\x00\xc0\0\0\0\0", 16) == 0);
    dirty_log_unmap(&log);
    CHECK_EQ(dirty_log_map(log_fd, PAGE + 1, 0, &log), -ENXIO);
    CHECK_EQ(dirty_log_map(log_fd, 0, 0, &log), -EINVAL);
    guest_memory_free(memory);
    CHECK_EQ(mappings_of("memfd:memory"), 0);
    (void)close(fd);
    (void)close(log_fd);
}

/* rule: H3 */
/* The file shrinks under the mapping: accesses read zeroes, writes vanish, and the table says so. */
static void test_shrunk_file(void)
{
    int fd = file_of(8 * PAGE);
    struct viommu_region *region = region_of(0x10000, 8 * PAGE, 0, 0, fd);
    struct guest_memory *memory = memory_of(&region, 1);
    uint8_t bytes[4 * PAGE];

    memset(bytes, 0x77, sizeof(bytes));
    guest_memory_guard(memory);
    CHECK_EQ(guest_memory_write(memory, 0x10000, bytes, sizeof(bytes)), 0);
    CHECK(!atomic_load(&memory->shrunk));
    CHECK(ftruncate(fd, 2 * PAGE) == 0);
    CHECK_EQ(guest_memory_read(memory, 0x10000, bytes, sizeof(bytes)), 0);
    CHECK(atomic_load(&memory->shrunk));
    CHECK(bytes[0] == 0x77 && bytes[2 * PAGE - 1] == 0x77 && bytes[2 * PAGE] == 0 && bytes[4 * PAGE - 1] == 0);
    CHECK_EQ(guest_memory_write(memory, 0x10000 + 7 * PAGE, bytes, PAGE), 0);
    CHECK(ftruncate(fd, 0) == 0);
    CHECK_EQ(guest_memory_zero(memory, 0x10000, 8 * PAGE), 0);
    guest_memory_guard(NULL);
    guest_memory_free(memory);
    (void)close(fd);
}

/* rule: H3 */
/* The same for the dirty log's file. */
static void test_shrunk_log(void)
{
    int fd = file_of(PAGE), log_fd = file_of(PAGE);
    struct viommu_region *region = region_of(0, PAGE, 0, 0, fd);
    struct guest_memory *memory = memory_of(&region, 1);
    struct dirty_log log;
    uint8_t byte = 1;

    CHECK_EQ(dirty_log_map(log_fd, PAGE, 0, &log), 0);
    memory->log = &log;
    guest_memory_guard(memory);
    CHECK(ftruncate(log_fd, 0) == 0);
    CHECK_EQ(guest_memory_write(memory, 0, &byte, 1), 0);
    CHECK(atomic_load(&memory->shrunk));
    guest_memory_guard(NULL);
    guest_memory_free(memory);
    dirty_log_unmap(&log);
    (void)close(fd);
    (void)close(log_fd);
}

static void *touch_shrunk(void *arg)
{
    struct guest_memory *memory = arg;
    uint8_t byte = 1;

    guest_memory_guard(memory);
    for (unsigned i = 0; i < 64; i++) {
        CHECK_EQ(guest_memory_write(memory, i * PAGE, &byte, 1), 0);
        CHECK_EQ(guest_memory_read(memory, i * PAGE, &byte, 1), 0);
    }
    guest_memory_guard(NULL);
    return NULL;
}

/* Several threads, each with a table of its own over files that are gone. */
static void test_shrunk_in_threads(void)
{
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    struct guest_memory *memories[THREADS];

    for (int i = 0; i < THREADS; i++) {
        int fd = file_of(64 * PAGE);
        struct viommu_region *region = region_of(0, 64 * PAGE, 0, 0, fd);

        memories[i] = memory_of(&region, 1);
        CHECK(ftruncate(fd, 0) == 0);
        (void)close(fd);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, touch_shrunk, memories[i]) == 0);
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(atomic_load(&memories[i]->shrunk));
        guest_memory_free(memories[i]);
    }
}

/* A fault anywhere else kills the process as it always did: the guard hides nothing but guest memory. */
static void test_foreign_fault_kills(void)
{
    int status;
    pid_t child = fork();

    CHECK(child >= 0);
    if (child == 0) {
        int fd = file_of(PAGE);
        struct viommu_region *region = region_of(0, PAGE, 0, 0, fd);
        struct guest_memory *memory = memory_of(&region, 1);
        volatile uint8_t *other = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

        (void)!freopen("/dev/null", "w", stderr); /* a sanitizer has a lot to say about it */
        guest_memory_guard(memory);
        CHECK(ftruncate(fd, 0) == 0);
        other[0] = 1;
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(!WIFEXITED(status) || WEXITSTATUS(status) != 0);
}

/*
 * Huge pages: a region that ends inside one is unmapped whole, and a fault in the middle of one (here: none are left
 * in the pool) is survived.
 */
static void test_huge_pages(void)
{
    int fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
    struct viommu_region *region;
    struct guest_memory *memory;
    uint8_t bytes[16] = {1};
    struct stat st;
    uint64_t huge;

    if (fd < 0 || fstat(fd, &st) != 0 || ftruncate(fd, 2 * st.st_blksize) != 0) {
        printf("  no huge pages here\n");
        return;
    }
    huge = (uint64_t)st.st_blksize;
    region = region_of(0, 0xa0000, 0, 0, fd); /* as the first 640 KiB of a PC */
    CHECK_EQ(mappings_of("memfd:huge"), 1);
    viommu_region_free(region);
    CHECK_EQ(mappings_of("memfd:huge"), 0);
    region = region_of(0x100000, 2 * huge - 0x100000, 0, 0x100000, fd);
    memory = memory_of(&region, 1);
    guest_memory_guard(memory);
    CHECK(ftruncate(fd, 0) == 0);
    CHECK_EQ(guest_memory_write(memory, huge + 0x5010, bytes, sizeof(bytes)), 0);
    CHECK_EQ(guest_memory_write(memory, 0x105010, bytes, sizeof(bytes)), 0);
    CHECK(atomic_load(&memory->shrunk));
    guest_memory_guard(NULL);
    guest_memory_free(memory);
    CHECK_EQ(mappings_of("memfd:huge"), 0);
    (void)close(fd);
}

int main(void)
{
    RUN(test_region_refused);
    RUN(test_unaligned_offset);
    RUN(test_overlap);
    RUN(test_covers);
    RUN(test_copies);
    RUN(test_span);
    RUN(test_dirty_log);
    RUN(test_shrunk_file);
    RUN(test_shrunk_log);
    RUN(test_shrunk_in_threads);
    RUN(test_foreign_fault_kills);
    RUN(test_huge_pages);
    return 0;
}
