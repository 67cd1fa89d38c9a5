"""Topologies for tests, from what a configuration would say."""

from __future__ import annotations

from typing import Any

from viommud.schema import convert
from viommud.topology.model import Ids, Topology
from viommud.topology.section import TopologySection


def topology(
    endpoints: list[tuple[int, int]] | None = None, *, machine: str = "virt", iommu: str = "00:01.0", **section: Any
) -> Topology:
    """The topology of [topology] with these keys (underscores for dashes), and of these endpoint IDs."""
    keys = {name.replace("_", "-"): value for name, value in section.items()}
    parsed = convert({"machine": machine, "iommu": iommu, **keys}, TopologySection)
    return Topology.build(parsed, [Ids(*ids) for ids in endpoints or []])


TWO_SEGMENTS = [{"segment": 0}, {"segment": 1}]
"""Two host bridges whose functions have the IDs segment<<16 | requester ID."""
