/*
 * Runs in a guest: block I/O past the page cache, checked byte by byte or timed.
 *
 *   block_io [options] check    write the area, overwrite blocks of it at random, read everything back and compare
 *   block_io [options] bench    time random and sequential accesses, one at a time
 *   block_io [options] read     read the area once
 *
 *   --device PATH   (default /dev/nvme0n1)      --wait SECONDS  for the device to appear (default 60)
 *   --area MIB      bytes used, from the start of the device (default 16)
 *   --ops N         random accesses (default 1000)      --rounds N  of the benchmark; the median counts (default 5)
 *   --seed N        another pattern, other places
 *
 * Prints lines that begin with RESULT, of name=value pairs after a name. Times are microseconds per access. Exit
 * status: 0; 1 after an I/O error or a wrong byte, which have been reported; 2 for bad arguments.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096u
#define CHUNK 131072u
#define SECTOR 512u
#define MAX_ROUNDS 101u

static struct {
    const char *device;
    unsigned wait, rounds;
    uint64_t area, ops, seed;
} options = {"/dev/nvme0n1", 60, 5, 16, 1000, 1};

static int fd;
static uint8_t *buffer;       /* CHUNK bytes and a page more, page aligned */
static uint32_t *generations; /* how often each block was written: its content follows from that */
static uint64_t random_state;
static uint64_t errors, mismatches;
static int last_errno;

