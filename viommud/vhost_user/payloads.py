"""What vhost-user messages carry: the header's constants and every payload format.

Source: QEMU docs/interop/vhost-user.rst.  Payload classes check syntax only: sizes, reserved bits, counts that
contradict the size.  Whatever a guest can influence (ring sizes and addresses pass through QEMU unchecked) is left
to the session, which can refuse it without closing the connection.

All integers on the wire have the host's byte order.
"""

# Every format implements the same three methods; Payload documents them once.
# ruff: noqa: D102

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Self

HEADER = struct.Struct("=III")
"""request code, flags, payload size"""

VERSION = 1
FLAG_VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8

MAX_PAYLOAD = 4096
"""Larger than any payload of the table; a larger size in a header is garbage."""
MAX_CONFIG = 256
MAX_TABLE_REGIONS = 8
"""Regions of one SET_MEM_TABLE, and so the descriptors that can come with one message."""
MAX_SHARED_MEMORY_REGIONS = 256

F_LOG_ALL = 26
"""Virtio feature bit that vhost-user uses to switch dirty logging."""
F_PROTOCOL_FEATURES = 30
"""Virtio feature bit that vhost-user uses to say it knows protocol features; never seen by the guest."""

VRING_F_LOG = 1
"""Flag of SET_VRING_ADDR: writes to the used ring are logged."""
VRING_NO_FD = 0x100
"""Bit of SET_VRING_KICK, CALL and ERR: no descriptor comes with the message."""
CONFIG_MIGRATION = 1
"""Flags value of SET_CONFIG: the write restores a migrated device."""


class InvalidPayload(ValueError):  # noqa: N818 - a verdict, named as one
    """A payload that is not what its message says."""


class Payload(ABC):
    """One payload format.  Instances are immutable and valid."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def sizes(cls) -> tuple[int, int]:
        """Least and greatest size in bytes."""

    @classmethod
    @abstractmethod
    def decode(cls, data: bytes) -> Self:
        """Parse; the size is within sizes().

        :raises InvalidPayload: the bytes contradict themselves.
        """

    @abstractmethod
    def encode(self) -> bytes:
        """The bytes on the wire."""


class FixedPayload(Payload):
    """A payload that is one C structure, field by field."""

    __slots__ = ()
    FORMAT: ClassVar[struct.Struct]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.FORMAT.size, cls.FORMAT.size

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(data))

    def encode(self) -> bytes:
        return self.FORMAT.pack(*(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Empty(FixedPayload):
    """No payload."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=")


@dataclass(frozen=True, slots=True)
class U64(FixedPayload):
    """One number."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=Q")
    value: int


@dataclass(frozen=True, slots=True)
class VringState(FixedPayload):
    """A ring's index and one number about it."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=II")
    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr(FixedPayload):
    """Where a ring lies."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def __post_init__(self) -> None:
        if self.flags & ~VRING_F_LOG:
            raise InvalidPayload(f"reserved ring flags {self.flags:#x}")


@dataclass(frozen=True, slots=True)
class VringFd(Payload):
    """A ring's index, and whether an eventfd comes with it."""

    index: int
    no_fd: bool

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return 8, 8

    @classmethod
    def decode(cls, data: bytes) -> Self:
        (value,) = struct.unpack("=Q", data)
        if value & ~(0xFF | VRING_NO_FD):
            raise InvalidPayload(f"reserved bits in {value:#x}")
        return cls(index=value & 0xFF, no_fd=bool(value & VRING_NO_FD))

    def encode(self) -> bytes:
        if not 0 <= self.index <= 0xFF:
            raise InvalidPayload(f"ring index {self.index} does not fit in 8 bits")
        return struct.pack("=Q", self.index | (VRING_NO_FD if self.no_fd else 0))


