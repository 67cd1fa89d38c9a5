/*
 * Runs in a guest: drives QEMU's educational device ("edu") through VFIO and shows exactly what its DMA did.
 *
 *   edu_dma [PCI-ADDRESS ...]     (default 0000:00:02.0; bound to vfio-pci)
 *
 * All devices are in one container, so in one domain. For each of them: a mapping that may be written arrives; one that
 * may only be read stays as it was; so does what is not mapped any more, and after VFIO has let go of the device.
 * Prints "RESULT edu name=value ..." for each check: 1 good, 0 bad. Exit status: 0; 1 when a check failed; 2 when a
 * device cannot be had.
 *
 * The device: docs/specs/edu.rst of QEMU. Its DMA is not answered: a refused one only leaves no trace.
 */
#include "guest.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/vfio.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_DEVICES 4u
#define EDU_BUFFER 0x40000u
#define EDU_ID 0x010000edu
#define PATIENCE_US 60e6 /* only a device that is stuck meets it */

#define SOURCE_IOVA 0x1000000u /* may be read */
#define TARGET_IOVA 0x2000000u /* may be written too; then 1 MiB for each further device */
#define NOWHERE_IOVA 0x7000000u

enum { DMA_SOURCE = 0x80, DMA_DESTINATION = 0x88, DMA_COUNT = 0x90, DMA_COMMAND = 0x98 };
enum { START = 1, TO_MEMORY = 2 };

struct edu {
    const char *address;
    int group;
    int fd;
    uint64_t registers; /* offset in the file of the device */
    volatile uint8_t *bar; /* through sysfs, after VFIO */
};

static size_t page;
static uint8_t *memory; /* page 0: read-only for devices; page n + 1: device n's target */
static int failures;

static void report(const char *name, unsigned device, bool good)
{
    printf("RESULT edu %s%u=%d\n", name, device, good);
    failures += !good;
}

static uint64_t get(const struct edu *edu, uint64_t at, size_t size)
{
    uint64_t value = 0;

    if (edu->bar != NULL)
        return size == 8 ? *(volatile uint64_t *)(edu->bar + at) : *(volatile uint32_t *)(edu->bar + at);
    if (pread(edu->fd, &value, size, (off_t)(edu->registers + at)) != (ssize_t)size)
        die(errno, "%s: reading a register", edu->address);
    return value;
}

static void put(const struct edu *edu, uint64_t at, uint64_t value)
{
    if (edu->bar != NULL)
        *(volatile uint64_t *)(edu->bar + at) = value;
    else if (pwrite(edu->fd, &value, 8, (off_t)(edu->registers + at)) != 8)
        die(errno, "%s: writing a register", edu->address);
}

static void transfer(const struct edu *edu, uint64_t source, uint64_t destination, uint64_t count, unsigned command)
{
    double deadline = now_us() + PATIENCE_US;

    put(edu, DMA_SOURCE, source);
    put(edu, DMA_DESTINATION, destination);
    put(edu, DMA_COUNT, count);
    put(edu, DMA_COMMAND, START | command);
    while ((get(edu, DMA_COMMAND, 8) & START) != 0) {
        if (now_us() > deadline)
            die(0, "%s: a transfer does not end", edu->address);
        usleep(1000);
    }
}

static void open_edu(int container, struct edu *edu)
{
    struct vfio_region_info info = {.argsz = sizeof(info)};
    char path[PATH_MAX], link[PATH_MAX];
    uint16_t command;
    ssize_t length;

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/iommu_group", edu->address);
    length = readlink(path, link, sizeof(link) - 1);
    if (length < 0)
        die(errno, "%s", path);
    link[length] = '\0';
    snprintf(path, sizeof(path), "/dev/vfio/%.20s", strrchr(link, '/') + 1);
    edu->group = open(path, O_RDWR);
    if (edu->group < 0 || ioctl(edu->group, VFIO_GROUP_SET_CONTAINER, &container) < 0)
        die(errno, "%s", path);
    (void)ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU); /* after the first; later it is set already */
    edu->fd = ioctl(edu->group, VFIO_GROUP_GET_DEVICE_FD, edu->address);
    if (edu->fd < 0)
        die(errno, "%s: VFIO_GROUP_GET_DEVICE_FD", edu->address);
    info.index = VFIO_PCI_CONFIG_REGION_INDEX;
    if (ioctl(edu->fd, VFIO_DEVICE_GET_REGION_INFO, &info) < 0 ||
        pread(edu->fd, &command, 2, (off_t)info.offset + 4) != 2)
        die(errno, "%s: configuration space", edu->address);
    command |= 6; /* memory space, bus master */
    if (pwrite(edu->fd, &command, 2, (off_t)info.offset + 4) != 2)
        die(errno, "%s: configuration space", edu->address);
    info.index = VFIO_PCI_BAR0_REGION_INDEX;
    if (ioctl(edu->fd, VFIO_DEVICE_GET_REGION_INFO, &info) < 0)
        die(errno, "%s: BAR 0", edu->address);
    edu->registers = info.offset;
    if (get(edu, 0, 4) != EDU_ID)
        die(0, "%s: not an edu: %" PRIx64, edu->address, get(edu, 0, 4));
}

static void map(int container, uint64_t iova, unsigned at, uint32_t flags)
{
    struct vfio_iommu_type1_dma_map request = {
        .argsz = sizeof(request), .flags = flags, .vaddr = (uintptr_t)(memory + at * page), .iova = iova, .size = page};

    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &request) < 0)
        die(errno, "VFIO_IOMMU_MAP_DMA");
}

