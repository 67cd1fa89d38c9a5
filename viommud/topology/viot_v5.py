"""The Virtual I/O Table of the draft of November 2019: a table around an IORT with two more node types.

It has the signature of the final VIOT and nothing else of it.  Source: the patch "ACPI: Add VIOT table" of 22 November
2019 to Linux include/acpi/actbl2.h and those to drivers/acpi/iort.c of the same series.
"""

from __future__ import annotations

import struct

from viommud.topology import acpi, iort
from viommud.topology.model import Topology
from viommud.topology.place import PciPlace, Place

SIGNATURE = b"VIOT"
TYPE_IOMMU_PCI, TYPE_IOMMU_MMIO = 0x80, 0x81
FLAG_COHERENT = 1

_RESERVED = 12
"""Bytes between the outer header and the table inside."""
_IOMMU_PCI = struct.Struct("<I")
"""segment<<16 | requester ID"""
_IOMMU_MMIO = struct.Struct("<QQQQ")
"""base address, span, flags, interrupt"""


def render(topology: Topology) -> bytes:
    """The table.

    :raises TopologyError: the IOMMU's MMIO window has no interrupt, or a platform endpoint no ACPI path.
    """
    nodes = iort.Nodes()
    kind, data = _iommu(topology.iommu)
    iort.add_endpoints(nodes, topology, nodes.add(kind, 0, data), None)
    return acpi.table(SIGNATURE, 1, bytes(_RESERVED) + nodes.table())


def _iommu(place: Place) -> tuple[int, bytes]:
    if isinstance(place, PciPlace):
        return TYPE_IOMMU_PCI, _IOMMU_PCI.pack(place.segment << 16 | place.rid)
    interrupt = iort.interrupt_of(place.interrupt, "VIOT of 2019")
    return TYPE_IOMMU_MMIO, _IOMMU_MMIO.pack(place.base, place.span, FLAG_COHERENT, interrupt)