@dataclass(frozen=True, slots=True)
class MemoryRegion(FixedPayload):
    """One range of guest memory, as part of another payload."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQQQ")
    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class MemoryTable(Payload):
    """SET_MEM_TABLE: all of guest memory; one descriptor per region."""

    HEAD: ClassVar[struct.Struct] = struct.Struct("=I4x")
    regions: tuple[MemoryRegion, ...]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.HEAD.size, cls.HEAD.size + MAX_TABLE_REGIONS * MemoryRegion.FORMAT.size

    @classmethod
    def decode(cls, data: bytes) -> Self:
        (count,) = cls.HEAD.unpack_from(data)
        body = data[cls.HEAD.size :]
        if len(body) != count * MemoryRegion.FORMAT.size:
            raise InvalidPayload(f"{count} memory regions announced in a payload of {len(data)} bytes")
        return cls(tuple(MemoryRegion(*values) for values in MemoryRegion.FORMAT.iter_unpack(body)))

    def encode(self) -> bytes:
        return self.HEAD.pack(len(self.regions)) + b"".join(region.encode() for region in self.regions)


@dataclass(frozen=True, slots=True)
class SingleRegion(Payload):
    """ADD_MEM_REG, REM_MEM_REG."""

    PADDING: ClassVar[int] = 8
    region: MemoryRegion

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        size = cls.PADDING + MemoryRegion.FORMAT.size
        return size, size

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(MemoryRegion.decode(data[cls.PADDING :]))

    def encode(self) -> bytes:
        return bytes(self.PADDING) + self.region.encode()


@dataclass(frozen=True, slots=True)
class LogArea(FixedPayload):
    """SET_LOG_BASE: where in the descriptor the dirty log lies."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQ")
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class VringArea(FixedPayload):
    """VRING_HOST_NOTIFIER_MSG: a ring and the page to notify it through."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQQ")
    value: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """GET_INFLIGHT_FD, SET_INFLIGHT_FD.

    The fields take 20 bytes; QEMU and DPDK send the C structure with its 4 bytes of trailing padding.  Both sizes
    are taken, and a reply repeats the size of its request.
    """

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQHH")
    PADDING: ClassVar[int] = 4
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    padded: bool = True

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.FORMAT.size, cls.FORMAT.size + cls.PADDING

    @classmethod
    def decode(cls, data: bytes) -> Self:
        padding = len(data) - cls.FORMAT.size
        if padding not in (0, cls.PADDING):
            raise InvalidPayload(f"{len(data)} bytes where 20 or 24 are due")
        mmap_size, mmap_offset, num_queues, queue_size = cls.FORMAT.unpack_from(data)
        return cls(mmap_size, mmap_offset, num_queues, queue_size, padded=bool(padding))

    def encode(self) -> bytes:
        body = self.FORMAT.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return body + bytes(self.PADDING if self.padded else 0)


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """GET_CONFIG, SET_CONFIG: a piece of device configuration space."""

    HEAD: ClassVar[struct.Struct] = struct.Struct("=III")
    offset: int
    flags: int
    data: bytes

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return cls.HEAD.size, cls.HEAD.size + MAX_CONFIG

    @classmethod
    def decode(cls, data: bytes) -> Self:
        offset, size, flags = cls.HEAD.unpack_from(data)
        body = data[cls.HEAD.size :]
        if size != len(body):
            raise InvalidPayload(f"configuration size {size} with {len(body)} bytes of data")
        if flags & ~CONFIG_MIGRATION:
            raise InvalidPayload(f"reserved configuration flags {flags:#x}")
        return cls(offset, flags, bytes(body))

    def encode(self) -> bytes:
        return self.HEAD.pack(self.offset, len(self.data), self.flags) + self.data


@dataclass(frozen=True, slots=True)
class Iotlb(FixedPayload):
    """struct vhost_iotlb_msg of linux/vhost_types.h."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=QQQBB6x")
    iova: int
    size: int
    user_addr: int
    permissions: int
    type: int


@dataclass(frozen=True, slots=True)
class DeviceState(FixedPayload):
    """SET_DEVICE_STATE_FD: direction 0 save, 1 load; phase 0 stopped."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=II")
    direction: int
    phase: int


@dataclass(frozen=True, slots=True)
class Uuid(FixedPayload):
    """Name of a shared object."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=16s")
    value: bytes


@dataclass(frozen=True, slots=True)
class SharedMemoryConfig(Payload):
    """GET_SHMEM_CONFIG: sizes of the device's shared memory regions, 0 where an id is unused."""

    HEAD: ClassVar[struct.Struct] = struct.Struct("=I4x")
    sizes_by_id: tuple[int, ...]

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        size = cls.HEAD.size + 8 * MAX_SHARED_MEMORY_REGIONS
        return size, size

    @classmethod
    def decode(cls, data: bytes) -> Self:
        (count,) = cls.HEAD.unpack_from(data)
        values = struct.unpack_from(f"={MAX_SHARED_MEMORY_REGIONS}Q", data, cls.HEAD.size)
        if count > MAX_SHARED_MEMORY_REGIONS:
            raise InvalidPayload(f"{count} shared memory regions")
        return cls(values)

    def encode(self) -> bytes:
        used = sum(1 for size in self.sizes_by_id if size)
        return self.HEAD.pack(used) + struct.pack(f"={MAX_SHARED_MEMORY_REGIONS}Q", *self.sizes_by_id)


@dataclass(frozen=True, slots=True)
class SharedMemoryMap(FixedPayload):
    """SHMEM_MAP, SHMEM_UNMAP: struct VhostUserMMap."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=B7xQQQQ")
    region: int
    fd_offset: int
    region_offset: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class Opaque(Payload):
    """A payload for devices of another kind: carried, never looked at."""

    data: bytes

    @classmethod
    def sizes(cls) -> tuple[int, int]:
        return 0, MAX_PAYLOAD

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(bytes(data))

    def encode(self) -> bytes:
        return self.data
