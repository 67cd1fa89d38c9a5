/*
 * The configuration space of a PCI function: a type 0 header with one 64-bit memory BAR, PCI Express (for function
 * level reset) and MSI-X. Which bits a write may change is a mask, byte by byte, as in hardware.
 */
#ifndef PCI_CONFIG_H
#define PCI_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PCI_CONFIG_SIZE 256u

struct pci_identity {
    uint16_t vendor;
    uint16_t device;
    uint32_t class_code; /* 24 bits: class, subclass, programming interface */
    uint64_t bar_size;   /* of BAR 0; a power of two */
    unsigned vectors;    /* of MSI-X; 0: no such capability */
    uint32_t msix_table; /* offsets in BAR 0 */
    uint32_t msix_pba;
};

struct pci_config {
    uint8_t space[PCI_CONFIG_SIZE];
    uint8_t writable[PCI_CONFIG_SIZE];
    uint8_t initial[PCI_CONFIG_SIZE];
    size_t express; /* offset of the PCI Express capability */
};

void pci_config_init(struct pci_config *config, const struct pci_identity *identity);
/* Every register as after power on. */
void pci_config_reset(struct pci_config *config);

/* Both return 0 or -EINVAL when the range is not inside the space. */
int pci_config_read(const struct pci_config *config, uint64_t offset, void *data, size_t length);
/* *reset tells that the write asked for a function level reset, which is the caller's to do. */
int pci_config_write(struct pci_config *config, uint64_t offset, const void *data, size_t length, bool *reset);

/* The function may access memory: COMMAND has Bus Master Enable. */
bool pci_config_bus_master(const struct pci_config *config);

#endif
