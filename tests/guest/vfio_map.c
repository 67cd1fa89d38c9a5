/*
 * Maps and unmaps memory for PCI functions through VFIO type 1, as a user of passed-through devices does, and says how
 * long a call takes.
 *
 *   vfio_map [-n PAGES] [-r ROUNDS] [-k] ADDRESS...
 *
 * Every round maps PAGES single pages at IOVAs two pages apart, one call each, and then unmaps them likewise.  All
 * functions share one container, and so one address space.  -k: leave the last round's pages mapped and wait for a
 * line on standard input before the end.  One line a round:
 *
 *   RESULT vfio_map round=0 pages=2000 map_us=56.1 unmap_us=40.2
 */
#include "guest.h"

#include <fcntl.h>
#include <libgen.h>
#include <linux/vfio.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define FIRST_IOVA UINT64_C(0x100000000)

/* The VFIO group of a function, opened; it belongs to the caller. */
static int open_group(const char *address)
{
    char link[128], target[256], path[64];

    snprintf(link, sizeof(link), "/sys/bus/pci/devices/%s/iommu_group", address);
    ssize_t length = readlink(link, target, sizeof(target) - 1);
    if (length < 0)
        die(errno, "%s: no IOMMU group", address);
    target[length] = '\0';
    snprintf(path, sizeof(path), "/dev/vfio/%.32s", basename(target));
    int group = open(path, O_RDWR);
    if (group < 0)
        die(errno, "%s", path);
    return group;
}

static int open_container(int count, char **addresses)
{
    int container = open("/dev/vfio/vfio", O_RDWR);
    if (container < 0)
        die(errno, "/dev/vfio/vfio");
    for (int i = 0; i < count; i++) {
        int group = open_group(addresses[i]);
        if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) != 0)
            die(errno, "VFIO_GROUP_SET_CONTAINER of %s", addresses[i]);
        if (i == 0 && ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) != 0)
            die(errno, "VFIO_SET_IOMMU");
    }
    return container;
}

static void map_all(int container, char *memory, uint64_t pages, uint64_t page)
{
    for (uint64_t i = 0; i < pages; i++) {
        struct vfio_iommu_type1_dma_map map = {
            .argsz = sizeof(map),
            .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            .vaddr = (uintptr_t)(memory + i * page),
            .iova = FIRST_IOVA + 2 * i * page,
            .size = page,
        };
        if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map) != 0)
            die(errno, "VFIO_IOMMU_MAP_DMA of page %llu", (unsigned long long)i);
    }
}

static void unmap_all(int container, uint64_t pages, uint64_t page)
{
    for (uint64_t i = 0; i < pages; i++) {
        struct vfio_iommu_type1_dma_unmap unmap = {
            .argsz = sizeof(unmap),
            .iova = FIRST_IOVA + 2 * i * page,
            .size = page,
        };
        if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) != 0)
            die(errno, "VFIO_IOMMU_UNMAP_DMA of page %llu", (unsigned long long)i);
        if (unmap.size != page)
            die(0, "page %llu: %llu bytes unmapped", (unsigned long long)i, (unsigned long long)unmap.size);
    }
}

int main(int argc, char **argv)
{
    uint64_t pages = 2000, rounds = 3, page = (uint64_t)sysconf(_SC_PAGESIZE);
    bool keep = false;
    int option;

    while ((option = getopt(argc, argv, "n:r:k")) != -1) {
        if (option == 'n')
            pages = number("pages", optarg, 1 << 20);
        else if (option == 'r')
            rounds = number("rounds", optarg, 1000);
        else if (option == 'k')
            keep = true;
        else
            return 2;
    }
    if (optind == argc)
        die(0, "usage: vfio_map [-n PAGES] [-r ROUNDS] [-k] ADDRESS...");

    int container = open_container(argc - optind, argv + optind);
    char *memory =
        mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_SHARED | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die(errno, "%llu pages of memory", (unsigned long long)pages);

    for (uint64_t round = 0; round < rounds; round++) {
        double start = now_us();
        map_all(container, memory, pages, page);
        double mapped = now_us();
        unmap_all(container, pages, page);
        double unmapped = now_us();
        printf("RESULT vfio_map round=%llu pages=%llu map_us=%.2f unmap_us=%.2f\n", (unsigned long long)round,
               (unsigned long long)pages, (mapped - start) / (double)pages, (unmapped - mapped) / (double)pages);
        fflush(stdout);
    }
    if (keep) {
        map_all(container, memory, pages, page);
        printf("RESULT vfio_map mapped=%llu\n", (unsigned long long)pages);
        fflush(stdout);
        while (getchar() != '\n' && !feof(stdin))
            ;
        unmap_all(container, pages, page);
    }
    return 0;
}
