#include "guest_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "viommu.h"

int shared_map_open(int fd, uint64_t size, uint64_t offset, struct shared_map *out, uint8_t **at)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t start, end;
    struct stat st;
    void *map;

    if (size == 0 || __builtin_add_overflow(offset, size, &end) || end > INT64_MAX)
        return -EINVAL;
    if (fstat(fd, &st) != 0)
        return -errno;
    if (!S_ISREG(st.st_mode)) /* memfd, hugetlbfs and shm files are all regular */
        return -EBADF;
    if ((uint64_t)st.st_size < end)
        return -ENXIO;
    /* hugetlbfs maps and unmaps whole pages of its own only; that size is the file's block size there. */
    if ((uint64_t)st.st_blksize > page && (st.st_blksize & (st.st_blksize - 1)) == 0)
        page = (uint64_t)st.st_blksize;
    start = offset & ~(page - 1);
    end = (end + (page - 1)) & ~(page - 1);
    if (end - start > SIZE_MAX / 2)
        return -EINVAL;
    map = mmap(NULL, end - start, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)start);
    if (map == MAP_FAILED)
        return -errno;
    (void)madvise(map, end - start, MADV_DONTDUMP); /* a guest's memory has no place in our core dump */
    *out = (struct shared_map){map, end - start, page};
    *at = (uint8_t *)map + (offset - start);
    return 0;
}

void shared_map_close(struct shared_map *map)
{
    if (map->start != NULL)
        (void)munmap(map->start, map->size);
    *map = (struct shared_map){0};
}

int viommu_region_map(uint64_t gpa, uint64_t size, uint64_t user_addr, uint64_t offset, int fd,
                      struct viommu_region **out)
{
    struct viommu_region *region;
    uint64_t last, user_last;
    int rc;

    if (size == 0 || __builtin_add_overflow(gpa, size - 1, &last) ||
        __builtin_add_overflow(user_addr, size - 1, &user_last))
        return -EINVAL;
    region = calloc(1, sizeof(*region));
    if (region == NULL)
        return -ENOMEM;
    rc = shared_map_open(fd, size, offset, &region->map, &region->host);
    if (rc != 0)
        goto fail;
    region->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (region->fd < 0) {
        rc = -errno;
        shared_map_close(&region->map);
        goto fail;
    }
    region->gpa = gpa;
    region->last = last;
    region->user_addr = user_addr;
    region->fd_offset = offset;
    region->refs = 1;
    *out = region;
    return 0;
fail:
    free(region);
    return rc;
}

void viommu_region_free(struct viommu_region *region)
{
    if (region == NULL || --region->refs != 0)
        return;
    shared_map_close(&region->map);
    (void)close(region->fd);
    free(region);
}

static int by_gpa(const void *a, const void *b)
{
    const struct viommu_region *x = *(struct viommu_region *const *)a;
    const struct viommu_region *y = *(struct viommu_region *const *)b;

    return x->gpa < y->gpa ? -1 : x->gpa > y->gpa;
}

int guest_memory_new(struct viommu_region *const *regions, size_t count, struct guest_memory **out)
{
    struct guest_memory *memory = calloc(1, sizeof(*memory) + count * sizeof(memory->regions[0]));

    if (memory == NULL)
        return -ENOMEM;
    if (count != 0) {
        memcpy(memory->regions, regions, count * sizeof(memory->regions[0]));
        qsort(memory->regions, count, sizeof(memory->regions[0]), by_gpa);
    }
    for (size_t i = 1; i < count; i++) {
        if (memory->regions[i]->gpa <= memory->regions[i - 1]->last) {
            free(memory);
            return -EINVAL;
        }
    }
    memory->count = count;
    for (size_t i = 0; i < count; i++)
        memory->regions[i]->refs++;
    *out = memory;
    return 0;
}

void guest_memory_free(struct guest_memory *memory)
{
    if (memory == NULL)
        return;
    for (size_t i = 0; i < memory->count; i++)
        viommu_region_free(memory->regions[i]);
    free(memory);
}

