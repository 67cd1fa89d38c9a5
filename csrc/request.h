/*
 * Requests on the wire: a chain from the request queue becomes a call of the iommu, and the answer is written back.
 * Sizes and offsets differ between the ages of the specification; each personality is one row of a table.
 */
#ifndef VIOMMU_REQUEST_H
#define VIOMMU_REQUEST_H

#include <stdint.h>

#include "iommu.h"
#include "virtqueue.h"

/* What was asked and answered, for counters and records. */
struct request_outcome {
    uint8_t type;      /* 0 when it is not a known one */
    uint8_t status;    /* enum status, or VIOMMU_STATUS_UNANSWERED */
    uint32_t domain;
    uint32_t endpoint;
    uint32_t flags;
    uint64_t first;
    uint64_t last;
};

/*
 * Serve one request and write its answer. Returns the used length: all of the writable part, or 0 for a buffer that
 * is left as it was (too short, or of a type that is not known). -EFAULT when guest memory went away in between.
 */
int64_t request_serve(struct iommu *iommu, const struct guest_memory *memory, const struct chain *chain,
                      struct request_outcome *outcome);

/* Bytes of a fault report in a personality, and the report itself. */
uint32_t fault_report_bytes(uint32_t personality);
void fault_report_encode(uint32_t personality, uint32_t reason, uint32_t flags, uint32_t endpoint, uint64_t address,
                         uint8_t *out);
#define FAULT_REPORT_MAX 24u

#endif
