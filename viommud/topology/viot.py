"""The Virtual I/O Translation table, VIOT, in its final layout.

Source: struct acpi_viot_* of Linux include/acpi/actbl3.h, what drivers/acpi/viot.c does with them, and QEMU
hw/acpi/viot.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from viommud.topology import acpi
from viommud.topology.description import Described, Description
from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint, Topology
from viommud.topology.place import MmioPlace, PciPlace, Place

SIGNATURE = b"VIOT"

_HEADER = struct.Struct("<HH8x")
"""node count, offset of the first node"""
_NODE = struct.Struct("<BxH")
"""type, length"""
_PCI_RANGE = struct.Struct("<BxHIHHHHH6x")
"""type, length, first endpoint ID, first and last segment, first and last requester ID, offset of the IOMMU's node"""
_ENDPOINT = struct.Struct("<BxHIQH6x")
"""type, length, endpoint ID, base address, offset of the IOMMU's node"""
_IOMMU_PCI = struct.Struct("<BxHHH8x")
"""type, length, segment, requester ID"""
_IOMMU_MMIO = struct.Struct("<BxH4xQ")
"""type, length, base address"""

_TYPE_PCI_RANGE, _TYPE_ENDPOINT, _TYPE_IOMMU_PCI, _TYPE_IOMMU_MMIO = 1, 2, 3, 4
_FIRST_NODE = acpi.HEADER.size + _HEADER.size
_MAX_NODES = 0xFFFF


def render(topology: Topology) -> bytes:
    """The table: the IOMMU's node, one range for each run of PCI functions, one node for each platform endpoint.

    :raises TopologyError: more nodes than the table can count.
    """
    nodes = [_iommu(topology.iommu)]
    nodes += [
        _PCI_RANGE.pack(
            _TYPE_PCI_RANGE,
            _PCI_RANGE.size,
            part.first_id,
            part.segment,
            part.segment,
            part.first_rid,
            part.last_rid,
            _FIRST_NODE,
        )
        for part in topology.pci
    ]
    nodes += [
        _ENDPOINT.pack(_TYPE_ENDPOINT, _ENDPOINT.size, endpoint.id, endpoint.base, _FIRST_NODE)
        for endpoint in topology.platform
    ]
    if len(nodes) > _MAX_NODES:
        raise TopologyError(f"VIOT holds {_MAX_NODES} nodes, and this topology needs {len(nodes)}")
    return acpi.table(SIGNATURE, 0, _HEADER.pack(len(nodes), _FIRST_NODE) + b"".join(nodes))


def _iommu(place: Place) -> bytes:
    if isinstance(place, PciPlace):
        return _IOMMU_PCI.pack(_TYPE_IOMMU_PCI, _IOMMU_PCI.size, place.segment, place.rid)
    return _IOMMU_MMIO.pack(_TYPE_IOMMU_MMIO, _IOMMU_MMIO.size, place.base)


@dataclass(frozen=True, slots=True)
class _Node:
    kind: int
    offset: int
    body: bytes


def read(image: bytes, what: str) -> Description:
    """What a table says.

    :param what: names the table in errors.
    :raises TopologyError: it is not a VIOT, or is malformed in a way that a guest's kernel refuses.
    """
    image = acpi.check_table(image, SIGNATURE, what)
    if len(image) < _FIRST_NODE:
        raise TopologyError(f"{what}: a VIOT has at least {_FIRST_NODE} bytes, and this one has {len(image)}")
    count, first = _HEADER.unpack_from(image, acpi.HEADER.size)
    nodes = _nodes(image, count, first, what)
    iommus: dict[int, Place] = {}
    for node in nodes:
        if node.kind == _TYPE_IOMMU_PCI:
            iommus[node.offset] = PciPlace(*_IOMMU_PCI.unpack(node.body)[2:])
        elif node.kind == _TYPE_IOMMU_MMIO:
            iommus[node.offset] = MmioPlace(_IOMMU_MMIO.unpack(node.body)[2])
    described: list[Described] = []
    for node in nodes:
        if node.kind in (_TYPE_PCI_RANGE, _TYPE_ENDPOINT):
            endpoints, output = _endpoints(node, what)
            if output not in iommus:
                raise TopologyError(f"{what}: the node at {node.offset:#x} refers to {output:#x}, where no IOMMU is")
            described += [Described(endpoint, iommus[output]) for endpoint in endpoints]
    return Description(tuple(iommus.values()), tuple(described))


_SIZES = {
    _TYPE_PCI_RANGE: _PCI_RANGE.size,
    _TYPE_ENDPOINT: _ENDPOINT.size,
    _TYPE_IOMMU_PCI: _IOMMU_PCI.size,
    _TYPE_IOMMU_MMIO: _IOMMU_MMIO.size,
}


def _nodes(image: bytes, count: int, offset: int, what: str) -> list[_Node]:
    nodes: list[_Node] = []
    if offset < _FIRST_NODE:
        raise TopologyError(f"{what}: the first node would be at {offset:#x}, inside the table's header")
    for _ in range(count):
        if offset + _NODE.size > len(image):
            raise TopologyError(f"{what}: the header counts {count} nodes, and the table ends after {len(nodes)}")
        kind, length = _NODE.unpack_from(image, offset)
        size = _SIZES.get(kind, _NODE.size)
        if length < size or offset + length > len(image):
            raise TopologyError(f"{what}: the node at {offset:#x} (type {kind}) cannot have {length} bytes")
        nodes.append(_Node(kind, offset, image[offset : offset + size]))
        offset += length
    return nodes


def _endpoints(node: _Node, what: str) -> tuple[list[PciRange | PlatformEndpoint], int]:
    if node.kind == _TYPE_ENDPOINT:
        _, _, endpoint, base, output = _ENDPOINT.unpack(node.body)
        return [PlatformEndpoint(endpoint, base)], output
    _, _, first_id, first_segment, last_segment, first_rid, last_rid, output = _PCI_RANGE.unpack(node.body)
    if first_segment > last_segment or first_rid > last_rid:
        raise TopologyError(f"{what}: the PCI range at {node.offset:#x} ends before it begins")
    # Every segment has the same functions; their IDs are 65536 apart.
    return [
        PciRange(segment, first_rid, last_rid, first_id + ((segment - first_segment) << 16))
        for segment in range(first_segment, last_segment + 1)
    ], output
