/*
 * The vfio-user protocol on the wire, as QEMU 11.1 speaks it (docs/interop/vfio-user.rst; hw/vfio-user/protocol.h).
 * Offsets and sizes in bytes; every field is little-endian.
 */
#ifndef VFIO_USER_H
#define VFIO_USER_H

/* Header: u16 id, u16 command, u32 size (with the header), u32 flags, u32 errno. */
#define VFU_HEADER_SIZE 16u
#define VFU_MAX_FDS 16u
#define VFU_MAX_TRANSFER (1u << 20) /* data of one message; both sides announce it in VERSION */
#define VFU_MAX_MESSAGE (VFU_MAX_TRANSFER + 4096u)

enum vfu_command {
    VFU_VERSION = 1,
    VFU_DMA_MAP = 2,
    VFU_DMA_UNMAP = 3,
    VFU_DEVICE_GET_INFO = 4,
    VFU_DEVICE_GET_REGION_INFO = 5,
    VFU_DEVICE_GET_IRQ_INFO = 7,
    VFU_DEVICE_SET_IRQS = 8,
    VFU_REGION_READ = 9,
    VFU_REGION_WRITE = 10,
    VFU_DMA_READ = 11,
    VFU_DMA_WRITE = 12,
    VFU_DEVICE_RESET = 13,
};

enum vfu_flags {
    VFU_TYPE_MASK = 0xf,
    VFU_TYPE_REQUEST = 0x0,
    VFU_TYPE_REPLY = 0x1,
    VFU_NO_REPLY = 0x10,
    VFU_ERROR = 0x20,
};

/* Payloads before any data of variable length. */
#define VFU_VERSION_SIZE 4u      /* u16 major, u16 minor, then JSON with a terminating NUL */
#define VFU_DMA_MAP_SIZE 32u     /* u32 argsz, flags; u64 offset, iova, size */
#define VFU_DMA_UNMAP_SIZE 24u   /* u32 argsz, flags; u64 iova, size */
#define VFU_DEVICE_INFO_SIZE 16u /* u32 argsz, flags, regions, irqs */
#define VFU_REGION_INFO_SIZE 32u /* u32 argsz, flags, index, cap offset; u64 size, offset */
#define VFU_IRQ_INFO_SIZE 16u    /* u32 argsz, flags, index, count */
#define VFU_SET_IRQS_SIZE 20u    /* u32 argsz, flags, index, start, count, then data */
#define VFU_REGION_IO_SIZE 16u   /* u64 offset; u32 region, count, then data */
#define VFU_DMA_IO_SIZE 16u      /* u64 address, count, then data */

#define VFU_DMA_READABLE 1u /* flags of DMA_MAP: what the device may do */
#define VFU_DMA_WRITABLE 2u
#define VFU_DMA_UNMAP_ALL 2u /* flag of DMA_UNMAP: everything, iova and size are 0 */

#endif
