/*
 * The part of the kernel's interface for assigned devices that viommud uses: VFIO's device ioctls, VFIO type1 and
 * iommufd. Own definitions, since the headers of a build host may be older than the kernel that runs.
 *
 * Sources: include/uapi/linux/vfio.h and include/uapi/linux/iommufd.h of Linux 7.2. Neither encodes size or direction
 * in a request's number; every structure begins with its size. Padding is spelled out: it must be zero.
 */
#ifndef VIOMMU_IOMMUFD_UAPI_H
#define VIOMMU_IOMMUFD_UAPI_H

#include <stdint.h>

#define HOST_IOMMU_IOCTL(number) (0x3b00ul | (number)) /* both are of type ';' */

/* A VFIO device */
#define HOST_VFIO_DEVICE_BIND HOST_IOMMU_IOCTL(118)
#define HOST_VFIO_DEVICE_ATTACH HOST_IOMMU_IOCTL(119)
#define HOST_VFIO_DEVICE_DETACH HOST_IOMMU_IOCTL(120)

struct host_vfio_bind {
    uint32_t argsz;
    uint32_t flags;
    int32_t iommufd;
    uint32_t device_id; /* out */
};

struct host_vfio_attach {
    uint32_t argsz;
    uint32_t flags;
    uint32_t page_table; /* in: an IOAS or HWPT; out: the HWPT that was attached */
};

struct host_vfio_detach {
    uint32_t argsz;
    uint32_t flags;
};

/* A VFIO container with the type1 IOMMU */
#define HOST_VFIO_IOMMU_GET_INFO HOST_IOMMU_IOCTL(112)
#define HOST_VFIO_IOMMU_MAP HOST_IOMMU_IOCTL(113)
#define HOST_VFIO_IOMMU_UNMAP HOST_IOMMU_IOCTL(114)

#define HOST_VFIO_MAP_READ 1u
#define HOST_VFIO_MAP_WRITE 2u
#define HOST_VFIO_UNMAP_ALL 2u

struct host_vfio_map {
    uint32_t argsz;
    uint32_t flags;
    uint64_t vaddr;
    uint64_t iova;
    uint64_t size;
};

struct host_vfio_unmap {
    uint32_t argsz;
    uint32_t flags;
    uint64_t iova;
    uint64_t size; /* out: bytes that were unmapped */
};

/* An iommufd */
#define HOST_IOMMU_DESTROY HOST_IOMMU_IOCTL(0x80)
#define HOST_IOMMU_IOAS_ALLOC HOST_IOMMU_IOCTL(0x81)
#define HOST_IOMMU_IOAS_COPY HOST_IOMMU_IOCTL(0x83)
#define HOST_IOMMU_IOAS_IOVA_RANGES HOST_IOMMU_IOCTL(0x84)
#define HOST_IOMMU_IOAS_UNMAP HOST_IOMMU_IOCTL(0x86)
#define HOST_IOMMU_IOAS_MAP_FILE HOST_IOMMU_IOCTL(0x8f)

#define HOST_IOMMU_FIXED_IOVA 1u
#define HOST_IOMMU_WRITEABLE 2u
#define HOST_IOMMU_READABLE 4u

struct host_iommu_destroy {
    uint32_t size;
    uint32_t id;
};

struct host_iommu_ioas_alloc {
    uint32_t size;
    uint32_t flags;
    uint32_t id; /* out */
};

struct host_iommu_ioas_copy {
    uint32_t size;
    uint32_t flags;
    uint32_t to;
    uint32_t from;
    uint64_t length;
    uint64_t to_iova;
    uint64_t from_iova;
};

struct host_iommu_ioas_unmap {
    uint32_t size;
    uint32_t ioas;
    uint64_t iova;
    uint64_t length; /* out: bytes that were unmapped */
};

struct host_iommu_ioas_map_file {
    uint32_t size;
    uint32_t flags;
    uint32_t ioas;
    int32_t fd;
    uint64_t start;
    uint64_t length;
    uint64_t iova;
};

struct host_iommu_ioas_iova_ranges {
    uint32_t size;
    uint32_t ioas;
    uint32_t count; /* in: room; out: how many there are */
    uint32_t reserved;
    uint64_t ranges;
    uint64_t alignment; /* out */
};

_Static_assert(sizeof(struct host_vfio_bind) == 16 && sizeof(struct host_vfio_map) == 32 &&
                   sizeof(struct host_iommu_ioas_copy) == 40 && sizeof(struct host_iommu_ioas_map_file) == 40 &&
                   sizeof(struct host_iommu_ioas_iova_ranges) == 32,
               "the kernel's layouts");

#endif
