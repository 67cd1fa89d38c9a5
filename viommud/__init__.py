"""viommud: a virtual machine's IOMMU from outside the machine monitor."""
