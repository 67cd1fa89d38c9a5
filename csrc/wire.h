/* Numbers of the virtio-iommu wire format (virtio 1.3 section 5.13; linux/virtio_iommu.h). */
#ifndef VIOMMU_WIRE_H
#define VIOMMU_WIRE_H

#define VIRTIO_IOMMU_F_INPUT_RANGE (1ull << 0)
#define VIRTIO_IOMMU_F_DOMAIN_RANGE (1ull << 1)
#define VIRTIO_IOMMU_F_MAP_UNMAP (1ull << 2)
#define VIRTIO_IOMMU_F_BYPASS (1ull << 3)
#define VIRTIO_IOMMU_F_PROBE (1ull << 4)
#define VIRTIO_IOMMU_F_MMIO (1ull << 5)
#define VIRTIO_IOMMU_F_BYPASS_CONFIG (1ull << 6)

enum request_type {
    REQUEST_ATTACH = 1,
    REQUEST_DETACH = 2,
    REQUEST_MAP = 3,
    REQUEST_UNMAP = 4,
    REQUEST_PROBE = 5,
};

enum status {
    STATUS_OK = 0,
    STATUS_IOERR = 1,
    STATUS_UNSUPP = 2,
    STATUS_DEVERR = 3,
    STATUS_INVAL = 4,
    STATUS_RANGE = 5,
    STATUS_NOENT = 6,
    STATUS_FAULT = 7,
    STATUS_NOMEM = 8,
};

#define ATTACH_FLAG_BYPASS 1u

#define MAP_FLAG_READ 1u
#define MAP_FLAG_WRITE 2u
#define MAP_FLAG_MMIO 4u

#define PROBE_TYPE_RESV_MEM 1u
#define RESV_MEM_BYTES 24u /* header and value */

enum fault_reason {
    FAULT_UNKNOWN = 0,
    FAULT_DOMAIN = 1,
    FAULT_MAPPING = 2,
};
#define FAULT_FLAG_READ 1u
#define FAULT_FLAG_WRITE 2u
#define FAULT_FLAG_ADDRESS 0x100u

#endif
