"""Tests that need a host with KVM, iommufd and devices behind an IOMMU: they run in the lab (scripts/test host)."""
