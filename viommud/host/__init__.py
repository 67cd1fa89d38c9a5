"""Devices of the host: finding them, what its IOMMU can do for them, and starting QEMU with them."""
