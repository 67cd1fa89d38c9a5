"""virtio-iommu requests as bytes (VIRTIO 1.3, 5.13.6); every field can be given any value."""

from __future__ import annotations

import struct
from dataclasses import dataclass

ATTACH = 1
DETACH = 2
MAP = 3
UNMAP = 4
PROBE = 5

OK = 0
IOERR = 1
UNSUPP = 2
DEVERR = 3
INVAL = 4
RANGE = 5
NOENT = 6
FAULT = 7
NOMEM = 8

READ = 1
WRITE = 2
MMIO = 4
ATTACH_BYPASS = 1

F_INPUT_RANGE = 1 << 0
F_DOMAIN_RANGE = 1 << 1
F_MAP_UNMAP = 1 << 2
F_BYPASS = 1 << 3
F_PROBE = 1 << 4
F_MMIO = 1 << 5
F_BYPASS_CONFIG = 1 << 6

CONFIG_SIZE = 40
BYPASS_OFFSET = 36
TAIL = 4
FAULT_SIZE = 24
REQUEST_QUEUE = 0
EVENT_QUEUE = 1


def head(kind: int, reserved: bytes = bytes(3)) -> bytes:
    """struct virtio_iommu_req_head."""
    return struct.pack("<B3s", kind, reserved)


def attach(domain: int, endpoint: int, *, flags: int = 0, reserved: bytes = bytes(4)) -> bytes:
    """Readable part of ATTACH."""
    return head(ATTACH) + struct.pack("<III4s", domain, endpoint, flags, reserved)


def detach(domain: int, endpoint: int, *, reserved: bytes = bytes(8)) -> bytes:
    """Readable part of DETACH."""
    return head(DETACH) + struct.pack("<II8s", domain, endpoint, reserved)


def map_(domain: int, first: int, last: int, phys: int, *, flags: int = READ | WRITE) -> bytes:
    """Readable part of MAP; `last` is inclusive."""
    return head(MAP) + struct.pack("<IQQQI", domain, first, last, phys, flags)


def unmap(domain: int, first: int, last: int, *, reserved: bytes = bytes(4)) -> bytes:
    """Readable part of UNMAP; `last` is inclusive."""
    return head(UNMAP) + struct.pack("<IQQ4s", domain, first, last, reserved)


def probe(endpoint: int, *, reserved: bytes = bytes(64)) -> bytes:
    """Readable part of PROBE."""
    return head(PROBE) + struct.pack("<I64s", endpoint, reserved)


@dataclass(frozen=True)
class Property:
    """One property of a PROBE reply."""

    type: int
    value: bytes


@dataclass(frozen=True)
class ReservedRegion:
    """The value of a RESV_MEM property; `last` is inclusive."""

    subtype: int
    first: int
    last: int


def properties(data: bytes) -> list[Property]:
    """Parse the property list of a PROBE reply up to its end or the first empty property."""
    found = []
    while len(data) >= 4:
        kind, length = struct.unpack_from("<HH", data)
        if kind & 0xFFF == 0:
            break
        assert 4 + length <= len(data), "a property runs out of the reply"
        found.append(Property(kind, data[4 : 4 + length]))
        data = data[4 + length :]
    return found


def reserved_regions(data: bytes) -> list[ReservedRegion]:
    """The RESV_MEM properties of a PROBE reply."""
    regions = []
    for found in properties(data):
        if found.type == 1:
            subtype, reserved, first, last = struct.unpack("<B3sQQ", found.value)
            assert reserved == bytes(3)
            regions.append(ReservedRegion(subtype, first, last))
    return regions


@dataclass(frozen=True)
class Fault:
    """A fault report."""

    reason: int
    flags: int
    endpoint: int
    address: int


def fault(data: bytes) -> Fault:
    """Parse a fault report; its reserved fields must be zero."""
    reason, reserved, flags, endpoint, reserved1, address = struct.unpack("<B3sIIIQ", data)
    assert (reserved, reserved1) == (bytes(3), 0)
    return Fault(reason, flags, endpoint, address)


@dataclass(frozen=True)
class Config:
    """Configuration space."""

    page_size_mask: int
    input_first: int
    input_last: int
    domain_first: int
    domain_last: int
    probe_size: int
    bypass: int


def config(data: bytes) -> Config:
    """Parse configuration space."""
    return Config(*struct.unpack("<QQQIIIB3x", data))
