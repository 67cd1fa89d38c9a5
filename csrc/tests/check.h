/* What the C tests are made of: checks that say what they saw, and a random number that is the same in every run. */
#ifndef VIOMMU_TESTS_CHECK_H
#define VIOMMU_TESTS_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition); \
            abort();                                                                           \
        }                                                                                      \
    } while (0)

/* Two integers are equal; shown as signed and in hexadecimal when they are not. */
#define CHECK_EQ(actual, expected)                                                                           \
    do {                                                                                                     \
        long long check_actual = (long long)(actual), check_expected = (long long)(expected);                \
        if (check_actual != check_expected) {                                                                \
            fprintf(stderr, "%s:%d: %s: %s is %lld (0x%llx), not %lld (0x%llx)\n", __FILE__, __LINE__, __func__, \
                    #actual, check_actual, (unsigned long long)check_actual, check_expected,                 \
                    (unsigned long long)check_expected);                                                     \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

/* Run one test; its name is the last line of the output if it fails. */
#define RUN(test)               \
    do {                        \
        printf("%s\n", #test);  \
        (void)fflush(stdout);   \
        test();                 \
    } while (0)

/* ctest's word for a test that this machine cannot run. */
#define EXIT_SKIPPED 77

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZED 1
#endif
#endif
#ifndef THREAD_SANITIZED
#define THREAD_SANITIZED 0
#endif

/* xorshift64*: the state must not be 0. */
static inline uint64_t check_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

static inline uint64_t check_now_ns(void)
{
    struct timespec time;

    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Wait for something another thread does. The deadline is only there so that a failure is a failure and not a hang. */
#define CHECK_SOON(condition)                                             \
    do {                                                                  \
        uint64_t check_until = check_now_ns() + 60 * 1000000000ull;       \
        while (!(condition)) {                                            \
            struct timespec check_pause = {0, 100000};                    \
            CHECK(check_now_ns() < check_until && #condition);            \
            (void)nanosleep(&check_pause, NULL);                          \
        }                                                                 \
    } while (0)

#endif
