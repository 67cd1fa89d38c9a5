/*
 * Runs in a guest: drives the DMA engine (tests/devices/dma_engine.c) through VFIO and shows exactly what its accesses
 * did, mapping by mapping.
 *
 *   dma_check [PCI-ADDRESS]     (default 0000:00:02.0)
 *
 * Binds the function to vfio-pci. One line for each check, "RESULT name ok" or "RESULT name FAILED ..."; and
 * "RESULT refused IOVA" for each access that must end as a fault, so that a test can look for them in the kernel's log.
 * Exit status: 0; 1 when a check failed; 2 when the device cannot be had.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGES 8u
#define BUFFER 0x40000u
#define READ_ONLY 0x10000000ull /* IOVAs */
#define READ_WRITE 0x20000000ull
#define NOWHERE 0x30000000ull
#define ENGINE_ID 0x010000edu
#define PATIENCE 30 /* seconds; only an engine that is stuck meets it */

enum { SOURCE = 0x80, DESTINATION = 0x88, COUNT = 0x90, COMMAND = 0x98, RESULT = 0xa0, DONE = 0xa8, ACK = 0x64 };
enum { START = 1, TO_MEMORY = 2, INTERRUPT = 4 };

static const char *address = "0000:00:02.0";
static int container = -1, group = -1, device = -1;
static uint64_t bar_offset;
static volatile uint8_t *bar; /* after VFIO: the BAR through sysfs */
static size_t page;
static uint8_t *memory;
static int failures;

_Noreturn static void give_up(const char *what)
{
    printf("RESULT setup FAILED %s: %s\n", what, strerror(errno));
    exit(2);
}

__attribute__((format(printf, 3, 4))) static void report(const char *name, bool good, const char *format, ...)
{
    va_list arguments;

    printf("RESULT %s %s", name, good ? "ok" : "FAILED ");
    va_start(arguments, format);
    if (!good)
        vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    failures += good ? 0 : 1;
}

/* ---- the engine --------------------------------------------------------------------------------------------------- */

static uint64_t get(uint64_t at, size_t size)
{
    uint64_t value = 0;

    if (bar != NULL)
        return size == 8 ? *(volatile uint64_t *)(bar + at) : *(volatile uint32_t *)(bar + at);
    if (pread(device, &value, size, (off_t)(bar_offset + at)) != (ssize_t)size)
        give_up("reading a register");
    return value;
}

static void put(uint64_t at, uint64_t value, size_t size)
{
    if (bar != NULL && size == 8)
        *(volatile uint64_t *)(bar + at) = value;
    else if (bar != NULL)
        *(volatile uint32_t *)(bar + at) = (uint32_t)value;
    else if (pwrite(device, &value, size, (off_t)(bar_offset + at)) != (ssize_t)size)
        give_up("writing a register");
}

/* Runs one transfer: what the engine says of it, 0 or an errno. */
static uint64_t transfer(uint64_t source, uint64_t destination, uint64_t count, uint32_t command)
{
    uint64_t done = get(DONE, 8);
    time_t deadline = time(NULL) + PATIENCE;

    put(SOURCE, source, 8);
    put(DESTINATION, destination, 8);
    put(COUNT, count, 8);
    put(COMMAND, START | command, 4);
    while (get(DONE, 8) == done)
        if (time(NULL) > deadline) {
            errno = ETIMEDOUT;
            give_up("a transfer");
        }
    return get(RESULT, 8);
}

/* ---- VFIO ------------------------------------------------------------------------------------------------------------ */

static int write_sysfs(const char *path, const char *text)
{
    int file = open(path, O_WRONLY);
    ssize_t done = file < 0 ? -1 : write(file, text, strlen(text));

    if (file >= 0)
        close(file);
    return done < 0 ? -1 : 0;
}

static const char *in_sysfs(const char *name)
{
    static char path[PATH_MAX];

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/%s", address, name);
    return path;
}

