/*
 * The vfio-user protocol, version 0.0, as spoken by QEMU (hw/vfio-user/protocol.h) and libvfio-user (vfio-user.h):
 * what a message is, which ones there are, and what the two ends may put into them. Both ends are on one host and
 * use its byte order.
 */
#ifndef VIOMMU_VFIO_USER_MESSAGE_H
#define VIOMMU_VFIO_USER_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum vfio_user_command {
    VFIO_USER_VERSION = 1,
    VFIO_USER_DMA_MAP = 2,
    VFIO_USER_DMA_UNMAP = 3,
    VFIO_USER_DEVICE_GET_INFO = 4,
    VFIO_USER_DEVICE_GET_REGION_INFO = 5,
    VFIO_USER_DEVICE_GET_REGION_IO_FDS = 6,
    VFIO_USER_DEVICE_GET_IRQ_INFO = 7,
    VFIO_USER_DEVICE_SET_IRQS = 8,
    VFIO_USER_REGION_READ = 9,
    VFIO_USER_REGION_WRITE = 10,
    VFIO_USER_DMA_READ = 11,
    VFIO_USER_DMA_WRITE = 12,
    VFIO_USER_DEVICE_RESET = 13,
    VFIO_USER_REGION_WRITE_MULTI = 15,
};

#define VFIO_USER_TYPE_MASK 0xfu
#define VFIO_USER_REQUEST 0u
#define VFIO_USER_REPLY 1u
#define VFIO_USER_NO_REPLY 0x10u
#define VFIO_USER_ERROR 0x20u

struct vfio_user_header {
    uint16_t id;
    uint16_t command;
    uint32_t size;  /* of the whole message, this header included */
    uint32_t flags;
    uint32_t error; /* an errno, in a reply with the error flag */
};

#define VFIO_USER_DMA_READABLE 1u
#define VFIO_USER_DMA_WRITABLE 2u

struct vfio_user_dma_map {
    struct vfio_user_header header;
    uint32_t argsz;
    uint32_t flags;
    uint64_t offset; /* in the file that came along */
    uint64_t address;
    uint64_t size;
};

#define VFIO_USER_UNMAP_ALL 2u /* with address 0 and size 0 */

struct vfio_user_dma_unmap {
    struct vfio_user_header header;
    uint32_t argsz;
    uint32_t flags;
    uint64_t address;
    uint64_t size;
};

/* DMA_READ request; DMA_WRITE request (data follow); their replies (after DMA_READ, data follow). */
struct vfio_user_dma_access {
    struct vfio_user_header header;
    uint64_t address;
    uint64_t count;
};

/* The payload beside the data that a message can have at most, header included. */
#define VFIO_USER_OVERHEAD 64u

/* What the client may ask, and whether it is ours to pass on. */
struct vfio_user_rule {
    bool forward;     /* to the server; else viommud answers */
    bool request_fds; /* file descriptors may come with the request ... */
    bool reply_fds;   /* ... and with the reply */
    bool posted;      /* may ask for no reply */
};

/* Never NULL: a command that is not known may do nothing. */
const struct vfio_user_rule *vfio_user_rule(uint16_t command);

/* Whether a message can begin like this: size within [header, max] and flags that belong together. */
bool vfio_user_header_valid(const struct vfio_user_header *header, size_t max);

static inline bool vfio_user_is_reply(const struct vfio_user_header *header)
{
    return (header->flags & VFIO_USER_TYPE_MASK) == VFIO_USER_REPLY;
}

/* The header of a reply to this request; error is 0 or a positive errno. */
struct vfio_user_header vfio_user_reply_to(const struct vfio_user_header *request, size_t size, int error);

#endif