static uint64_t mix(uint64_t value)
{
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static uint64_t random_below(uint64_t limit)
{
    random_state += 0x9e3779b97f4a7c15u;
    return mix(random_state) % limit;
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec * 1e-3;
}

/* Every word depends on the block, its generation and the word's place. */
static uint64_t word(uint64_t block, size_t at)
{
    return mix(options.seed << 56 ^ (uint64_t)generations[block] << 40 ^ block << 12 ^ at);
}

static void fill(uint8_t *data, uint64_t block)
{
    for (size_t at = 0; at < BLOCK; at += 8) {
        uint64_t value = word(block, at);

        memcpy(data + at, &value, sizeof(value));
    }
}

static void compare(const uint8_t *data, uint64_t block)
{
    for (size_t at = 0; at < BLOCK; at += 8) {
        uint64_t value = word(block, at);

        if (memcmp(data + at, &value, sizeof(value)) != 0 && mismatches++ < 4)
            printf("RESULT mismatch block=%" PRIu64 " byte=%zu\n", block, at);
    }
}

/* A sum that depends on the order, carried from block to block. */
static uint64_t checksum(uint64_t sum, const uint8_t *data, size_t length)
{
    for (size_t at = 0; at < length; at += 8) {
        uint64_t value;

        memcpy(&value, data + at, sizeof(value));
        sum = (sum << 5 | sum >> 59) + (value ^ (value >> 33));
        sum *= 0xff51afd7ed558ccdu;
    }
    return sum;
}

static bool access_at(bool writing, uint8_t *data, size_t length, uint64_t offset)
{
    ssize_t done = writing ? pwrite(fd, data, length, (off_t)offset) : pread(fd, data, length, (off_t)offset);

    if (done == (ssize_t)length)
        return true;
    last_errno = done < 0 ? errno : EIO;
    if (errors++ == 0)
        printf("RESULT error %s offset=%" PRIu64 " length=%zu errno=%d\n", writing ? "write" : "read", offset, length,
               last_errno);
    return false;
}

/* Data of another place in a page each time, so that transfers begin in the middle of one as well. */
static uint8_t *somewhere(void)
{
    return buffer + random_below(BLOCK / SECTOR) * SECTOR;
}

static void write_all(uint64_t *sum)
{
    for (uint64_t at = 0; at < options.area; at += CHUNK) {
        for (size_t part = 0; part < CHUNK; part += BLOCK)
            fill(buffer + part, (at + part) / BLOCK);
        *sum = checksum(*sum, buffer, CHUNK);
        access_at(true, buffer, CHUNK, at);
    }
}

static void read_all(uint64_t *sum, bool check)
{
    for (uint64_t at = 0; at < options.area; at += CHUNK) {
        uint8_t *data = somewhere();

        if (!access_at(false, data, CHUNK, at))
            continue;
        *sum = checksum(*sum, data, CHUNK);
        for (size_t part = 0; check && part < CHUNK; part += BLOCK)
            compare(data + part, (at + part) / BLOCK);
    }
}

static void check(void)
{
    uint64_t first = 0, written = 0, read_back = 0, blocks = options.area / BLOCK;

    write_all(&first);
    for (uint64_t i = 0; i < options.ops; i++) {
        uint64_t block = random_below(blocks);
        uint8_t *data = somewhere();

        generations[block]++;
        fill(data, block);
        access_at(true, data, BLOCK, block * BLOCK);
    }
    if (fsync(fd) < 0) {
        last_errno = errno;
        errors++;
    }
    for (uint64_t i = 0; i < options.ops; i++) {
        uint64_t block = random_below(blocks);
        uint8_t *data = somewhere();

        if (access_at(false, data, BLOCK, block * BLOCK))
            compare(data, block);
    }
    for (uint64_t block = 0; block < blocks; block++) {
        fill(buffer, block);
        written = checksum(written, buffer, BLOCK);
    }
    read_all(&read_back, true);
    printf("RESULT check bytes=%" PRIu64 " written=%016" PRIx64 " read=%016" PRIx64 " mismatches=%" PRIu64
           " errors=%" PRIu64 " errno=%d\n",
           options.area, written, read_back, mismatches, errors, last_errno);
    if (written != read_back)
        mismatches++;
}

static int by_value(const void *a, const void *b)
{
    double difference = *(const double *)a - *(const double *)b;

    return difference < 0 ? -1 : difference > 0;
}

static void bench_one(const char *name, bool writing, bool sequential, size_t length)
{
    uint64_t places = options.area / length, count = sequential ? places : options.ops;
    double us[MAX_ROUNDS];

    for (unsigned round = 0; round < options.rounds; round++) {
        double start = now();

        for (uint64_t i = 0; i < count; i++)
            access_at(writing, buffer, length, (sequential ? i : random_below(places)) * length);
        us[round] = (now() - start) / (double)count;
    }
    qsort(us, options.rounds, sizeof(us[0]), by_value);
    printf("RESULT %s us=%.2f min=%.2f max=%.2f ops=%" PRIu64 " rounds=%u errors=%" PRIu64 "\n", name,
           us[options.rounds / 2], us[0], us[options.rounds - 1], count, options.rounds, errors);
}

static void bench(void)
{
    uint64_t sum = 0;

    write_all(&sum); /* the medium has every page, and the kernel its caches */
    bench_one("randread_4k", false, false, BLOCK);
    bench_one("seqread_128k", false, true, CHUNK);
    bench_one("randwrite_4k", true, false, BLOCK);
    bench_one("seqwrite_128k", true, true, CHUNK);
}

static uint64_t number(const char *option, const char *text, uint64_t least, uint64_t most)
{
    char *end;
    uint64_t value = strtoull(text, &end, 0);

    if (*text < '0' || *text > '9' || *end != '\0' || value < least || value > most) {
        fprintf(stderr, "block_io: %s %s: a number from %" PRIu64 " to %" PRIu64 "\n", option, text, least, most);
        exit(2);
    }
    return value;
}

static int open_device(void)
{
    double deadline = now() + options.wait * 1e6;

    for (;;) {
        int opened = open(options.device, O_RDWR | O_DIRECT);

        if (opened >= 0 || now() > deadline)
            return opened;
        usleep(10000);
    }
}

int main(int argc, char **argv)
{
    const char *what = NULL;

    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";

        if (argv[i][0] != '-') {
            what = argv[i];
            continue;
        }
        i++;
        if (strcmp(argv[i - 1], "--device") == 0)
            options.device = value;
        else if (strcmp(argv[i - 1], "--wait") == 0)
            options.wait = (unsigned)number("--wait", value, 0, 3600);
        else if (strcmp(argv[i - 1], "--area") == 0)
            options.area = number("--area", value, 1, 1024);
        else if (strcmp(argv[i - 1], "--ops") == 0)
            options.ops = number("--ops", value, 1, 100000000);
        else if (strcmp(argv[i - 1], "--rounds") == 0)
            options.rounds = (unsigned)number("--rounds", value, 1, MAX_ROUNDS);
        else if (strcmp(argv[i - 1], "--seed") == 0)
            options.seed = number("--seed", value, 0, UINT64_MAX);
        else
            what = "?";
    }
    if (what == NULL || (strcmp(what, "check") != 0 && strcmp(what, "bench") != 0 && strcmp(what, "read") != 0)) {
        fputs("usage: block_io [--device PATH] [--wait SECONDS] [--area MIB] [--ops N] [--rounds N] [--seed N]"
              " check|bench|read\n", stderr);
        return 2;
    }
    options.area <<= 20;
    random_state = options.seed;
    setvbuf(stdout, NULL, _IOLBF, 0);
    generations = calloc(options.area / BLOCK, sizeof(*generations));
    if (generations == NULL || posix_memalign((void **)&buffer, BLOCK, CHUNK + BLOCK) != 0) {
        fputs("block_io: out of memory\n", stderr);
        return 1;
    }
    memset(buffer, 0, CHUNK + BLOCK);
    fd = open_device();
    if (fd < 0) {
        printf("RESULT error open errno=%d\n", errno);
        return 1;
    }
    if (strcmp(what, "check") == 0) {
        check();
    } else if (strcmp(what, "bench") == 0) {
        bench();
    } else {
        uint64_t sum = 0;

        read_all(&sum, false);
        printf("RESULT read bytes=%" PRIu64 " sum=%016" PRIx64 " errors=%" PRIu64 " errno=%d\n", options.area, sum,
               errors, last_errno);
    }
    return errors > 0 || mismatches > 0 ? 1 : 0;
}
