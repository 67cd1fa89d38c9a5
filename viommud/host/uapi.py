"""The few ioctls of the kernel that are asked for before an engine is there.

Sources: include/uapi/linux/vfio.h and include/uapi/linux/iommufd.h of Linux 7.2.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass

IOMMU = "/dev/iommu"
_TYPE = 0x3B << 8
_TYPE1_INFO = _TYPE | 112
_INFO_PAGE_SIZES, _INFO_CAPABILITIES = 1, 2
_CAPABILITY_RANGES = 1
_BIND, _ATTACH = _TYPE | 118, _TYPE | 119
_IOAS_ALLOC, _IOAS_IOVA_RANGES = _TYPE | 0x81, _TYPE | 0x84
_MOST_RANGES = 4096


@dataclass(frozen=True, slots=True)
class IovaRanges:
    """What the host's IOMMU can translate for a device."""

    ranges: tuple[tuple[int, int], ...]
    """First and last address of each range, in order."""
    alignment: int
    """Bytes: the smallest mapping."""


def _ioctl(fd: int, request: int, layout: str, *values: int) -> tuple[int, ...]:
    buffer = bytearray(struct.pack(layout, struct.calcsize(layout), *values))
    fcntl.ioctl(fd, request, buffer, True)
    return struct.unpack(layout, buffer)


def is_iommufd(fd: int) -> bool:
    """Whether a descriptor is one of /dev/iommu."""
    try:
        _ioas_ranges(fd, 0, 0)
    except OSError as error:
        return error.errno == errno.ENOENT  # there is no IOAS 0
    return True


def _ioas_ranges(iommufd: int, ioas: int, room: int) -> tuple[int, int, list[int]]:
    """How many ranges there are, their alignment, and the bounds of as many as there is room for."""
    array = (ctypes.c_uint64 * (2 * max(room, 1)))()
    layout = "=IIIIQQ"
    buffer = bytearray(struct.pack(layout, struct.calcsize(layout), ioas, room, 0, ctypes.addressof(array), 0))
    try:
        fcntl.ioctl(iommufd, _IOAS_IOVA_RANGES, buffer, True)
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
    _, _, count, _, _, alignment = struct.unpack(layout, buffer)
    return count, alignment, list(array)


def iova_ranges(device: str) -> IovaRanges:
    """What the host's IOMMU can translate for a VFIO device; it is opened for the time.

    :param device: path of its character device, or /proc/self/fd/N of a descriptor that nobody has bound yet.
    :raises OSError: it is in use, or cannot be attached.
    """
    device_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        iommufd = os.open(IOMMU, os.O_RDWR | os.O_CLOEXEC)
        try:
            _ioctl(device_fd, _BIND, "=IIiI", 0, iommufd, 0)
            _, _, ioas = _ioctl(iommufd, _IOAS_ALLOC, "=III", 0, 0)
            _ioctl(device_fd, _ATTACH, "=III", 0, ioas)
            count, alignment, _ = _ioas_ranges(iommufd, ioas, 0)
            if count > _MOST_RANGES:
                raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
            count, alignment, bounds = _ioas_ranges(iommufd, ioas, count)
        finally:
            os.close(iommufd)
    finally:
        os.close(device_fd)
    return IovaRanges(tuple(zip(bounds[: 2 * count : 2], bounds[1 : 2 * count : 2], strict=True)), max(alignment, 1))


def type1_ranges(container: int) -> IovaRanges:
    """What the host's IOMMU can translate in a VFIO container whose IOMMU is of type 1.

    :raises OSError: it is no such container.
    """
    layout = "=IIQII"
    size = struct.calcsize(layout)
    for _ in range(2):  # the kernel says how much room its answer takes
        buffer = bytearray(size)
        struct.pack_into("=I", buffer, 0, size)
        fcntl.ioctl(container, _TYPE1_INFO, buffer, True)
        size = struct.unpack_from("=I", buffer)[0]
    _, flags, page_sizes, capability, _ = struct.unpack_from(layout, buffer)
    ranges: tuple[tuple[int, int], ...] = ((0, (1 << 64) - 1),)
    while flags & _INFO_CAPABILITIES and capability:
        kind, _, following = struct.unpack_from("=HHI", buffer, capability)
        if kind == _CAPABILITY_RANGES:
            (count,) = struct.unpack_from("=I", buffer, capability + 8)
            bounds = struct.unpack_from(f"={2 * count}Q", buffer, capability + 16)
            ranges = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        capability = following
    alignment = page_sizes & -page_sizes if flags & _INFO_PAGE_SIZES else 4096
    return IovaRanges(ranges, alignment)
