"""What a guest is told about the devices behind the IOMMU, read back by readers that know the layouts only."""
