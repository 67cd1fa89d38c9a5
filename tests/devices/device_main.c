#include "device_main.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void device_option(struct vfu_options *options, int option, const char *argument)
{
    switch (option) {
    case DEVICE_OPTION_SOCKET:
        options->socket_path = argument;
        break;
    case DEVICE_OPTION_ONCE:
        options->once = true;
        break;
    case DEVICE_OPTION_MESSAGES_ONLY:
        options->messages_only = true;
        break;
    case DEVICE_OPTION_MUTE:
        options->mute = true;
        break;
    case DEVICE_OPTION_NO_UNMAP_REPLY:
        options->no_unmap_reply = true;
        break;
    default:
        break;
    }
}

void device_usage_error(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

uint64_t device_number(const char *option, const char *text, uint64_t max)
{
    static const char units[] = "KMG";
    char *end;
    unsigned shift = 0;
    uint64_t value;
    const char *unit;

    errno = 0;
    value = strtoull(text, &end, 0);
    if (*end != '\0' && end[1] == '\0' && (unit = strchr(units, toupper((unsigned char)*end))) != NULL) {
        shift = 10u * (unsigned)(unit - units + 1);
        end++;
    }
    if (!isdigit((unsigned char)text[0]) || errno != 0 || *end != '\0' || value > max >> shift)
        device_usage_error("%s %s: a number from 0 to %" PRIu64 ", with K, M or G if wanted", option, text, max);
    return value << shift;
}

void device_event(const char *event, const char *members_format, ...)
{
    va_list arguments;

    printf("{\"event\":\"%s\"", event);
    va_start(arguments, members_format);
    if (*members_format != '\0') {
        putchar(',');
        vprintf(members_format, arguments);
    }
    va_end(arguments);
    puts("}");
    fflush(stdout);
}

int device_run(struct vfu_server *server, const struct vfu_options *options, void (*summary)(void *device),
               void *device)
{
    struct vfu_counters counters;
    struct dma_account account;
    int error;

    device_event("ready", "\"socket\":\"%s\"", options->socket_path);
    error = vfu_server_run(server);
    if (error != 0)
        fprintf(stderr, "%s: %s\n", options->socket_path, strerror(-error));
    counters = vfu_server_counters(server);
    account = dma_table_account(vfu_server_dma(server));
    printf("{\"event\":\"summary\",");
    summary(device);
    printf(",\"reachable_peak_bytes\":%" PRIu64 ",\"in_use_peak_bytes\":%" PRIu64 ",\"touched_bytes\":%" PRIu64 ",\"mappings_peak\":%" PRIu64
           ",\"clients\":%" PRIu64 ",\"requests\":%" PRIu64 ",\"maps\":%" PRIu64 ",\"unmaps\":%" PRIu64
           ",\"dma_read_messages\":%" PRIu64 ",\"dma_write_messages\":%" PRIu64 ",\"dma_refused\":%" PRIu64
           ",\"interrupts\":%" PRIu64 "}\n",
           account.reachable_peak, account.in_use_peak, account.touched, account.mappings_peak, counters.clients, counters.requests,
           counters.maps, counters.unmaps, counters.dma_read_messages, counters.dma_write_messages,
           counters.dma_refused, counters.interrupts);
    fflush(stdout);
    vfu_server_free(server);
    return error == 0 ? 0 : 1;
}
