#include "pci_config.h"

#include <errno.h>
#include <linux/pci_regs.h>
#include <string.h>

#include "le.h"

#define EXPRESS_AT 0x40u
#define EXPRESS_SIZE 0x3cu
#define MSIX_AT 0x80u

static void add_express(struct pci_config *config)
{
    uint8_t *cap = config->space + EXPRESS_AT;

    config->express = EXPRESS_AT;
    cap[0] = PCI_CAP_ID_EXP;
    le16_put(cap + PCI_EXP_FLAGS, 2 | (PCI_EXP_TYPE_ENDPOINT << 4)); /* version 2 */
    le32_put(cap + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_RBER | PCI_EXP_DEVCAP_FLR);
    le32_put(cap + PCI_EXP_LNKCAP, 0x11); /* 2.5 GT/s, one lane */
    le16_put(cap + PCI_EXP_LNKSTA, 0x11);
    /* The reset bit reads as 0, so it is not among the writable ones. */
    le16_put(config->writable + EXPRESS_AT + PCI_EXP_DEVCTL, 0x7fff);
}

static void add_msix(struct pci_config *config, const struct pci_identity *identity)
{
    uint8_t *cap = config->space + MSIX_AT;

    cap[0] = PCI_CAP_ID_MSIX;
    config->space[EXPRESS_AT + 1] = MSIX_AT;
    le16_put(cap + PCI_MSIX_FLAGS, (uint16_t)(identity->vectors - 1));
    le32_put(cap + PCI_MSIX_TABLE, identity->msix_table); /* low three bits: BAR 0 */
    le32_put(cap + PCI_MSIX_PBA, identity->msix_pba);
    le16_put(config->writable + MSIX_AT + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL);
}

void pci_config_init(struct pci_config *config, const struct pci_identity *identity)
{
    uint8_t *space = config->space;
    uint64_t bar_mask = ~(identity->bar_size - 1);

    memset(config, 0, sizeof(*config));
    le16_put(space + PCI_VENDOR_ID, identity->vendor);
    le16_put(space + PCI_DEVICE_ID, identity->device);
    le16_put(space + PCI_STATUS, PCI_STATUS_CAP_LIST);
    space[PCI_REVISION_ID] = 1;
    space[PCI_CLASS_PROG] = (uint8_t)identity->class_code;
    le16_put(space + PCI_CLASS_DEVICE, (uint16_t)(identity->class_code >> 8));
    le32_put(space + PCI_BASE_ADDRESS_0, PCI_BASE_ADDRESS_MEM_TYPE_64);
    le16_put(space + PCI_SUBSYSTEM_VENDOR_ID, identity->vendor);
    le16_put(space + PCI_SUBSYSTEM_ID, identity->device);
    space[PCI_CAPABILITY_LIST] = EXPRESS_AT;
    space[PCI_INTERRUPT_PIN] = 1;

    le16_put(config->writable + PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
                                                 PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
    config->writable[PCI_CACHE_LINE_SIZE] = 0xff;
    config->writable[PCI_INTERRUPT_LINE] = 0xff;
    le64_put(config->writable + PCI_BASE_ADDRESS_0, bar_mask);
    add_express(config);
    if (identity->vectors > 0)
        add_msix(config, identity);
    memcpy(config->initial, config->space, sizeof(config->initial));
}

void pci_config_reset(struct pci_config *config)
{
    memcpy(config->space, config->initial, sizeof(config->space));
}

static bool inside(uint64_t offset, size_t length)
{
    return offset <= PCI_CONFIG_SIZE && length <= PCI_CONFIG_SIZE - offset;
}

int pci_config_read(const struct pci_config *config, uint64_t offset, void *data, size_t length)
{
    if (!inside(offset, length))
        return -EINVAL;
    memcpy(data, config->space + offset, length);
    return 0;
}

int pci_config_write(struct pci_config *config, uint64_t offset, const void *data, size_t length, bool *reset)
{
    const uint8_t *bytes = data;
    size_t reset_byte = config->express + PCI_EXP_DEVCTL + 1;

    *reset = false;
    if (!inside(offset, length))
        return -EINVAL;
    for (size_t i = 0; i < length; i++) {
        uint8_t mask = config->writable[offset + i];
        uint8_t *byte = &config->space[offset + i];

        *byte = (uint8_t)((*byte & ~mask) | (bytes[i] & mask));
        if (offset + i == reset_byte && (bytes[i] & (PCI_EXP_DEVCTL_BCR_FLR >> 8)) != 0)
            *reset = true;
    }
    return 0;
}

bool pci_config_bus_master(const struct pci_config *config)
{
    return (config->space[PCI_COMMAND] & PCI_COMMAND_MASTER) != 0;
}
