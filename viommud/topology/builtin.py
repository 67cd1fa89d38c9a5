"""The topology in the device's own configuration space: proposed three times, never merged.

Feature bit 6 and the bytes from offset 36 on are today BYPASS_CONFIG and bypass: a device offers one or the other.

Sources: struct virtio_iommu_topo_* in the patches to Linux include/uapi/linux/virtio_iommu.h of November 2019 (a linked
list), February 2020 (an array of equal items) and August 2020 (records with their length).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint, Topology
from viommud.topology.section import BuiltinShape

OFFSET = 36
"""Where in configuration space :func:`render`'s bytes go."""
MAX_SPACE = 256
"""Configuration space that QEMU's generic vhost-user device can carry (VHOST_USER_MAX_CONFIG_SIZE)."""

_LIST_HEAD = struct.Struct("<H2x")
"""offset of the first item"""
_LIST_PCI = struct.Struct("<HHIHHH2x")
"""type, offset of the next item, first endpoint ID, segment, first and last requester ID"""
_LIST_ENDPOINT = struct.Struct("<HHIQ")
"""type, offset of the next item, endpoint ID, address"""
_LIST_TYPE_PCI, _LIST_TYPE_ENDPOINT = 0, 1

_ARRAY_HEAD = struct.Struct("<III")
"""offset of the first item, number of items, length of one"""
_ARRAY_PCI = struct.Struct("<HHHHI4x")
"""type, segment, first and last requester ID, first endpoint ID; padded to the item's length"""
_ARRAY_ENDPOINT = struct.Struct("<H2xIQ")
"""type, endpoint ID, address"""

_RECORDS_HEAD = struct.Struct("<HH")
"""number of records, offset of the first"""
_RECORD_PCI = struct.Struct("<BxHIHHH2x")
"""type, length, first endpoint ID, segment, first and last requester ID"""
_RECORD_ENDPOINT = struct.Struct("<BxHIQ")
"""type, length, endpoint ID, address"""

_TYPE_PCI, _TYPE_ENDPOINT = 1, 2

_Item = PciRange | PlatformEndpoint


def render(shape: BuiltinShape, topology: Topology) -> bytes:
    """Configuration space from :data:`OFFSET` on, in this shape.

    :raises TopologyError: configuration space cannot hold it, or it lists nothing.
    """
    endpoints: list[_Item] = [*topology.pci, *topology.platform]
    if not endpoints:
        raise TopologyError("topology.builtin: there is no endpoint to list")
    image = _RENDERINGS[shape](endpoints)
    if OFFSET + len(image) > MAX_SPACE:
        raise TopologyError(
            f"topology.builtin: {len(endpoints)} ranges and devices need {OFFSET + len(image)} bytes of configuration"
            f" space, and there are {MAX_SPACE}",
            hint="list neighbouring endpoints as one range",
        )
    return image


def _list(endpoints: Iterable[_Item]) -> bytes:
    items = list(endpoints)
    image = bytearray(_LIST_HEAD.pack(OFFSET + _LIST_HEAD.size))
    for number, item in enumerate(items, start=1):
        end = OFFSET + len(image) + _LIST_PCI.size  # both kinds of item have the same size
        following = end if number < len(items) else 0
        if isinstance(item, PciRange):
            image += _LIST_PCI.pack(
                _LIST_TYPE_PCI, following, item.first_id, item.segment, item.first_rid, item.last_rid
            )
        else:
            image += _LIST_ENDPOINT.pack(_LIST_TYPE_ENDPOINT, following, item.id, item.base)
    return bytes(image)


def _array(endpoints: Iterable[_Item]) -> bytes:
    items = [
        _ARRAY_PCI.pack(_TYPE_PCI, item.segment, item.first_rid, item.last_rid, item.first_id)
        if isinstance(item, PciRange)
        else _ARRAY_ENDPOINT.pack(_TYPE_ENDPOINT, item.id, item.base)
        for item in endpoints
    ]
    return _ARRAY_HEAD.pack(OFFSET + _ARRAY_HEAD.size, len(items), _ARRAY_PCI.size) + b"".join(items)


def _records(endpoints: Iterable[_Item]) -> bytes:
    items = [
        _RECORD_PCI.pack(_TYPE_PCI, _RECORD_PCI.size, item.first_id, item.segment, item.first_rid, item.last_rid)
        if isinstance(item, PciRange)
        else _RECORD_ENDPOINT.pack(_TYPE_ENDPOINT, _RECORD_ENDPOINT.size, item.id, item.base)
        for item in endpoints
    ]
    # The first record is aligned to 8 bytes as the proposal asks: 36 + 4 is.
    return _RECORDS_HEAD.pack(len(items), OFFSET + _RECORDS_HEAD.size) + b"".join(items)


_RENDERINGS: dict[BuiltinShape, Callable[[Iterable[_Item]], bytes]] = {
    "2019-11": _list,
    "2020-02": _array,
    "2020-08": _records,
}
