/*
 * Takes a virtio-iommu PCI function from the kernel and plays its request queue itself, waiting by polling: what a
 * request costs without a driver around it.  The kernel's driver must not have claimed the function.
 *
 *   raw_queue [-n REQUESTS] [-r ROUNDS] FUNCTION ENDPOINT
 *
 * Every round maps and unmaps REQUESTS single pages one request at a time, and then in batches of 32.  One line a
 * round; times are microseconds per request, `bad` counts the requests that the device refused:
 *
 *   RESULT raw_queue round=0 requests=5000 single_map_us=.. single_unmap_us=.. batch_map_us=.. batch_unmap_us=.. bad=0
 */
#include "guest.h"

#include <fcntl.h>
#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_iommu.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define BATCH 32
#define QUEUE_SIZE (2 * BATCH)
#define SLOT_BYTES ((size_t)64) /* of a request */
#define TAIL_BYTES ((size_t)8)  /* of an answer, with room to be aligned */
#define DOMAIN 1
#define FIRST_IOVA UINT64_C(0x100000000)
#define TARGET_OF_MAPS UINT64_C(0x40000000)
#define FEATURES \
    (1u << VIRTIO_IOMMU_F_INPUT_RANGE | 1u << VIRTIO_IOMMU_F_DOMAIN_RANGE | 1u << VIRTIO_IOMMU_F_MAP_UNMAP)

struct queue {
    struct vring_desc *descriptors;
    struct vring_avail *available;
    struct vring_used *used;
    uint16_t next;
};

struct device {
    volatile struct virtio_pci_common_cfg *common;
    volatile uint16_t *kick;
    struct queue requests;
    char *slots; /* BATCH requests, SLOT_BYTES each */
    char *tails; /* BATCH answers, TAIL_BYTES each */
    uint64_t slots_at, tails_at;
    unsigned long bad;
};

/* A page that stays where it is. */
static void *new_page(void)
{
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);

    if (page == MAP_FAILED)
        die(errno, "a page of memory");
    memset(page, 0, PAGE);
    return page;
}

/* Where it is, in guest-physical addresses. */
static uint64_t physical(const void *page)
{
    uint64_t entry = 0, address = (uintptr_t)page;
    int file = open("/proc/self/pagemap", O_RDONLY);

    if (file < 0 || pread(file, &entry, sizeof(entry), (off_t)(address / PAGE * sizeof(entry))) != sizeof(entry))
        die(errno, "/proc/self/pagemap");
    close(file);
    return (entry & ((UINT64_C(1) << 55) - 1)) * PAGE + address % PAGE;
}

static void unbind(const char *function)
{
    char path[128];

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/driver/unbind", function);
    int file = open(path, O_WRONLY);
    if (file < 0)
        return; /* it has no driver */
    if (write(file, function, strlen(function)) < 0)
        die(errno, "%s", path);
    close(file);
}

static volatile char *map_bar(const char *function, unsigned bar)
{
    char path[128];

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource%u", function, bar);
    int file = open(path, O_RDWR | O_SYNC);
    if (file < 0)
        die(errno, "%s", path);
    off_t size = lseek(file, 0, SEEK_END);
    void *mapped = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED)
        die(errno, "%s", path);
    close(file);
    return mapped;
}

/* Finds the registers and lets the function reach memory.  `*multiplier` is the distance of two notify addresses. */
static volatile char *open_function(struct device *device, const char *function, uint32_t *multiplier)
{
    char path[128];
    uint8_t config[256];
    volatile char *notify = NULL;

    unbind(function);
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/config", function);
    int file = open(path, O_RDWR);
    if (file < 0 || pread(file, config, sizeof(config), 0) != sizeof(config))
        die(errno, "%s", path);
    uint16_t command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE;
    if (pwrite(file, &command, sizeof(command), PCI_COMMAND) != sizeof(command))
        die(errno, "%s", path);
    close(file);

    for (unsigned at = config[PCI_CAPABILITY_LIST]; at != 0; at = config[at + 1]) {
        struct virtio_pci_notify_cap capability;

        if (config[at] != PCI_CAP_ID_VNDR || at + sizeof(capability) > sizeof(config))
            continue;
        memcpy(&capability, config + at, sizeof(capability));
        if (capability.cap.cfg_type == VIRTIO_PCI_CAP_COMMON_CFG) {
            volatile char *bar = map_bar(function, capability.cap.bar);
            device->common = (volatile struct virtio_pci_common_cfg *)(bar + capability.cap.offset);
        } else if (capability.cap.cfg_type == VIRTIO_PCI_CAP_NOTIFY_CFG) {
            notify = map_bar(function, capability.cap.bar) + capability.cap.offset;
            *multiplier = capability.notify_off_multiplier;
        }
    }
    if (device->common == NULL || notify == NULL)
        die(0, "%s: no modern virtio function", function);
    return notify;
}

