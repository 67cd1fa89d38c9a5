"""Guest RAM that a test owns: memfds, mapped here and given to the back-end."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from frontend import wire

DEFAULT_GPA = 0x4000_0000
DEFAULT_SIZE = 4 << 20
USER_BASE = 0x7F00_0000_0000
"""Where guest address 0 seems to lie in the front-end: user addresses are only names, and a test should notice when
they are taken for guest addresses."""


@dataclass
class Ram:
    """One contiguous piece of guest RAM."""

    gpa: int = DEFAULT_GPA
    size: int = DEFAULT_SIZE
    offset: int = 0
    """In the memfd; page-aligned."""
    fd: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.offset + self.size)
        self._map = mmap.mmap(self.fd, self.size, offset=self.offset)
        self.bytes = memoryview(self._map)
        # struct.pack_into and slices copy byte by byte; a 16-bit ring index that another thread reads at the same time
        # must be written in one go, and that is what an element of a cast memoryview does.
        self.words = self.bytes.cast("H")

    @property
    def user_addr(self) -> int:
        """The region's user address."""
        return USER_BASE + self.gpa

    def wire_region(self, *, gpa_addresses: bool) -> bytes:
        """As it is described to the back-end."""
        return wire.region(self.gpa, self.size, self.gpa if gpa_addresses else self.user_addr, self.offset)

    def close(self) -> None:
        """Unmap and close."""
        self.words.release()
        self.bytes.release()
        self._map.close()
        os.close(self.fd)


class GuestMemory:
    """All of a guest's RAM, with an allocator that never frees (see mark and release)."""

    def __init__(self, *rams: Ram) -> None:
        self.rams = list(rams or (Ram(),))
        self._next = self.rams[0].gpa
        self._barrier = threading.Lock()

    def close(self) -> None:
        """Unmap and close all of it."""
        for ram in self.rams:
            ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def allocate(self, size: int, align: int = 16) -> int:
        """Guest address of `size` bytes in the first piece of RAM."""
        address = -(-self._next // align) * align
        ram = self.rams[0]
        assert address + size <= ram.gpa + ram.size, "the test's guest is out of memory"
        self._next = address + size
        return address

    def mark(self) -> int:
        """Where the allocator stands, for release()."""
        return self._next

    def release(self, mark: int) -> None:
        """Free everything that was allocated since mark()."""
        self._next = mark

    def find(self, address: int, size: int = 1) -> tuple[Ram, int]:
        """The piece of RAM that holds these bytes, and the offset of the first."""
        for ram in self.rams:
            if ram.gpa <= address and address + size <= ram.gpa + ram.size:
                return ram, address - ram.gpa
        raise IndexError(f"{address:#x}+{size:#x} is not in guest memory")

    def read(self, address: int, size: int) -> bytes:
        """Copy bytes out of guest memory."""
        ram, offset = self.find(address, size)
        return bytes(ram.bytes[offset : offset + size])

    def write(self, address: int, data: bytes) -> None:
        """Copy bytes into guest memory; not atomic."""
        ram, offset = self.find(address, len(data))
        ram.bytes[offset : offset + len(data)] = data

    def load16(self, address: int) -> int:
        """Read a 16-bit field in one go."""
        ram, offset = self.find(address, 2)
        return int(ram.words[offset // 2])

    def store16(self, address: int, value: int) -> None:
        """Write a 16-bit field in one go."""
        ram, offset = self.find(address, 2)
        ram.words[offset // 2] = value & 0xFFFF

    def barrier(self) -> None:
        """Order what was written before against what is read afterwards: taking a lock is an atomic operation."""
        with self._barrier:
            pass