static void open_vfio(void)
{
    char link[PATH_MAX], path[PATH_MAX + 16];
    struct vfio_region_info info = {.argsz = sizeof(info)};
    uint16_t command;
    ssize_t length;

    if (write_sysfs(in_sysfs("driver_override"), "vfio-pci") < 0)
        give_up(in_sysfs("driver_override"));
    write_sysfs(in_sysfs("driver/unbind"), address); /* it may have none */
    if (write_sysfs("/sys/bus/pci/drivers_probe", address) < 0)
        give_up("binding to vfio-pci");
    length = readlink(in_sysfs("iommu_group"), link, sizeof(link) - 1);
    if (length < 0)
        give_up(in_sysfs("iommu_group"));
    link[length] = '\0';
    snprintf(path, sizeof(path), "/dev/vfio/%s", strrchr(link, '/') + 1);
    container = open("/dev/vfio/vfio", O_RDWR);
    group = open(path, O_RDWR);
    if (container < 0 || group < 0)
        give_up(path);
    if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
        ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        give_up("VFIO_SET_IOMMU");
    device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address);
    if (device < 0)
        give_up("VFIO_GROUP_GET_DEVICE_FD");
    info.index = VFIO_PCI_CONFIG_REGION_INDEX;
    if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) < 0 || pread(device, &command, 2, (off_t)info.offset + 4) != 2)
        give_up("the configuration space");
    command |= 6; /* memory space, bus master */
    if (pwrite(device, &command, 2, (off_t)info.offset + 4) != 2)
        give_up("the configuration space");
    info.index = VFIO_PCI_BAR0_REGION_INDEX;
    if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) < 0)
        give_up("BAR 0");
    bar_offset = info.offset;
}

static void map(uint64_t iova, unsigned first_page, unsigned pages, uint32_t flags)
{
    struct vfio_iommu_type1_dma_map request = {.argsz = sizeof(request),
                                               .flags = flags,
                                               .vaddr = (uintptr_t)(memory + first_page * page),
                                               .iova = iova,
                                               .size = pages * page};

    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &request) < 0)
        give_up("VFIO_IOMMU_MAP_DMA");
}

static void unmap(uint64_t iova, unsigned pages)
{
    struct vfio_iommu_type1_dma_unmap request = {.argsz = sizeof(request), .iova = iova, .size = pages * page};

    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &request) < 0)
        give_up("VFIO_IOMMU_UNMAP_DMA");
}

/* ---- the checks -------------------------------------------------------------------------------------------------------- */

/* Put text into the engine's buffer at an offset, by way of the page that is mapped to be read. */
static void load(const char *text, unsigned at)
{
    strcpy((char *)memory, text);
    transfer(READ_ONLY, BUFFER + at, strlen(text) + 1, 0);
}

/* A write of the engine to iova that must not happen. where is the memory that it would have changed, if there is any. */
static void must_not_write(const char *name, uint64_t iova, const uint8_t *where)
{
    uint8_t before[16] = {0};
    uint64_t result;

    if (where != NULL)
        memcpy(before, where, sizeof(before));
    result = transfer(BUFFER, iova, sizeof(before), TO_MEMORY);
    report(name, result != 0 && (where == NULL || memcmp(before, where, sizeof(before)) == 0),
           "result %" PRIu64 ", memory '%.16s'", result, where != NULL ? (const char *)where : "");
    printf("RESULT refused 0x%" PRIx64 "\n", iova);
}

static void must_not_read(const char *name, uint64_t iova)
{
    uint64_t result, loaded;

    load("before", 64);
    result = transfer(iova, BUFFER + 64, 16, 0);
    loaded = transfer(BUFFER + 64, READ_WRITE, 16, TO_MEMORY);
    report(name, result != 0 && loaded == 0 && memcmp(memory + page, "before", 7) == 0, "result %" PRIu64 ", got '%.16s'",
           result, (const char *)memory + page);
    printf("RESULT refused 0x%" PRIx64 "\n", iova);
}

static void check_mapped(void)
{
    uint64_t loaded, stored;

    strcpy((char *)memory, "mapped memory arrives");
    loaded = transfer(READ_ONLY, BUFFER, 22, 0);
    stored = transfer(BUFFER, READ_WRITE + 5, 22, TO_MEMORY);
    report("mapped", loaded == 0 && stored == 0 && strcmp((char *)memory + page + 5, "mapped memory arrives") == 0,
           "results %" PRIu64 " %" PRIu64 ", memory '%.22s'", loaded, stored, (const char *)memory + page + 5);
}

