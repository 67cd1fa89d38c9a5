"""Where a device sits in the guest's platform: a PCI function, or the base of an MMIO window."""

from __future__ import annotations

import re
from dataclasses import dataclass

from viommud.schema import Wrong

_PCI = re.compile(r"(?:([0-9a-fA-F]{1,4}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")
_MMIO = re.compile(r"mmio:(0[xX][0-9a-fA-F]+|[0-9]+)")

MAX_RID = 0xFFFF
MAX_SEGMENT = 0xFFFF
MAX_ADDRESS = (1 << 64) - 1

VIRTIO_MMIO_SPAN = 0x200
"""Bytes of one virtio-mmio window where nothing else is said: registers, and 256 bytes of configuration space."""


@dataclass(frozen=True, slots=True, order=True)
class PciPlace:
    """A PCI function: its segment (domain), and its requester ID bus<<8 | device<<3 | function."""

    segment: int
    rid: int

    def __str__(self) -> str:
        return f"{self.segment:04x}:{rid_text(self.rid)}"


@dataclass(frozen=True, slots=True)
class MmioPlace:
    """A window of registers in guest-physical space."""

    base: int
    span: int = VIRTIO_MMIO_SPAN
    """Bytes."""
    interrupt: int | None = None
    """Global system interrupt (on Arm: SPI number + 32); only renderings that must state it need it."""

    @property
    def last(self) -> int:
        """The window's last byte."""
        return self.base + self.span - 1

    def __str__(self) -> str:
        return f"mmio:{self.base:#x}"


Place = PciPlace | MmioPlace


def rid_text(rid: int) -> str:
    """A requester ID as bus:device.function."""
    return f"{rid >> 8:02x}:{rid >> 3 & 0x1F:02x}.{rid & 7}"


def parse_place(text: str, key: str) -> Place:
    """A PCI address, or "mmio:BASE", as a configuration has it at a key.

    :raises Wrong: it is neither.
    """
    if (match := _PCI.fullmatch(text)) and int(match[3], 16) <= 0x1F:
        rid = int(match[2], 16) << 8 | int(match[3], 16) << 3 | int(match[4])
        return PciPlace(int(match[1] or "0", 16), rid)
    if match := _MMIO.fullmatch(text):
        base = int(match[1], 0) if match[1][:2].lower() == "0x" else int(match[1])
        if base <= MAX_ADDRESS and base % 4 == 0:
            return MmioPlace(base)
    raise Wrong(key, text, 'a PCI function as "00:01.0" or "0000:00:01.0", or an MMIO window as "mmio:0x0a003e00"')
