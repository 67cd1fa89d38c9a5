#include "vfio_user_message.h"

#define ALL_FLAGS (VFIO_USER_TYPE_MASK | VFIO_USER_NO_REPLY | VFIO_USER_ERROR)

_Static_assert(sizeof(struct vfio_user_header) == 16, "header");
_Static_assert(sizeof(struct vfio_user_dma_map) == 48, "DMA_MAP");
_Static_assert(sizeof(struct vfio_user_dma_unmap) == 40, "DMA_UNMAP");
_Static_assert(sizeof(struct vfio_user_dma_access) == 32, "DMA_READ and DMA_WRITE");

static const struct vfio_user_rule rules[] = {
    [VFIO_USER_DMA_MAP] = {.request_fds = true, .posted = true},
    [VFIO_USER_DMA_UNMAP] = {.posted = true},
    [VFIO_USER_DEVICE_GET_INFO] = {.forward = true},
    [VFIO_USER_DEVICE_GET_REGION_INFO] = {.forward = true, .reply_fds = true},
    [VFIO_USER_DEVICE_GET_REGION_IO_FDS] = {.forward = true, .reply_fds = true},
    [VFIO_USER_DEVICE_GET_IRQ_INFO] = {.forward = true},
    [VFIO_USER_DEVICE_SET_IRQS] = {.forward = true, .request_fds = true},
    [VFIO_USER_REGION_READ] = {.forward = true},
    [VFIO_USER_REGION_WRITE] = {.forward = true, .posted = true},
    [VFIO_USER_DEVICE_RESET] = {.forward = true},
    [VFIO_USER_REGION_WRITE_MULTI] = {.forward = true, .posted = true},
};

const struct vfio_user_rule *vfio_user_rule(uint16_t command)
{
    static const struct vfio_user_rule nothing;

    return command < sizeof(rules) / sizeof(rules[0]) ? &rules[command] : &nothing;
}

bool vfio_user_header_valid(const struct vfio_user_header *header, size_t max)
{
    if (header->size < sizeof(*header) || header->size > max || (header->flags & ~ALL_FLAGS) != 0)
        return false;
    switch (header->flags & VFIO_USER_TYPE_MASK) {
    case VFIO_USER_REQUEST:
        return (header->flags & VFIO_USER_ERROR) == 0;
    case VFIO_USER_REPLY:
        return (header->flags & VFIO_USER_NO_REPLY) == 0;
    default:
        return false;
    }
}

struct vfio_user_header vfio_user_reply_to(const struct vfio_user_header *request, size_t size, int error)
{
    return (struct vfio_user_header){
        .id = request->id,
        .command = request->command,
        .size = (uint32_t)size,
        .flags = VFIO_USER_REPLY | (error != 0 ? VFIO_USER_ERROR : 0),
        .error = (uint32_t)error,
    };
}
