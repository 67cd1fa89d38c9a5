/*
 * What the device programs share: options, events and the summary. Everything a test reads is on standard output, one
 * JSON object per line with an "event": "ready" first, "summary" last.
 */
#ifndef DEVICE_MAIN_H
#define DEVICE_MAIN_H

#include <getopt.h>
#include <stdint.h>

#include "vfio_user_server.h"

/* Values of getopt_long for the options every device has; a device numbers its own from DEVICE_OPTION_OWN. */
enum device_option {
    DEVICE_OPTION_SOCKET = 256,
    DEVICE_OPTION_ONCE,
    DEVICE_OPTION_MESSAGES_ONLY,
    DEVICE_OPTION_MUTE,
    DEVICE_OPTION_NO_UNMAP_REPLY,
    DEVICE_OPTION_OWN,
};

#define DEVICE_OPTIONS                                                                                                 \
    {"socket", required_argument, NULL, DEVICE_OPTION_SOCKET}, {"once", no_argument, NULL, DEVICE_OPTION_ONCE},        \
        {"messages-only", no_argument, NULL, DEVICE_OPTION_MESSAGES_ONLY},                                             \
        {"mute", no_argument, NULL, DEVICE_OPTION_MUTE},                                                               \
    {                                                                                                                  \
        "no-unmap-reply", no_argument, NULL, DEVICE_OPTION_NO_UNMAP_REPLY                                              \
    }

#define DEVICE_USAGE                                                                                                   \
    "  --socket PATH      where the client connects (required)\n"                                                      \
    "  --once             end with the first client\n"                                                                 \
    "  --messages-only    never map memory: all DMA by DMA_READ and DMA_WRITE\n"                                       \
    "  --mute             answer nothing\n"                                                                            \
    "  --no-unmap-reply   do not answer DMA_UNMAP\n"

/* Takes one of the options above. */
void device_option(struct vfu_options *options, int option, const char *argument);

/* A number with an optional K, M or G, up to max; anything else ends the program with status 2. */
uint64_t device_number(const char *option, const char *text, uint64_t max);
/* Ends the program with status 2 and one line. */
_Noreturn void device_usage_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One event line; members is the inside of a JSON object after "event", or "". */
void device_event(const char *event, const char *members_format, ...) __attribute__((format(printf, 2, 3)));

/* Serve until the end, then print the summary: own members of the device first, as made by summary(). Exit status. */
int device_run(struct vfu_server *server, const struct vfu_options *options, void (*summary)(void *device),
               void *device);

#endif
