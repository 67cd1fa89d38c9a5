/* What happened in the worker, for the control plane: a bounded ring, one writer, one reader, an eventfd. */
#ifndef VIOMMU_RECORDS_H
#define VIOMMU_RECORDS_H

#include <stddef.h>
#include <stdint.h>

#include "viommu.h"

struct records;

struct records *records_new(void);
void records_free(struct records *records);
int records_fd(const struct records *records);

/* Worker. Drops the record, counted, when the ring is full. Writes the eventfd only when the reader waits for it. */
void records_put(struct records *records, const struct viommu_record *record);

/* Reader. *lost is what was dropped since the call before. When fewer than max come back, the reader waits again. */
size_t records_take(struct records *records, struct viommu_record *out, size_t max, uint64_t *lost);

#endif
