/*
 * MAP and UNMAP in the host's IOMMU: through iommu_map() and iommu_unmap() with the iommufd or the type1 back-end, beside
 * the ioctls alone for the same pages, in alternating rounds.
 *
 *   bench_stage2 iommufd DEVICE           DEVICE as /dev/vfio/devices/vfio0
 *   bench_stage2 type1 GROUP ADDRESS      GROUP as /dev/vfio/7, ADDRESS of a PCI function in it
 *
 * Prints one line for each case: "RESULT stage2 <back-end>.<case> bare_ns=N viommud_ns=N", the medians of the rounds,
 * for one MAP or one UNMAP.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "host_ioctl.h"
#include "iommu.h"
#include "iommufd_uapi.h"
#include "stage2_iommufd.h"
#include "stage2_type1.h"

#define MEMORY (64ull << 20)
#define GPA 0x40000000ull
#define IOVA 0x100000000ull
#define ENDPOINT 8u
#define ROUNDS 15u

struct work {
    const char *name;
    uint64_t size;   /* of a mapping */
    uint64_t stride; /* between IOVAs, and between addresses in memory */
    unsigned count;  /* mappings that exist at once */
    unsigned repeat;
};

static const struct work works[] = {
    {"4k", 4096, 8192, 1, 200},
    {"2m", 2u << 20, 2u << 20, 1, 40},
    {"scattered", 4096, 5 * 4096, 256, 2},
};

static struct {
    bool type1;
    int iommufd;
    int device;
    int container;
    uint32_t memory_ioas; /* guest memory, for the ioctls alone */
    uint32_t bare_ioas;
    struct iommu iommu;
    struct viommu_region *region;
} bench;

static _Noreturn void die(const char *what, int rc)
{
    fprintf(stderr, "bench_stage2: %s: %s\n", what, strerror(rc < 0 ? -rc : errno));
    exit(1);
}

static void must(const char *what, int rc)
{
    if (rc < 0)
        die(what, rc);
}

