"""QEMU's educational device, driven by the test through VFIO (docs/specs/edu.rst of QEMU)."""

from __future__ import annotations

import fcntl
import os
import struct

from frontend.ring import wait_until

ID = 0x010000ED
BUFFER = 0x40000
"""Address of the device's own 4 KiB, as its DMA names them."""

_GET_REGION_INFO = 0x3B << 8 | 108
_BAR0, _CONFIG = 0, 7
_SOURCE, _DESTINATION, _COUNT, _COMMAND = 0x80, 0x88, 0x90, 0x98
_START, _TO_MEMORY = 1, 2


class Edu:
    """A device whose VFIO descriptor the test has; its IOMMU is somebody else's business."""

    def __init__(self, fd: int) -> None:
        """Enable memory space and bus mastering; fd stays the caller's."""
        self._fd = fd
        self._registers = self._region(_BAR0)
        command = self._region(_CONFIG) + 4
        (value,) = struct.unpack("<H", os.pread(fd, 2, command))
        os.pwrite(fd, struct.pack("<H", value | 6), command)
        assert self._get(0, "<I") == ID, "not an edu"

    def _region(self, index: int) -> int:
        """Offset of a region in the device's file."""
        buffer = bytearray(struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self._fd, _GET_REGION_INFO, buffer, True)
        offset: int = struct.unpack("=IIIIQQ", buffer)[5]
        return offset

    def _get(self, register: int, layout: str = "<Q") -> int:
        data = os.pread(self._fd, struct.calcsize(layout), self._registers + register)
        value: int = struct.unpack(layout, data)[0]
        return value

    def _transfer(self, source: int, destination: int, count: int, command: int) -> None:
        for register, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, count)):
            os.pwrite(self._fd, struct.pack("<Q", value), self._registers + register)
        os.pwrite(self._fd, struct.pack("<Q", _START | command), self._registers + _COMMAND)
        # A transfer that the IOMMU stops ends like any other: the device does not say.
        wait_until(lambda: not self._get(_COMMAND) & _START, "the end of a transfer")

    def read(self, iova: int, count: int = 64) -> None:
        """Read memory into the device's buffer."""
        self._transfer(iova, BUFFER, count, 0)

    def write(self, iova: int, count: int = 64) -> None:
        """Write the device's buffer to memory."""
        self._transfer(BUFFER, iova, count, _TO_MEMORY)
