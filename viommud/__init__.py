"""viommud: a virtual machine's IOMMU from outside the machine monitor."""

__version__ = "0.1.0"