static uint64_t now_ns(void)
{
    struct timespec time;

    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t place(const struct work *work, unsigned index)
{
    return index * work->stride % (MEMORY - work->size + 1) / work->size * work->size;
}

/* ---------------------------------------------------------------------------------------------------- two ways to map */

static int bare_map(const struct work *work, unsigned index)
{
    uint64_t iova = IOVA + index * work->stride, at = place(work, index);

    if (bench.type1) {
        struct host_vfio_map request = {.argsz = sizeof(request),
                                        .flags = HOST_VFIO_MAP_READ | HOST_VFIO_MAP_WRITE,
                                        .vaddr = (uintptr_t)(bench.region->host + at),
                                        .iova = iova,
                                        .size = work->size};

        return host_ioctl(bench.container, HOST_VFIO_IOMMU_MAP, &request);
    }
    struct host_iommu_ioas_copy request = {.size = sizeof(request),
                                           .flags = HOST_IOMMU_FIXED_IOVA | HOST_IOMMU_READABLE | HOST_IOMMU_WRITEABLE,
                                           .to = bench.bare_ioas,
                                           .from = bench.memory_ioas,
                                           .length = work->size,
                                           .to_iova = iova,
                                           .from_iova = GPA + at};

    return host_ioctl(bench.iommufd, HOST_IOMMU_IOAS_COPY, &request);
}

static int bare_unmap(const struct work *work, unsigned index)
{
    uint64_t iova = IOVA + index * work->stride;

    if (bench.type1) {
        struct host_vfio_unmap request = {.argsz = sizeof(request), .iova = iova, .size = work->size};

        return host_ioctl(bench.container, HOST_VFIO_IOMMU_UNMAP, &request);
    }
    struct host_iommu_ioas_unmap request = {
        .size = sizeof(request), .ioas = bench.bare_ioas, .iova = iova, .length = work->size};

    return host_ioctl(bench.iommufd, HOST_IOMMU_IOAS_UNMAP, &request);
}

static int engine_map(const struct work *work, unsigned index)
{
    uint64_t iova = IOVA + index * work->stride;
    struct iova_mapping mapping = {iova, iova + work->size - 1, GPA + place(work, index), MAP_FLAG_READ | MAP_FLAG_WRITE};

    return iommu_map(&bench.iommu, 1, &mapping) == STATUS_OK ? 0 : -EIO;
}

static int engine_unmap(const struct work *work, unsigned index)
{
    uint64_t iova = IOVA + index * work->stride;

    return iommu_unmap(&bench.iommu, 1, iova, iova + work->size - 1) == STATUS_OK ? 0 : -EIO;
}

/* --------------------------------------------------------------------------------------------------------- measuring */

struct times {
    uint64_t map[ROUNDS];
    uint64_t unmap[ROUNDS];
};

typedef int (*step_fn)(const struct work *work, unsigned index);

static void run(const struct work *work, step_fn map, step_fn unmap, uint64_t *map_ns, uint64_t *unmap_ns)
{
    uint64_t mapping = 0, unmapping = 0;

    for (unsigned repeat = 0; repeat < work->repeat; repeat++) {
        uint64_t start = now_ns(), middle;

        for (unsigned i = 0; i < work->count; i++)
            must("map", map(work, i));
        middle = now_ns();
        for (unsigned i = 0; i < work->count; i++)
            must("unmap", unmap(work, i));
        mapping += middle - start;
        unmapping += now_ns() - middle;
    }
    *map_ns = mapping / (work->repeat * work->count);
    *unmap_ns = unmapping / (work->repeat * work->count);
}

static int by_value(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

    return left < right ? -1 : left > right;
}

static uint64_t median(uint64_t *values)
{
    qsort(values, ROUNDS, sizeof(values[0]), by_value);
    return values[ROUNDS / 2];
}

static void to_bare(void)
{
    struct host_vfio_attach request = {.argsz = sizeof(request), .page_table = bench.bare_ioas};

    if (!bench.type1)
        must("attach", host_ioctl(bench.device, HOST_VFIO_DEVICE_ATTACH, &request));
}

static void to_engine(void)
{
    if (iommu_attach(&bench.iommu, 1, ENDPOINT, false) != STATUS_OK)
        die("the engine's attach", -EIO);
}

static void from_engine(void)
{
    if (iommu_detach(&bench.iommu, 1, ENDPOINT) != STATUS_OK)
        die("the engine's detach", -EIO);
}

static void compare(const struct work *work)
{
    struct times bare, engine;
    const char *kind = bench.type1 ? "type1" : "iommufd";

    for (unsigned round = 0; round < ROUNDS; round++) {
        to_bare();
        run(work, bare_map, bare_unmap, &bare.map[round], &bare.unmap[round]);
        to_engine();
        run(work, engine_map, engine_unmap, &engine.map[round], &engine.unmap[round]);
        from_engine();
    }
    printf("RESULT stage2 %s.map_%s bare_ns=%llu viommud_ns=%llu\n", kind, work->name,
           (unsigned long long)median(bare.map), (unsigned long long)median(engine.map));
    printf("RESULT stage2 %s.unmap_%s bare_ns=%llu viommud_ns=%llu\n", kind, work->name,
           (unsigned long long)median(bare.unmap), (unsigned long long)median(engine.unmap));
}

/* ------------------------------------------------------------------------------------------------------------- set-up */

static void open_iommufd(const char *path)
{
    struct host_vfio_bind bind = {.argsz = sizeof(bind)};
    struct host_iommu_ioas_alloc memory = {.size = sizeof(memory)}, bare = {.size = sizeof(bare)};
    struct host_iommu_ioas_map_file map = {.size = sizeof(map),
                                           .flags = HOST_IOMMU_FIXED_IOVA | HOST_IOMMU_READABLE | HOST_IOMMU_WRITEABLE,
                                           .fd = bench.region->fd,
                                           .length = MEMORY,
                                           .iova = GPA};

    must("/dev/iommu", bench.iommufd = open("/dev/iommu", O_RDWR | O_CLOEXEC));
    must(path, bench.device = open(path, O_RDWR | O_CLOEXEC));
    bind.iommufd = bench.iommufd;
    must("bind", host_ioctl(bench.device, HOST_VFIO_DEVICE_BIND, &bind));
    must("alloc", host_ioctl(bench.iommufd, HOST_IOMMU_IOAS_ALLOC, &memory));
    must("alloc", host_ioctl(bench.iommufd, HOST_IOMMU_IOAS_ALLOC, &bare));
    bench.memory_ioas = map.ioas = memory.id;
    bench.bare_ioas = bare.id;
    must("map file", host_ioctl(bench.iommufd, HOST_IOMMU_IOAS_MAP_FILE, &map));
}

static void open_type1(const char *group_path, const char *address)
{
    int group;

    must("/dev/vfio/vfio", bench.container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC));
    must(group_path, group = open(group_path, O_RDWR | O_CLOEXEC));
    must("set container", ioctl(group, VFIO_GROUP_SET_CONTAINER, &bench.container));
    must("set iommu", ioctl(bench.container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
    must(address, bench.device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address));
}

int main(int argc, char **argv)
{
    const struct viommu_settings settings = {
        .features = VIRTIO_IOMMU_F_MAP_UNMAP | VIRTIO_IOMMU_F_BYPASS_CONFIG,
        .page_size_mask = ~0xfffull,
        .input_last = UINT64_MAX,
        .domain_last = UINT32_MAX,
        .max_endpoints = 16,
        .max_domains = 16,
        .max_mappings = 1u << 20,
        .max_domain_mappings = 1u << 20,
    };
    static struct viommu_stats stats;
    struct viommu_iommufd *iommufd;
    struct stage2_type1 *type1;
    struct guest_memory *memory;
    struct stage2 *stage2;
    int file = memfd_create("memory", MFD_CLOEXEC);

    if (argc < 3 || (strcmp(argv[1], "iommufd") != 0 && (argc < 4 || strcmp(argv[1], "type1") != 0))) {
        fputs("usage: bench_stage2 iommufd DEVICE | bench_stage2 type1 GROUP ADDRESS\n", stderr);
        return 2;
    }
    bench.type1 = strcmp(argv[1], "type1") == 0;
    must("memory", file);
    must("memory", ftruncate(file, (off_t)MEMORY));
    must("memory", viommu_region_map(GPA, MEMORY, GPA, 0, file, &bench.region));
    memset(bench.region->host, 1, MEMORY); /* every page is there */
    must("memory", guest_memory_new(&bench.region, 1, &memory));
    must("iommu", iommu_init(&bench.iommu, &settings, &stats));
    if (bench.type1) {
        open_type1(argv[2], argv[3]);
        must("type1", stage2_type1_new(bench.container, host_ioctl, &type1));
        stage2 = stage2_type1_stage2(type1);
    } else {
        open_iommufd(argv[2]);
        must("iommufd", stage2_iommufd_new(bench.iommufd, VIOMMU_IOMMUFD_FROM_FILES, host_ioctl, &iommufd));
        must("device", stage2_iommufd_add(iommufd, ENDPOINT, bench.device));
        stage2 = stage2_iommufd_stage2(iommufd);
    }
    must("endpoint", iommu_add_endpoints(&bench.iommu, ENDPOINT, ENDPOINT, NULL, 0, stage2));
    must("memory", iommu_set_memory(&bench.iommu, memory));
    for (size_t i = 0; i < sizeof(works) / sizeof(works[0]); i++)
        compare(&works[i]);
    return 0;
}