static void negotiate(struct device *device)
{
    volatile struct virtio_pci_common_cfg *common = device->common;

    common->device_status = 0;
    while (common->device_status != 0)
        ;
    common->device_status = VIRTIO_CONFIG_S_ACKNOWLEDGE;
    common->device_status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    common->device_feature_select = 0;
    if ((common->device_feature & 1u << VIRTIO_IOMMU_F_MAP_UNMAP) == 0)
        die(0, "the device does not offer MAP_UNMAP");
    uint32_t low = common->device_feature & FEATURES;
    common->guest_feature_select = 0;
    common->guest_feature = low;
    common->guest_feature_select = 1;
    common->guest_feature = 1u << (VIRTIO_F_VERSION_1 - 32);
    common->device_status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
    if ((common->device_status & VIRTIO_CONFIG_S_FEATURES_OK) == 0)
        die(0, "the device refuses features %#x", low);
}

static void set_up_queue(struct device *device, uint16_t index, struct queue *queue)
{
    volatile struct virtio_pci_common_cfg *common = device->common;

    queue->descriptors = new_page();
    queue->available = new_page();
    queue->used = new_page();
    queue->available->flags = VRING_AVAIL_F_NO_INTERRUPT;
    common->queue_select = index;
    if (common->queue_size < QUEUE_SIZE)
        die(0, "queue %u has %u entries, and %u are needed", index, common->queue_size, QUEUE_SIZE);
    common->queue_size = QUEUE_SIZE;
    uint64_t descriptors = physical(queue->descriptors);
    uint64_t available = physical(queue->available);
    uint64_t used = physical(queue->used);
    common->queue_desc_lo = (uint32_t)descriptors;
    common->queue_desc_hi = (uint32_t)(descriptors >> 32);
    common->queue_avail_lo = (uint32_t)available;
    common->queue_avail_hi = (uint32_t)(available >> 32);
    common->queue_used_lo = (uint32_t)used;
    common->queue_used_hi = (uint32_t)(used >> 32);
    common->queue_enable = 1;
}

static void start(struct device *device, const char *function)
{
    uint32_t multiplier = 0;
    volatile char *notify = open_function(device, function, &multiplier);
    struct queue events;

    negotiate(device);
    set_up_queue(device, 0, &device->requests);
    set_up_queue(device, 1, &events);
    device->common->queue_select = 0;
    device->kick = (volatile uint16_t *)(notify + device->common->queue_notify_off * multiplier);
    device->slots = new_page();
    device->slots_at = physical(device->slots);
    device->tails = new_page();
    device->tails_at = physical(device->tails);
    device->common->device_status |= VIRTIO_CONFIG_S_DRIVER_OK;
}

/* Puts the request in a slot into the ring: a readable and a writable descriptor. */
static void post(struct device *device, uint16_t slot, uint32_t length)
{
    struct queue *queue = &device->requests;
    uint16_t head = (uint16_t)(2 * slot);

    queue->descriptors[head] = (struct vring_desc){
        .addr = device->slots_at + slot * SLOT_BYTES,
        .len = length,
        .flags = VRING_DESC_F_NEXT,
        .next = (uint16_t)(head + 1),
    };
    queue->descriptors[head + 1] = (struct vring_desc){
        .addr = device->tails_at + slot * TAIL_BYTES,
        .len = sizeof(struct virtio_iommu_req_tail),
        .flags = VRING_DESC_F_WRITE,
    };
    device->tails[slot * TAIL_BYTES] = (char)0xff;
    queue->available->ring[queue->next % QUEUE_SIZE] = head;
    queue->next++;
}

