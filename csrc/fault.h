/*
 * Fault reports on their way to the guest. Any thread raises them; the worker alone takes them. Memory is constant:
 * a fixed number waits, and no endpoint may raise more than its rate, so that a storm of one device does not drown
 * the reports of another.
 */
#ifndef VIOMMU_FAULT_H
#define VIOMMU_FAULT_H

#include <stdbool.h>
#include <stdint.h>

#include "viommu.h"

struct fault {
    uint32_t endpoint;
    uint32_t reason;
    uint32_t flags;
    uint64_t address;
    uint64_t raised_ns; /* CLOCK_MONOTONIC */
};

struct fault_queue;

struct fault_queue *fault_queue_new(const struct viommu_settings *settings);
void fault_queue_free(struct fault_queue *queue);

/*
 * 0; -ENOSPC when too many wait (some perhaps too long: the worker finds out when it is woken), -ENOBUFS when the
 * endpoint is over its rate. What is not queued is counted as dropped. Any thread.
 */
int fault_raise(struct fault_queue *queue, const struct fault *fault);

/* Worker: the oldest report that is not too old; false when none waits. It stays until fault_done(). */
bool fault_peek(struct fault_queue *queue, uint64_t now_ns, struct fault *out);
void fault_done(struct fault_queue *queue);
bool fault_waiting(const struct fault_queue *queue);

/* Forget all that wait and what each endpoint has raised (device reset; the worker is parked). */
void fault_clear(struct fault_queue *queue);

uint64_t fault_dropped(const struct fault_queue *queue);
/* Reports an endpoint has raised since the latest reset, dropped ones included. */
uint64_t fault_count(struct fault_queue *queue, uint32_t endpoint);

#endif