/* Neighbouring IOVAs of pages far apart, in two mappings: the bytes must be split at the edge. */
static void check_edge(void)
{
    uint64_t stored;

    map(READ_WRITE + page, 5, 1, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    load("abcdefgh", 0);
    stored = transfer(BUFFER, READ_WRITE + page - 3, 8, TO_MEMORY);
    report("edge", stored == 0 && memcmp(memory + 2 * page - 3, "abc", 3) == 0 &&
                       memcmp(memory + 5 * page, "defgh", 5) == 0 && memory[2 * page] == 0,
           "result %" PRIu64, stored);
    /* Half of it mapped: the whole access may be refused or its first part done, but nothing past the edge. */
    unmap(READ_WRITE + page, 1);
    memset(memory + 5 * page, 0, 16);
    stored = transfer(BUFFER, READ_WRITE + page - 3, 8, TO_MEMORY);
    report("over_the_edge", stored != 0 && memory[5 * page] == 0 && memory[2 * page] == 0, "result %" PRIu64, stored);
    printf("RESULT refused 0x%" PRIx64 "\n", (uint64_t)(READ_WRITE + page));
}

static void check_remap(void)
{
    uint64_t stored;

    unmap(READ_WRITE, 1);
    map(READ_WRITE, 6, 1, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    memset(memory + page, 0, page);
    load("moved", 0);
    stored = transfer(BUFFER, READ_WRITE, 6, TO_MEMORY);
    report("remapped", stored == 0 && strcmp((char *)memory + 6 * page, "moved") == 0 && memory[page] == 0,
           "result %" PRIu64, stored);
    unmap(READ_WRITE, 1);
    map(READ_WRITE, 1, 1, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
}

static void check_interrupt(void)
{
    uint8_t room[sizeof(struct vfio_irq_set) + sizeof(int)] __attribute__((aligned(8)));
    struct vfio_irq_set *request = (struct vfio_irq_set *)room;
    int irq = eventfd(0, 0);
    struct pollfd wait = {.fd = irq, .events = POLLIN};

    *request = (struct vfio_irq_set){.argsz = sizeof(room),
                                     .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
                                     .index = VFIO_PCI_MSIX_IRQ_INDEX,
                                     .count = 1};
    memcpy(request->data, &irq, sizeof(irq));
    if (ioctl(device, VFIO_DEVICE_SET_IRQS, request) < 0)
        give_up("VFIO_DEVICE_SET_IRQS");
    transfer(READ_ONLY, BUFFER, 8, INTERRUPT);
    report("interrupt", poll(&wait, 1, PATIENCE * 1000) == 1, "none came");
    put(ACK, 0x100, 4);
    close(irq);
}

/* VFIO lets go of the device: its domain ends. The engine is then driven through sysfs, still alive. */
static void check_detached(void)
{
    uint16_t command = 6;
    uint64_t result;
    int file;

    memcpy(memory + page, "untouched\0\0\0\0\0\0", 16);
    close(device);
    if (ioctl(group, VFIO_GROUP_UNSET_CONTAINER) < 0)
        give_up("VFIO_GROUP_UNSET_CONTAINER");
    close(group);
    close(container);
    write_sysfs(in_sysfs("driver/unbind"), address);
    if (write_sysfs(in_sysfs("enable"), "1") < 0)
        give_up("enabling the function");
    file = open(in_sysfs("config"), O_RDWR);
    if (file < 0 || pwrite(file, &command, 2, 4) != 2)
        give_up("the configuration space");
    close(file);
    file = open(in_sysfs("resource0"), O_RDWR);
    bar = file < 0 ? MAP_FAILED : mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (bar == MAP_FAILED)
        give_up("BAR 0 through sysfs");
    close(file);
    result = transfer(BUFFER, READ_WRITE, 16, TO_MEMORY);
    report("detached", get(0, 4) == ENGINE_ID && result != 0 && strcmp((char *)memory + page, "untouched") == 0,
           "result %" PRIu64 ", memory '%.16s'", result, (const char *)memory + page);
    printf("RESULT refused 0x%" PRIx64 "\n", (uint64_t)READ_WRITE);
}

int main(int argc, char **argv)
{
    if (argc > 2) {
        fputs("usage: dma_check [PCI-ADDRESS]\n", stderr);
        return 2;
    }
    if (argc == 2)
        address = argv[1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    page = (size_t)sysconf(_SC_PAGESIZE);
    memory = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        give_up("memory");
    open_vfio();
    if (get(0, 4) != ENGINE_ID) {
        printf("RESULT setup FAILED %s is not the DMA engine: identification %08" PRIx64 "\n", address, get(0, 4));
        return 2;
    }
    map(READ_ONLY, 0, 1, VFIO_DMA_MAP_FLAG_READ);
    map(READ_WRITE, 1, 1, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    check_mapped();
    check_edge();
    check_remap();
    check_interrupt();
    load("SHOULD NOT LEAK", 0);
    must_not_write("read_only", READ_ONLY, memory);
    must_not_write("never_mapped_write", NOWHERE, NULL);
    must_not_read("never_mapped_read", NOWHERE);
    unmap(READ_ONLY, 1);
    must_not_write("unmapped_write", READ_ONLY, memory);
    check_detached();
    printf("RESULT dma_check %s\n", failures == 0 ? "ok" : "FAILED");
    return failures == 0 ? 0 : 1;
}
