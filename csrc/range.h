/* Ranges with both ends included. */
#ifndef VIOMMU_RANGE_H
#define VIOMMU_RANGE_H

#include <stdbool.h>
#include <stdint.h>

static inline bool ranges_overlap(uint64_t first, uint64_t last, uint64_t other_first, uint64_t other_last)
{
    return first <= other_last && other_first <= last;
}

#endif
