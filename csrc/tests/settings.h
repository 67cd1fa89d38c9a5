/* Settings that tests start from: every feature, 4 KiB pages, limits far away. */
#ifndef VIOMMU_TESTS_SETTINGS_H
#define VIOMMU_TESTS_SETTINGS_H

#include "viommu.h"
#include "virtqueue.h"
#include "wire.h"

#define TEST_FEATURES                                                                                       \
    (VIRTIO_IOMMU_F_INPUT_RANGE | VIRTIO_IOMMU_F_DOMAIN_RANGE | VIRTIO_IOMMU_F_MAP_UNMAP | VIRTIO_IOMMU_F_PROBE | \
     VIRTIO_IOMMU_F_MMIO | VIRTIO_IOMMU_F_BYPASS_CONFIG | VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC |     \
     VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_RING_PACKED | VIRTIO_F_IN_ORDER)

static inline struct viommu_settings test_settings(void)
{
    return (struct viommu_settings){
        .features = TEST_FEATURES,
        .page_size_mask = ~0xfffull,
        .input_first = 0,
        .input_last = UINT64_MAX,
        .domain_first = 0,
        .domain_last = UINT32_MAX,
        .probe_size = 512,
        .personality = VIOMMU_PERSONALITY_1_X,
        .bypass = 0,
        .max_endpoints = 1024,
        .max_domains = 1024,
        .max_faults = 64,
        .max_mappings = 1u << 20,
        .max_domain_mappings = 1u << 20,
        .fault_wait_ms = 60000,
        .fault_burst = 1000000,
        .fault_rate = 1000000,
        .spin_us = 0,
    };
}

#endif