/* Publishes what was posted, waits for all of it, and counts what was refused. */
static void exchange(struct device *device, uint16_t count)
{
    struct queue *queue = &device->requests;
    volatile uint16_t *used_index = &queue->used->idx;

    atomic_thread_fence(memory_order_release);
    *(volatile uint16_t *)&queue->available->idx = queue->next;
    atomic_thread_fence(memory_order_seq_cst);
    if ((*(volatile uint16_t *)&queue->used->flags & VRING_USED_F_NO_NOTIFY) == 0)
        *device->kick = 0;
    while (*used_index != queue->next)
        ;
    atomic_thread_fence(memory_order_acquire);
    for (uint16_t slot = 0; slot < count; slot++)
        device->bad += device->tails[slot * TAIL_BYTES] != VIRTIO_IOMMU_S_OK;
}

static void post_map(struct device *device, uint16_t slot, uint64_t index)
{
    struct virtio_iommu_req_map request = {
        .head.type = VIRTIO_IOMMU_T_MAP,
        .domain = DOMAIN,
        .virt_start = FIRST_IOVA + 2 * index * PAGE,
        .virt_end = FIRST_IOVA + 2 * index * PAGE + PAGE - 1,
        .phys_start = TARGET_OF_MAPS,
        .flags = VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE,
    };

    memcpy(device->slots + slot * SLOT_BYTES, &request, sizeof(request));
    post(device, slot, offsetof(struct virtio_iommu_req_map, tail));
}

static void post_unmap(struct device *device, uint16_t slot, uint64_t index)
{
    struct virtio_iommu_req_unmap request = {
        .head.type = VIRTIO_IOMMU_T_UNMAP,
        .domain = DOMAIN,
        .virt_start = FIRST_IOVA + 2 * index * PAGE,
        .virt_end = FIRST_IOVA + 2 * index * PAGE + PAGE - 1,
    };

    memcpy(device->slots + slot * SLOT_BYTES, &request, sizeof(request));
    post(device, slot, offsetof(struct virtio_iommu_req_unmap, tail));
}

static void attach(struct device *device, uint32_t endpoint)
{
    struct virtio_iommu_req_attach request = {
        .head.type = VIRTIO_IOMMU_T_ATTACH, .domain = DOMAIN, .endpoint = endpoint};

    memcpy(device->slots, &request, sizeof(request));
    post(device, 0, offsetof(struct virtio_iommu_req_attach, tail));
    exchange(device, 1);
    if (device->bad != 0)
        die(0, "ATTACH of endpoint %#x: status %u", endpoint, (unsigned)(unsigned char)device->tails[0]);
}

/* All pages in batches; microseconds per request. */
static double run(struct device *device, uint64_t requests, uint16_t batch, bool map)
{
    double begin = now_us();

    for (uint64_t done = 0; done < requests;) {
        uint64_t left = requests - done;
        uint16_t count = left < batch ? (uint16_t)left : batch;

        for (uint16_t slot = 0; slot < count; slot++) {
            if (map)
                post_map(device, slot, done + slot);
            else
                post_unmap(device, slot, done + slot);
        }
        exchange(device, count);
        done += count;
    }
    return (now_us() - begin) / (double)requests;
}

int main(int argc, char **argv)
{
    uint64_t requests = 5000, rounds = 3;
    struct device device = {0};
    int option;

    while ((option = getopt(argc, argv, "n:r:")) != -1) {
        if (option == 'n')
            requests = number("requests", optarg, 1 << 24);
        else if (option == 'r')
            rounds = number("rounds", optarg, 1000);
        else
            return 2;
    }
    if (argc - optind != 2)
        die(0, "usage: raw_queue [-n REQUESTS] [-r ROUNDS] FUNCTION ENDPOINT");
    start(&device, argv[optind]);
    attach(&device, (uint32_t)number("endpoint", argv[optind + 1], UINT32_MAX));
    for (uint64_t round = 0; round < rounds; round++) {
        device.bad = 0;
        double single_map = run(&device, requests, 1, true);
        double single_unmap = run(&device, requests, 1, false);
        double batch_map = run(&device, requests, BATCH, true);
        double batch_unmap = run(&device, requests, BATCH, false);
        printf("RESULT raw_queue round=%llu requests=%llu single_map_us=%.3f single_unmap_us=%.3f batch_map_us=%.3f "
               "batch_unmap_us=%.3f bad=%lu\n",
               (unsigned long long)round, (unsigned long long)requests, single_map, single_unmap, batch_map,
               batch_unmap, device.bad);
        fflush(stdout);
    }
    device.common->device_status = 0;
    return 0;
}
