"""What a device tree or an ACPI table, wherever it came from, says about IOMMUs and the devices behind them."""

from __future__ import annotations

from dataclasses import dataclass

from viommud.topology.model import PciRange, PlatformEndpoint
from viommud.topology.place import Place


@dataclass(frozen=True, slots=True)
class Described:
    """Endpoints, and the IOMMU that translates for them."""

    endpoint: PciRange | PlatformEndpoint
    iommu: Place


@dataclass(frozen=True, slots=True)
class Description:
    """Every IOMMU and every endpoint found, in the order of the source; nothing is checked."""

    iommus: tuple[Place, ...]
    endpoints: tuple[Described, ...]