static void unmap(int container, uint64_t iova)
{
    struct vfio_iommu_type1_dma_unmap request = {.argsz = sizeof(request), .iova = iova, .size = page};

    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &request) < 0)
        die(errno, "VFIO_IOMMU_UNMAP_DMA");
}

static uint64_t target_of(unsigned device)
{
    return TARGET_IOVA + (uint64_t)device * 0x100000u;
}

/* Text into the device's buffer, by the page that it may read. */
static void load(const struct edu *edu, const char *text)
{
    memset(memory, 0, 64);
    strcpy((char *)memory, text);
    transfer(edu, SOURCE_IOVA, EDU_BUFFER, 64, 0);
}

static void check_mapped(const struct edu *edu, unsigned device)
{
    char *target = (char *)memory + (device + 1) * page;

    load(edu, "arrives where it is mapped");
    strcpy(target, "untouched");
    transfer(edu, EDU_BUFFER, target_of(device), 64, TO_MEMORY);
    report("mapped", device, strcmp(target, "arrives where it is mapped") == 0);

    strcpy((char *)memory, "may only be read");
    transfer(edu, EDU_BUFFER, SOURCE_IOVA, 64, TO_MEMORY);
    report("read_only", device, strcmp((char *)memory, "may only be read") == 0);

    /* What cannot be read cannot be written on: the device's buffer keeps what it had, or has nothing of ours. */
    strcpy((char *)memory, "secret");
    transfer(edu, NOWHERE_IOVA, EDU_BUFFER, 64, 0);
    strcpy(target, "untouched");
    transfer(edu, EDU_BUFFER, target_of(device), 64, TO_MEMORY);
    report("never_mapped", device, strcmp(target, "secret") != 0);
}

static void check_unmapped(int container, const struct edu *edu, unsigned device)
{
    char *target = (char *)memory + (device + 1) * page;

    load(edu, "must not arrive");
    strcpy(target, "untouched");
    unmap(container, target_of(device));
    transfer(edu, EDU_BUFFER, target_of(device), 64, TO_MEMORY);
    report("unmapped", device, strcmp(target, "untouched") == 0);
    map(container, target_of(device), device + 1, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    transfer(edu, EDU_BUFFER, target_of(device), 64, TO_MEMORY);
    report("mapped_again", device, strcmp(target, "must not arrive") == 0);
}

static void write_sysfs(const char *address, const char *name, const char *text)
{
    char path[PATH_MAX];
    int file;

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/%s", address, name);
    file = open(path, O_WRONLY);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        die(errno, "%s", path);
    close(file);
}

/* VFIO lets go of the device, and its domain ends; the device is driven on through sysfs. */
static void check_detached(int container, struct edu *edu, unsigned device)
{
    char *target = (char *)memory + (device + 1) * page;
    char path[PATH_MAX];
    uint16_t command = 6;
    int file;

    strcpy(target, "untouched");
    close(edu->fd);
    if (ioctl(edu->group, VFIO_GROUP_UNSET_CONTAINER) < 0)
        die(errno, "VFIO_GROUP_UNSET_CONTAINER");
    close(edu->group);
    (void)container;
    write_sysfs(edu->address, "driver/unbind", edu->address);
    write_sysfs(edu->address, "enable", "1");
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", edu->address);
    file = open(path, O_RDWR);
    if (file < 0 || pwrite(file, &command, 2, 4) != 2)
        die(errno, "%s", path);
    close(file);
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource0", edu->address);
    file = open(path, O_RDWR);
    edu->bar = file < 0 ? MAP_FAILED : mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (edu->bar == MAP_FAILED)
        die(errno, "%s", path);
    close(file);
    transfer(edu, EDU_BUFFER, target_of(device), 64, TO_MEMORY);
    report("detached", device, get(edu, 0, 4) == EDU_ID && strcmp(target, "untouched") == 0);
}

int main(int argc, char **argv)
{
    struct edu devices[MAX_DEVICES] = {{.address = "0000:00:02.0"}};
    unsigned count = argc > 1 ? (unsigned)argc - 1 : 1;
    int container = open("/dev/vfio/vfio", O_RDWR);

    if (count > MAX_DEVICES)
        die(0, "at most %u devices", MAX_DEVICES);
    for (unsigned i = 0; argc > 1 && i < count; i++)
        devices[i].address = argv[i + 1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (container < 0)
        die(errno, "/dev/vfio/vfio");
    page = (size_t)sysconf(_SC_PAGESIZE);
    memory = mmap(NULL, (MAX_DEVICES + 1) * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1,
                  0);
    if (memory == MAP_FAILED)
        die(errno, "memory");
    for (unsigned i = 0; i < count; i++)
        open_edu(container, &devices[i]);
    map(container, SOURCE_IOVA, 0, VFIO_DMA_MAP_FLAG_READ);
    for (unsigned i = 0; i < count; i++)
        map(container, target_of(i), i + 1, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    for (unsigned i = 0; i < count; i++)
        check_mapped(&devices[i], i);
    for (unsigned i = 0; i < count; i++)
        check_unmapped(container, &devices[i], i);
    for (unsigned i = 0; i < count; i++)
        check_detached(container, &devices[i], i);
    return failures == 0 ? 0 : 1;
}
