"""How a guest learns which devices sit behind the IOMMU: one model, rendered for every way a platform can say it."""
