/*
 * Runs in a guest: what reading and writing a register of a PCI function takes.
 *
 *   mmio_time [-n COUNT] [-r ROUNDS] FUNCTION READ WRITE
 *
 * FUNCTION is like 0000:00:02.0; no driver may use it meanwhile. READ and WRITE are offsets of 32-bit registers in its
 * first BAR; the one is read, and zeros are written to the other. A write may be posted: the time of COUNT writes ends
 * with a read, which waits for them.
 *
 * Prints for each round "RESULT mmio read_us=... write_us=...", microseconds per access.
 */
#include "guest.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define BAR_BYTES 0x1000u

static volatile uint32_t *registers(const char *function)
{
    char path[96];
    int length = snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/enable", function);
    void *bar;
    int file;

    if (length < 0 || (size_t)length >= sizeof(path))
        die(0, "%s: not a PCI function", function);
    file = open(path, O_WRONLY);
    if (file < 0 || write(file, "1", 1) != 1)
        die(errno, "%s", path);
    close(file);
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/resource0", function);
    file = open(path, O_RDWR | O_SYNC);
    bar = file < 0 ? MAP_FAILED : mmap(NULL, BAR_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (bar == MAP_FAILED)
        die(errno, "%s", path);
    close(file);
    return bar;
}

static size_t offset_of(const char *text)
{
    char *end;
    unsigned long value = strtoul(text, &end, 0);

    if (end == text || *end != '\0' || value > BAR_BYTES - 4 || value % 4 != 0)
        die(0, "offset '%s': not a multiple of 4 below %u", text, BAR_BYTES);
    return value / 4;
}

int main(int argc, char **argv)
{
    uint64_t count = 1000, rounds = 5;
    volatile uint32_t *bar;
    size_t from, to;
    int option;

    while ((option = getopt(argc, argv, "n:r:")) != -1) {
        if (option == 'n')
            count = number("-n", optarg, 10000000);
        else if (option == 'r')
            rounds = number("-r", optarg, 1000);
        else
            return 2;
    }
    if (argc - optind != 3)
        die(0, "usage: mmio_time [-n COUNT] [-r ROUNDS] FUNCTION READ WRITE");
    bar = registers(argv[optind]);
    from = offset_of(argv[optind + 1]);
    to = offset_of(argv[optind + 2]);
    for (uint64_t round = 0; round < rounds; round++) {
        double start = now_us(), read, written;

        for (uint64_t i = 0; i < count; i++)
            (void)bar[from];
        read = now_us();
        for (uint64_t i = 0; i < count; i++)
            bar[to] = 0;
        (void)bar[from];
        written = now_us();
        printf("RESULT mmio read_us=%.3f write_us=%.3f\n", (read - start) / (double)count,
               (written - read) / (double)count);
    }
    return 0;
}
