/* What the guest programs share: time, errors, and numbers on the command line. */
#ifndef GUEST_H
#define GUEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Ends the program with one line on standard error; with `error`, its meaning follows. */
static inline _Noreturn void die(int error, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (error != 0)
        fprintf(stderr, ": %s", strerror(error));
    fputc('\n', stderr);
    exit(1);
}

/* Microseconds since some moment. */
static inline double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

/* A number from 1 to `most`, in C's notations. */
static inline uint64_t number(const char *what, const char *text, uint64_t most)
{
    char *end;

    errno = 0;
    uint64_t value = strtoull(text, &end, 0);
    if (errno != 0 || end == text || *end != '\0' || value == 0 || value > most)
        die(0, "%s '%s': not a number from 1 to %llu", what, text, (unsigned long long)most);
    return value;
}

#endif
