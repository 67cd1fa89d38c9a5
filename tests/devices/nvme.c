/* The NVMe controller as a program: options, medium, summary. */
#include "nvme.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "device_main.h"
#include "transport.h"

#define MAX_MEDIUM (1ull << 40)
#define DEFAULT_MEDIUM (64ull << 20)

enum {
    OPTION_FILE = DEVICE_OPTION_OWN,
    OPTION_MEMORY,
    OPTION_SERIAL,
    OPTION_INTX,
    OPTION_DIE_AFTER,
    OPTION_MUTE_AFTER,
    OPTION_ROGUE_READ,
    OPTION_ROGUE_WRITE,
    OPTION_ROGUE_SCAN,
    OPTION_ROGUE_AT,
};

static const char usage[] =
    "usage: nvme --socket PATH [options]\n" DEVICE_USAGE
    "  --file PATH        the medium is this file, whole blocks of 512 bytes\n"
    "  --memory SIZE      the medium is memory of this size (default 64M)\n"
    "  --serial TEXT      serial number, up to 20 characters (default: name of the socket)\n"
    "  --intx             no MSI-X\n"
    "  --die-after N      exit with status 70 in the middle of the N-th I/O command's data\n"
    "  --mute-after N     answer nothing from the N-th I/O command on\n"
    "  --rogue-read IOVA  read 16 bytes there at the N-th I/O command, whatever is mapped\n"
    "  --rogue-write IOVA write there\n"
    "  --rogue-scan TEXT  search all of every file of memory for the text\n"
    "  --rogue-at N       which I/O command that is (default 1)\n";

static void open_medium(struct nvme *nvme, const char *path, uint64_t size)
{
    struct stat st;
    void *map;
    int fd = path != NULL ? open(path, O_RDWR | O_CLOEXEC) : memfd_create("nvme-medium", MFD_CLOEXEC);

    if (fd < 0 || (path == NULL && ftruncate(fd, (off_t)size) < 0) || fstat(fd, &st) < 0)
        device_usage_error("nvme: medium %s: %s", path != NULL ? path : "in memory", strerror(errno));
    if (st.st_size < (1 << NVME_BLOCK_SHIFT) || st.st_size % (1 << NVME_BLOCK_SHIFT) != 0)
        device_usage_error("nvme: medium %s: %lld bytes; whole blocks of 512 are needed",
                           path != NULL ? path : "in memory", (long long)st.st_size);
    map = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        device_usage_error("nvme: medium %s: %s", path != NULL ? path : "in memory", strerror(errno));
    close(fd);
    nvme->medium = map;
    nvme->medium_size = (size_t)st.st_size;
    nvme->medium_is_file = path != NULL;
}

static void summary(void *device)
{
    const struct nvme *nvme = device;
    const struct nvme_counters *counters = &nvme->counters;

    printf("\"reads\":%" PRIu64 ",\"writes\":%" PRIu64 ",\"flushes\":%" PRIu64 ",\"read_bytes\":%" PRIu64
           ",\"written_bytes\":%" PRIu64 ",\"admin_commands\":%" PRIu64 ",\"failed_commands\":%" PRIu64,
           counters->reads, counters->writes, counters->flushes, counters->read_bytes, counters->written_bytes,
           counters->admin, counters->errors);
}

/* Serial numbers end up in JSON and in names of the guest: plain characters only. */
static void set_serial(struct nvme *nvme, const char *text)
{
    size_t length = strnlen(text, sizeof(nvme->serial) - 1);

    for (size_t i = 0; i < length; i++)
        nvme->serial[i] = text[i] > ' ' && text[i] < 0x7f && text[i] != '"' && text[i] != '\\' ? text[i] : '-';
    nvme->serial[length] = '\0';
}

int main(int argc, char **argv)
{
    static const struct option long_options[] = {DEVICE_OPTIONS,
                                                 {"file", required_argument, NULL, OPTION_FILE},
                                                 {"memory", required_argument, NULL, OPTION_MEMORY},
                                                 {"serial", required_argument, NULL, OPTION_SERIAL},
                                                 {"intx", no_argument, NULL, OPTION_INTX},
                                                 {"die-after", required_argument, NULL, OPTION_DIE_AFTER},
                                                 {"mute-after", required_argument, NULL, OPTION_MUTE_AFTER},
                                                 {"rogue-read", required_argument, NULL, OPTION_ROGUE_READ},
                                                 {"rogue-write", required_argument, NULL, OPTION_ROGUE_WRITE},
                                                 {"rogue-scan", required_argument, NULL, OPTION_ROGUE_SCAN},
                                                 {"rogue-at", required_argument, NULL, OPTION_ROGUE_AT},
                                                 {"help", no_argument, NULL, 'h'},
                                                 {0}};
    static struct nvme nvme = {.options = {.rogue_at = 1}, .vectors = NVME_IO_QUEUES + 1};
    struct pci_identity identity = {.vendor = 0x1234, .device = 0x11ea, .class_code = 0x010802,
                                    .bar_size = NVME_BAR_SIZE, .msix_table = NVME_MSIX_TABLE,
                                    .msix_pba = NVME_MSIX_PBA};
    struct vfu_options options = {0};
    const char *file = NULL;
    uint64_t memory = DEFAULT_MEDIUM;
    int option, error;

    while ((option = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
        switch (option) {
        case 'h':
            fputs(usage, stdout);
            return 0;
        case '?':
            return 2;
        case OPTION_FILE:
            file = optarg;
            break;
        case OPTION_MEMORY:
            memory = device_number("--memory", optarg, MAX_MEDIUM);
            break;
        case OPTION_SERIAL:
            set_serial(&nvme, optarg);
            break;
        case OPTION_INTX:
            nvme.vectors = 0;
            break;
        case OPTION_DIE_AFTER:
            nvme.options.die_after = device_number("--die-after", optarg, UINT64_MAX);
            break;
        case OPTION_MUTE_AFTER:
            nvme.options.mute_after = device_number("--mute-after", optarg, UINT64_MAX);
            break;
        case OPTION_ROGUE_READ:
            nvme.rogue.read = true;
            nvme.rogue.read_iova = device_number("--rogue-read", optarg, UINT64_MAX);
            break;
        case OPTION_ROGUE_WRITE:
            nvme.rogue.write = true;
            nvme.rogue.write_iova = device_number("--rogue-write", optarg, UINT64_MAX);
            break;
        case OPTION_ROGUE_SCAN:
            nvme.rogue.scan = *optarg != '\0' ? optarg : NULL;
            break;
        case OPTION_ROGUE_AT:
            nvme.options.rogue_at = device_number("--rogue-at", optarg, UINT64_MAX);
            break;
        default:
            device_option(&options, option, optarg);
        }
    }
    if (options.socket_path == NULL || optind != argc)
        device_usage_error("nvme: --socket PATH is required, and no other argument");
    transport_catch_stop();
    open_medium(&nvme, file, memory);
    if (nvme.serial[0] == '\0') {
        char *path = strdup(options.socket_path); /* basename writes into it */

        set_serial(&nvme, path != NULL ? basename(path) : "1");
        free(path);
    }
    identity.vectors = nvme.vectors;
    nvme_ops.reset(&nvme);
    error = vfu_server_new(&options, &identity, &nvme_ops, &nvme, &nvme.server);
    if (error != 0)
        device_usage_error("nvme: --socket %s: %s", options.socket_path, strerror(-error));
    return device_run(nvme.server, &options, summary, &nvme);
}
