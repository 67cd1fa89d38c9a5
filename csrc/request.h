/*
 * Requests on the wire: a chain from the request queue becomes a call of the iommu, and the answer is written back.
 * Sizes and offsets differ between the ages of the specification; each personality is one row of a table.
 */
#ifndef VIOMMU_REQUEST_H
#define VIOMMU_REQUEST_H

#include <stdint.h>

#include "inject.h"
#include "iommu.h"
#include "recording.h"
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
    uint32_t injected; /* VIOMMU_INJECT_*, 0 as a rule */
    uint64_t delay_ns; /* with VIOMMU_INJECT_DELAY */
};

/* What disturbs and what watches requests; each NULL unless somebody asked for it. */
struct request_taps {
    struct inject *inject;
    struct recording *recording;
};

/*
 * Serve one request and write its answer. Returns the used length: all of the writable part, or 0 for a buffer that
 * is left as it was (too short, or of a type that is not known). -EFAULT when guest memory went away in between.
 */
int64_t request_serve(struct iommu *iommu, const struct guest_memory *memory, const struct chain *chain,
                      struct request_outcome *outcome);

/*
 * The same, with taps. What an outcome says was injected is for the caller to do, but for VIOMMU_INJECT_STATUS, which
 * is done. A dropped answer is not written; the length returned then means nothing.
 */
int64_t request_serve_tapped(struct iommu *iommu, const struct guest_memory *memory, const struct chain *chain,
                             const struct request_taps *taps, struct request_outcome *outcome);

/* Bytes of a fault report in a personality, and the report itself. */
uint32_t fault_report_bytes(uint32_t personality);
void fault_report_encode(uint32_t personality, uint32_t reason, uint32_t flags, uint32_t endpoint, uint64_t address,
                         uint8_t *out);
#define FAULT_REPORT_MAX 24u

#endif
