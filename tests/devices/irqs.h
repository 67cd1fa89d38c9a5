/*
 * The interrupts of a VFIO PCI device: one eventfd per INTx line and MSI-X vector, set by the client. INTx is a level
 * (linux/vfio.h, VFIO_IRQ_INFO_AUTOMASKED): signalled once when it rises, then masked until the client unmasks it, and
 * signalled again if it is still high.
 */
#ifndef IRQS_H
#define IRQS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IRQS_MAX_VECTORS 64u

struct irqs {
    unsigned vectors; /* of MSI-X; 0: the device has none */
    int msix[IRQS_MAX_VECTORS];
    int intx;
    bool intx_level;
    bool intx_masked;
    uint64_t sent;
};

void irqs_init(struct irqs *irqs, unsigned vectors);
/* Close every eventfd and drop the INTx line. */
void irqs_clear(struct irqs *irqs);

/* The answer to DEVICE_GET_IRQ_INFO: 0 or -EINVAL for an index VFIO PCI does not have. */
int irqs_info(const struct irqs *irqs, uint32_t index, uint32_t *flags, uint32_t *count);

/*
 * DEVICE_SET_IRQS. data of length bytes follows the fixed part; fds_used tells how many of fds were taken over (always
 * all or none). 0 or -EINVAL.
 */
int irqs_set(struct irqs *irqs, uint32_t flags, uint32_t index, uint32_t start, uint32_t count, const uint8_t *data,
             size_t length, const int *fds, size_t fd_count, size_t *fds_used);

/* True when the client uses MSI-X: some vector has an eventfd. */
bool irqs_msix_enabled(const struct irqs *irqs);
void irqs_send_msix(struct irqs *irqs, unsigned vector);
void irqs_set_intx(struct irqs *irqs, bool level);

#endif
