#include "irqs.h"

#include <errno.h>
#include <linux/vfio.h>
#include <unistd.h>

void irqs_init(struct irqs *irqs, unsigned vectors)
{
    *irqs = (struct irqs){.vectors = vectors < IRQS_MAX_VECTORS ? vectors : IRQS_MAX_VECTORS, .intx = -1};
    for (unsigned i = 0; i < IRQS_MAX_VECTORS; i++)
        irqs->msix[i] = -1;
}

static void replace(int *slot, int fd)
{
    if (*slot >= 0)
        close(*slot);
    *slot = fd;
}

void irqs_clear(struct irqs *irqs)
{
    for (unsigned i = 0; i < IRQS_MAX_VECTORS; i++)
        replace(&irqs->msix[i], -1);
    replace(&irqs->intx, -1);
    irqs->intx_level = false;
    irqs->intx_masked = false;
}

static void signal_fd(struct irqs *irqs, int fd)
{
    const uint64_t one = 1;

    /* A full counter or a descriptor that is no eventfd is the client's loss. */
    if (fd >= 0 && write(fd, &one, sizeof(one)) == (ssize_t)sizeof(one))
        irqs->sent++;
}

/* The eventfds of an index, and how many there are. */
static int *line_of(struct irqs *irqs, uint32_t index, uint32_t *count)
{
    *count = index == VFIO_PCI_INTX_IRQ_INDEX ? 1 : index == VFIO_PCI_MSIX_IRQ_INDEX ? irqs->vectors : 0;
    return index == VFIO_PCI_INTX_IRQ_INDEX ? &irqs->intx : irqs->msix;
}

int irqs_info(const struct irqs *irqs, uint32_t index, uint32_t *flags, uint32_t *count)
{
    *flags = 0;
    *count = 0;
    if (index >= VFIO_PCI_NUM_IRQS)
        return -EINVAL;
    if (index == VFIO_PCI_INTX_IRQ_INDEX) {
        *flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
        *count = 1;
    } else if (index == VFIO_PCI_MSIX_IRQ_INDEX && irqs->vectors > 0) {
        *flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;
        *count = irqs->vectors;
    }
    return 0;
}

static void deliver_intx(struct irqs *irqs)
{
    if (irqs->intx_level && !irqs->intx_masked && irqs->intx >= 0) {
        irqs->intx_masked = true;
        signal_fd(irqs, irqs->intx);
    }
}

int irqs_set(struct irqs *irqs, uint32_t flags, uint32_t index, uint32_t start, uint32_t count, const uint8_t *data,
             size_t length, const int *fds, size_t fd_count, size_t *fds_used)
{
    uint32_t available;
    uint32_t kind = flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
    int *line = line_of(irqs, index, &available);

    *fds_used = 0;
    if (index >= VFIO_PCI_NUM_IRQS || start > available || count > available - start)
        return -EINVAL;
    if ((flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) != VFIO_IRQ_SET_ACTION_TRIGGER) {
        if (index != VFIO_PCI_INTX_IRQ_INDEX || kind != VFIO_IRQ_SET_DATA_NONE || fd_count != 0)
            return -EINVAL;
        irqs->intx_masked = (flags & VFIO_IRQ_SET_ACTION_MASK) != 0;
        deliver_intx(irqs);
        return 0;
    }
    switch (kind) {
    case VFIO_IRQ_SET_DATA_EVENTFD:
        /* With no descriptor at all the vectors lose theirs. */
        if (fd_count != 0 && fd_count != count)
            return -EINVAL;
        for (uint32_t i = 0; i < count; i++)
            replace(&line[start + i], fd_count == 0 ? -1 : fds[i]);
        *fds_used = fd_count;
        if (index == VFIO_PCI_INTX_IRQ_INDEX) {
            irqs->intx_masked = false;
            deliver_intx(irqs);
        }
        return 0;
    case VFIO_IRQ_SET_DATA_NONE:
        if (fd_count != 0)
            return -EINVAL;
        if (count == 0) /* disable the whole index */
            for (uint32_t i = 0; i < available; i++)
                replace(&line[i], -1);
        for (uint32_t i = 0; i < count; i++) /* fire, for a test of the path */
            signal_fd(irqs, line[start + i]);
        return 0;
    case VFIO_IRQ_SET_DATA_BOOL:
        if (fd_count != 0 || length < count)
            return -EINVAL;
        for (uint32_t i = 0; i < count; i++)
            if (data[i] != 0)
                signal_fd(irqs, line[start + i]);
        return 0;
    default:
        return -EINVAL;
    }
}

bool irqs_msix_enabled(const struct irqs *irqs)
{
    for (unsigned i = 0; i < irqs->vectors; i++)
        if (irqs->msix[i] >= 0)
            return true;
    return false;
}

void irqs_send_msix(struct irqs *irqs, unsigned vector)
{
    if (vector < irqs->vectors)
        signal_fd(irqs, irqs->msix[vector]);
}

void irqs_set_intx(struct irqs *irqs, bool level)
{
    irqs->intx_level = level;
    deliver_intx(irqs);
}
