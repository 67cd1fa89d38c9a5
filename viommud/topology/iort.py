"""The I/O Remapping Table, IORT, with the paravirtual IOMMU node that drivers of 2017 and 2018 read.

Sources: Arm DEN 0049 for the table; the node (type 0x80, a private value that no released table uses) from the patches
of the time to Linux drivers/acpi/iort.c and include/acpi/actbl2.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from viommud.topology import acpi
from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint, Topology
from viommud.topology.place import MAX_RID, PciPlace, Place

SIGNATURE = b"IORT"

TYPE_ITS_GROUP, TYPE_NAMED_COMPONENT, TYPE_ROOT_COMPLEX, TYPE_PARAVIRTUAL_IOMMU = 0, 1, 2, 0x80
MODEL_MMIO, MODEL_PCI = 0, 1
FLAG_COHERENT = 1
MAPPING_SINGLE = 1
"""The mapping has one output for one device, whatever its input."""

HEADER = struct.Struct("<II4x")
"""node count, offset of the first node"""
NODE = struct.Struct("<BHBIII")
"""type, length, revision, identifier, number of mappings, offset of the mappings in the node"""
MAPPING = struct.Struct("<IIIII")
"""first input ID, number of IDs minus one, first output ID, offset of the output node in the table, flags"""
_IOMMU_MMIO = struct.Struct("<QQIIQ8x")
"""base address, span, model, flags, interrupt in the low and trigger in the high half"""
_IOMMU_PCI = struct.Struct("<I12xII16x")
"""segment<<16 | requester ID, model, flags"""
_ROOT_COMPLEX = struct.Struct("<IBHBIIB3x")
"""cache coherency, allocation hints, reserved, memory flags, ATS, segment, address size limit"""
_NAMED_COMPONENT = struct.Struct("<IIBHBB")
"""flags, cache coherency, allocation hints, reserved, memory flags, address size limit; the name follows"""

_COHERENT = 1
_CPM_AND_DACS = 3
_ADDRESS_BITS = 64
_FIRST_NODE = acpi.HEADER.size + HEADER.size
_MAX_NODE = 0xFFFF


@dataclass(frozen=True, slots=True)
class Mapping:
    """IDs that a node's devices present, and what they become at another node; both ends included."""

    first: int
    last: int
    output: int
    node: int
    """Offset of the other node from the table's start."""
    flags: int = 0

    def pack(self) -> bytes:
        """The mapping as the table has it."""
        return MAPPING.pack(self.first, self.last - self.first, self.output, self.node, self.flags)


class Nodes:
    """The nodes of a table in the making, each known by its offset from the table's start."""

    def __init__(self) -> None:
        self._images: list[bytes] = []
        self._end = _FIRST_NODE

    def add(self, kind: int, revision: int, data: bytes, mappings: Sequence[Mapping] = ()) -> int:
        """Append a node; returns its offset.

        :raises TopologyError: its length does not fit the table's 16 bits.
        """
        data += bytes(-(NODE.size + len(data)) % 4)
        at = NODE.size + len(data)
        length = at + len(mappings) * MAPPING.size
        if length > _MAX_NODE:
            raise TopologyError(
                f"IORT: {len(mappings)} ranges on one host bridge need {length} bytes; a node has {_MAX_NODE} at most",
                hint="list neighbouring endpoints as one range",
            )
        header = NODE.pack(kind, length, revision, len(self._images), len(mappings), at if mappings else 0)
        self._images.append(header + data + b"".join(mapping.pack() for mapping in mappings))
        offset = self._end
        self._end += length
        return offset

    def table(self) -> bytes:
        """The whole table."""
        return acpi.table(SIGNATURE, 0, HEADER.pack(len(self._images), _FIRST_NODE) + b"".join(self._images))


def render(topology: Topology, its: Sequence[int] = ()) -> bytes:
    """The table: the IOMMU, a root complex for every segment, a named component for every platform endpoint.

    :param its: identifiers of the platform's interrupt translation services (GIC ITS): message signalled interrupts go
        there from every function, through the IOMMU's node or straight, since this table replaces the platform's own.
    :raises TopologyError: the IOMMU's MMIO window has no interrupt, or a platform endpoint no ACPI path.
    """
    nodes = Nodes()
    group = nodes.add(TYPE_ITS_GROUP, 0, struct.pack(f"<I{len(its)}I", len(its), *its)) if its else None
    onwards = [] if group is None else [Mapping(0, 0xFFFF_FFFE, 0, group)]
    iommu = nodes.add(TYPE_PARAVIRTUAL_IOMMU, 0, _iommu(topology.iommu), onwards)
    add_endpoints(nodes, topology, iommu, group)
    return nodes.table()


def _iommu(place: Place) -> bytes:
    if isinstance(place, PciPlace):
        return _IOMMU_PCI.pack(place.segment << 16 | place.rid, MODEL_PCI, FLAG_COHERENT)
    return _IOMMU_MMIO.pack(place.base, place.span, MODEL_MMIO, FLAG_COHERENT, interrupt_of(place.interrupt, "IORT"))


def interrupt_of(interrupt: int | None, table: str) -> int:
    """The interrupt that the table must state."""
    if interrupt is None:
        raise TopologyError(f"{table}: an IOMMU on MMIO needs its interrupt; topology.interrupt is missing")
    return interrupt


def add_endpoints(nodes: Nodes, topology: Topology, iommu: int, group: int | None) -> None:
    """Append root complexes and named components whose listed endpoints go to the IOMMU node at this offset."""
    for segment in sorted({bridge.segment for bridge in topology.bridges}):
        listed = [part for part in topology.pci if part.segment == segment]
        mappings = [Mapping(part.first_rid, part.last_rid, part.first_id, iommu) for part in listed]
        if group is not None:
            mappings += [Mapping(first, last, segment << 16 | first, group) for first, last in _unlisted(listed)]
        mappings.sort(key=lambda mapping: mapping.first)
        data = _ROOT_COMPLEX.pack(_COHERENT, 0, 0, _CPM_AND_DACS, 0, segment, _ADDRESS_BITS)
        nodes.add(TYPE_ROOT_COMPLEX, 1, data, mappings)
    for endpoint in topology.platform:
        nodes.add(TYPE_NAMED_COMPONENT, 2, _named(endpoint), [Mapping(0, 0, endpoint.id, iommu, MAPPING_SINGLE)])


def _named(endpoint: PlatformEndpoint) -> bytes:
    if endpoint.acpi is None:
        raise TopologyError(
            f"IORT: the platform endpoint {endpoint.id:#x} needs its path in the ACPI namespace",
            hint=r"for example acpi = '\_SB.VR00' in its [[topology.platform]]",
        )
    data = _NAMED_COMPONENT.pack(0, _COHERENT, 0, 0, _CPM_AND_DACS, _ADDRESS_BITS)
    return data + endpoint.acpi.encode() + b"\0"


def _unlisted(listed: Iterable[PciRange]) -> Iterable[tuple[int, int]]:
    """The requester IDs between the ranges, as (first, last)."""
    free = 0
    for part in listed:
        if free < part.first_rid:
            yield free, part.first_rid - 1
        free = part.last_rid + 1
    if free <= MAX_RID:
        yield free, MAX_RID
