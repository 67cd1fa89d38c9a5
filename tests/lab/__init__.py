"""The lab: an arm64 host of virtual machines in a box, with an IOMMU and devices behind it (see scripts/lab)."""