/* Index of the first region whose last byte is at or after gpa; count when there is none. */
static size_t region_from(const struct guest_memory *memory, uint64_t gpa)
{
    size_t low = 0, high = memory->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (memory->regions[middle]->last < gpa)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool guest_memory_covers(const struct guest_memory *memory, uint64_t gpa, uint64_t length)
{
    uint64_t last;

    if (length == 0)
        return true;
    if (__builtin_add_overflow(gpa, length - 1, &last))
        return false;
    for (size_t i = region_from(memory, gpa); i < memory->count; i++) {
        const struct viommu_region *region = memory->regions[i];

        if (region->gpa > gpa)
            return false;
        if (region->last >= last)
            return true;
        gpa = region->last + 1; /* not past the top: last is beyond this region */
    }
    return false;
}

bool guest_memory_touches(const struct guest_memory *memory, uint64_t first, uint64_t last)
{
    size_t i = region_from(memory, first);

    return i < memory->count && memory->regions[i]->gpa <= last;
}

enum copy { COPY_OUT, COPY_IN, COPY_ZERO };

/* The range is covered. Work through it, region by region. */
static void copy_covered(const struct guest_memory *memory, uint64_t gpa, uint8_t *buffer, size_t length, enum copy how)
{
    for (size_t i = region_from(memory, gpa); length != 0; i++) {
        const struct viommu_region *region = memory->regions[i];
        uint64_t room = region->last - gpa; /* inclusive, so that a region up to 2^64 - 1 counts */
        size_t part = room < length - 1 ? (size_t)room + 1 : length;
        uint8_t *host = region->host + (gpa - region->gpa);

        if (how == COPY_OUT)
            memcpy(buffer, host, part);
        else if (how == COPY_IN)
            memcpy(host, buffer, part);
        else
            memset(host, 0, part);
        if (buffer != NULL)
            buffer += part;
        gpa += part;
        length -= part;
    }
}

int guest_memory_read(const struct guest_memory *memory, uint64_t gpa, void *buffer, size_t length)
{
    if (!guest_memory_covers(memory, gpa, length))
        return -EFAULT;
    copy_covered(memory, gpa, buffer, length, COPY_OUT);
    return 0;
}

int guest_memory_write(const struct guest_memory *memory, uint64_t gpa, const void *buffer, size_t length)
{
    if (!guest_memory_covers(memory, gpa, length))
        return -EFAULT;
    copy_covered(memory, gpa, (uint8_t *)(uintptr_t)buffer, length, COPY_IN);
    guest_memory_dirty(memory, gpa, length);
    return 0;
}

int guest_memory_zero(const struct guest_memory *memory, uint64_t gpa, size_t length)
{
    if (!guest_memory_covers(memory, gpa, length))
        return -EFAULT;
    copy_covered(memory, gpa, NULL, length, COPY_ZERO);
    guest_memory_dirty(memory, gpa, length);
    return 0;
}

void *guest_memory_span(const struct guest_memory *memory, uint64_t addr, uint64_t length, bool gpa,
                        const struct viommu_region **out)
{
    uint64_t last;

    if (length == 0 || __builtin_add_overflow(addr, length - 1, &last))
        return NULL;
    /* By guest address it is a search; by user address, only when a ring starts, a linear look is enough. */
    for (size_t i = gpa ? region_from(memory, addr) : 0; i < memory->count; i++) {
        const struct viommu_region *region = memory->regions[i];
        uint64_t first = gpa ? region->gpa : region->user_addr;
        uint64_t end = first + (region->last - region->gpa);

        if (addr >= first && last <= end) {
            if (out != NULL)
                *out = region;
            return region->host + (addr - first);
        }
        if (gpa)
            break;
    }
    return NULL;
}

void guest_memory_dirty(const struct guest_memory *memory, uint64_t gpa, uint64_t length)
{
    const struct dirty_log *log = memory->log;

    if (log == NULL || length == 0)
        return;
    for (uint64_t page = gpa >> GUEST_PAGE_SHIFT; page <= (gpa + (length - 1)) >> GUEST_PAGE_SHIFT; page++) {
        if (page >= log->pages) /* the front-end made the log too small: nothing to mark */
            return;
        atomic_fetch_or_explicit(&log->bitmap[page / 8], (uint8_t)(1u << (page % 8)), memory_order_relaxed);
    }
}

int dirty_log_map(int fd, uint64_t size, uint64_t offset, struct dirty_log *out)
{
    uint8_t *at = NULL;
    int rc = shared_map_open(fd, size, offset, &out->map, &at);

    if (rc != 0)
        return rc;
    out->bitmap = (_Atomic uint8_t *)at;
    out->pages = size > UINT64_MAX / 8 ? UINT64_MAX : size * 8;
    return 0;
}

void dirty_log_unmap(struct dirty_log *log)
{
    shared_map_close(&log->map);
    memset(log, 0, sizeof(*log));
}

/*
 * The guard. A signal handler is process-wide, what it acts on is not: the table is the faulting thread's own, so
 * two engines in one process do not see each other.
 */
static _Thread_local struct guest_memory *volatile guarded;
static struct sigaction previous;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static bool replace_page(uintptr_t address, const struct shared_map *map)
{
    uintptr_t start = (uintptr_t)map->start, end = start + map->size;

    if (address < start || address >= end)
        return false;
    /* From the fault to the end: one system call for a file cut short. Pages of hugetlbfs cannot be split. */
    start += (address - start) & ~(uintptr_t)(map->page - 1);
    return mmap((void *)start, end - start, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

/* Whether the address is in something the front-end can shrink: then it is readable now. */
static bool replace(const struct guest_memory *memory, uintptr_t address)
{
    for (size_t i = 0; i < memory->count; i++) {
        if (replace_page(address, &memory->regions[i]->map))
            return true;
    }
    return (memory->log != NULL && replace_page(address, &memory->log->map)) ||
           (memory->inflight != NULL && replace_page(address, memory->inflight));
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    struct guest_memory *memory = guarded;

    if (memory != NULL && info->si_code > 0 && replace(memory, (uintptr_t)info->si_addr)) {
        atomic_store_explicit(&memory->shrunk, true, memory_order_relaxed);
        return;
    }
    if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != NULL) {
        previous.sa_sigaction(number, info, context);
    } else {
        /* Default: take the handler away and let the access fault again, so that the cause is in the core dump. */
        (void)sigaction(SIGBUS, &previous, NULL);
    }
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};

    (void)sigemptyset(&action.sa_mask);
    (void)sigaction(SIGBUS, &action, &previous);
}

void guest_memory_guard(struct guest_memory *memory)
{
    (void)pthread_once(&installed, install);
    guarded = memory;
}
