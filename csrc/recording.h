/*
 * The requests of a guest as they came, for bug reports and benchmarks: a bounded ring, one writer, one reader. What
 * does not fit is counted, and the count stands in the stream where the gap is.
 */
#ifndef VIOMMU_RECORDING_H
#define VIOMMU_RECORDING_H

#include <stddef.h>
#include <stdint.h>

#include "viommu.h"

struct recording;

struct recording *recording_new(void);
void recording_free(struct recording *recording);

/* Writer: the worker, or the control plane while the worker is parked. entry->time_ns and ->lost are filled in. */
void recording_put(struct recording *recording, struct viommu_recorded *entry);

/* Reader: up to max entries, oldest first. *lost: dropped after the newest that was ever taken, so far. */
size_t recording_take(struct recording *recording, struct viommu_recorded *out, size_t max, uint64_t *lost);

#endif
