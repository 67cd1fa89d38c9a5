/* SPDX-License-Identifier: Apache-2.0 */
/*
 * asleep:        the worker is blocked; from just before the kick until the used index has moved
 * eventfd_floor: a thread is blocked in a read of an eventfd; from just before the write until the word that the
 *                thread then writes to shared memory has changed
 * spinning:      the worker polls; from just before the request is offered until the used index has moved
 * spin_floor:    a thread polls a word; from just before it is written until the thread's answer is seen
 *
 * Subject and floor take turns, block by block, so that both see the same machine. Before it is woken, a
 * blocked thread is seen to be blocked by the kernel, and has then been so for as long as the other one.
 */
#include "latency.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

enum {
    BLOCKS = 20,
    WAKES = 200,   /* samples of a block */
    SPINS = 5000,
    BLOCKED_NS = 50000, /* how long a thread has been blocked when it is woken */
    SPIN_US = 100000,
};

double monotonic_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct samples {
    double ns[BLOCKS * SPINS];
    size_t count;
};

static int compare(const void *a, const void *b)
{
    double left = *(const double *)a;
    double right = *(const double *)b;

    return left < right ? -1 : left > right;
}

static double median_us(struct samples *samples)
{
    qsort(samples->ns, samples->count, sizeof(samples->ns[0]), compare);
    return samples->ns[samples->count / 2] / 1000;
}

/* Returns when the thread has been blocked in the kernel for BLOCKED_NS. */
static void wait_until_blocked(long thread)
{
    char path[64];
    char text[256];

    snprintf(path, sizeof(path), "/proc/self/task/%ld/stat", thread);
    for (;;) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t size = fd >= 0 ? read(fd, text, sizeof(text) - 1) : -1;
        if (size <= 0) {
            fprintf(stderr, "bench: cannot read %s\n", path);
            exit(1);
        }
        close(fd);
        text[size] = '\0';
        const char *name_end = strrchr(text, ')');
        if (name_end && name_end[1] == ' ' && name_end[2] == 'S') {
            break;
        }
    }
    for (double start = monotonic_ns(); monotonic_ns() - start < BLOCKED_NS;) {
        relax();
    }
}

/* The engine's thread, found by its name; any other of that name has been joined. */
static long worker_thread(void)
{
    DIR *tasks = opendir("/proc/self/task");
    long found = -1;

    for (struct dirent *entry; tasks && (entry = readdir(tasks));) {
        char path[300];
        char name[32] = "";
        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "re");
        if (file) {
            if (fgets(name, sizeof(name), file) && strcmp(name, "viommu-worker\n") == 0) {
                found = strtol(entry->d_name, NULL, 10);
            }
            fclose(file);
        }
    }
    if (tasks) {
        closedir(tasks);
    }
    if (found < 0) {
        fprintf(stderr, "bench: no thread is named viommu-worker\n");
        exit(1);
    }
    return found;
}

/* Maps and unmaps the same page in turns. */
static void write_request(struct driver *driver, unsigned i)
{
    if (i % 2 == 0) {
        driver_map(driver, 0x10000);
    } else {
        driver_unmap(driver, 0x10000);
    }
}

static void measure_asleep(struct samples *samples)
{
    struct driver *driver = driver_new(0);
    long thread = worker_thread();

    for (unsigned i = 0; i < WAKES; i++) {
        write_request(driver, i);
        wait_until_blocked(thread);
        bool kick = driver_offer(driver);
        double start = monotonic_ns();
        if (!kick) {
            fprintf(stderr, "bench: a sleeping worker does not ask for a kick\n");
            exit(1);
        }
        driver_kick(driver);
        driver_wait(driver, 0);
        samples->ns[samples->count++] = monotonic_ns() - start;
        driver_collect(driver);
    }
    driver_free(driver);
}

static void measure_spinning(struct samples *samples)
{
    struct driver *driver = driver_new(SPIN_US);

    for (unsigned i = 0; i < SPINS; i++) {
        write_request(driver, i);
        double start = monotonic_ns();
        if (driver_offer(driver)) {
            driver_kick(driver); /* the first few at most: the others find the worker spinning */
        }
        driver_wait(driver, 0);
        samples->ns[samples->count++] = monotonic_ns() - start;
        driver_collect(driver);
    }
    driver_free(driver);
}

/* A thread that answers, by shared memory, what it is asked by an eventfd or by shared memory. */
struct echo {
    _Alignas(64) atomic_uint question;
    _Alignas(64) atomic_uint answer;
    _Alignas(64) int eventfd; /* -1: polls */
    unsigned rounds;
    atomic_long thread;
};

static void *run_echo(void *argument)
{
    struct echo *echo = argument;
    uint64_t value;

    atomic_store(&echo->thread, syscall(SYS_gettid));
    for (unsigned i = 1; i <= echo->rounds; i++) {
        if (echo->eventfd >= 0) {
            if (read(echo->eventfd, &value, sizeof(value)) != (ssize_t)sizeof(value)) {
                exit(1);
            }
        } else {
            while (atomic_load_explicit(&echo->question, memory_order_acquire) != i) {
                relax();
            }
        }
        atomic_store_explicit(&echo->answer, i, memory_order_release);
    }
    return NULL;
}

static void measure_floor(struct samples *samples, bool by_eventfd)
{
    const uint64_t one = 1;
    struct echo echo = {.eventfd = by_eventfd ? eventfd(0, EFD_CLOEXEC) : -1, .rounds = by_eventfd ? WAKES : SPINS};
    pthread_t thread;

    if (pthread_create(&thread, NULL, run_echo, &echo) != 0) {
        exit(1);
    }
    while (atomic_load(&echo.thread) == 0) {
        relax();
    }
    for (unsigned i = 1; i <= echo.rounds; i++) {
        if (by_eventfd) {
            wait_until_blocked(atomic_load(&echo.thread));
        }
        double start = monotonic_ns();
        if (by_eventfd) {
            if (write(echo.eventfd, &one, sizeof(one)) != (ssize_t)sizeof(one)) {
                exit(1);
            }
        } else {
            atomic_store_explicit(&echo.question, i, memory_order_release);
        }
        while (atomic_load_explicit(&echo.answer, memory_order_acquire) != i) {
        }
        samples->ns[samples->count++] = monotonic_ns() - start;
    }
    pthread_join(thread, NULL);
    if (by_eventfd) {
        close(echo.eventfd);
    }
}

int run_latency(void)
{
    enum { ASLEEP, EVENTFD_FLOOR, SPINNING, SPIN_FLOOR, KINDS };
    struct samples *samples = calloc(KINDS, sizeof(*samples));

    if (!samples) {
        return 1;
    }
    for (unsigned block = 0; block < BLOCKS; block++) {
        measure_asleep(&samples[ASLEEP]);
        measure_floor(&samples[EVENTFD_FLOOR], true);
        measure_spinning(&samples[SPINNING]);
        measure_floor(&samples[SPIN_FLOOR], false);
    }
    printf("{\"asleep\": %.3f, \"eventfd_floor\": %.3f, \"spinning\": %.3f, \"spin_floor\": %.3f}\n",
           median_us(&samples[ASLEEP]), median_us(&samples[EVENTFD_FLOOR]), median_us(&samples[SPINNING]),
           median_us(&samples[SPIN_FLOOR]));
    free(samples);
    return 0;
}
