"""PCI without firmware: configuration space, BARs placed by the test, capabilities.

Register layout: PCI Local Bus Specification 3.0, chapter 6, as in Linux include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

COMMAND = 0x04
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
BAR0 = 0x10
CAPABILITY_LIST = 0x34

_BAR_IO = 1
_BAR_64 = 4
_BAR_MASK = 0xFFFF_FFF0


class Registers(Protocol):
    """What a bus needs of the machine."""

    def read(self, address: int, size: int) -> int:
        """Read physical memory."""

    def write(self, address: int, size: int, value: int) -> None:
        """Write physical memory."""

    def port_read(self, port: int, size: int) -> int:
        """Read an I/O port."""

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write an I/O port."""


class PciBus(ABC):
    """Bus 0 of a machine."""

    next_bar: int
    """Where free memory space for BARs begins."""

    def __init__(self, registers: Registers) -> None:
        self.registers = registers

    @abstractmethod
    def read(self, devfn: int, offset: int, size: int) -> int:
        """Read configuration space."""

    @abstractmethod
    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Write configuration space."""

    def function(self, address: str) -> PciFunction:
        """A function by its address, as "05.0"."""
        slot, _, number = address.partition(".")
        return PciFunction(self, int(slot, 16) << 3 | int(number))


class EcamBus(PciBus):
    """Arm's virt with highmem-ecam=off (QEMU hw/arm/virt.c): configuration space in memory."""

    _ECAM = 0x3F00_0000

    def __init__(self, registers: Registers) -> None:
        super().__init__(registers)
        self.next_bar = 0x1000_0000

    def read(self, devfn: int, offset: int, size: int) -> int:
        """Read configuration space."""
        return self.registers.read(self._ECAM + (devfn << 12) + offset, size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self.registers.write(self._ECAM + (devfn << 12) + offset, size, value)


class PortBus(PciBus):
    """A PC: configuration space behind ports 0xcf8 and 0xcfc."""

    def __init__(self, registers: Registers) -> None:
        super().__init__(registers)
        self.next_bar = 0xE000_0000

    def _select(self, devfn: int, offset: int) -> int:
        self.registers.port_write(0xCF8, 4, 0x8000_0000 | devfn << 8 | offset & 0xFC)
        return 0xCFC + (offset & 3)

    def read(self, devfn: int, offset: int, size: int) -> int:
        """Read configuration space."""
        return self.registers.port_read(self._select(devfn, offset), size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self.registers.port_write(self._select(devfn, offset), size, value)


class PciFunction:
    """One function."""

    def __init__(self, bus: PciBus, devfn: int) -> None:
        self.bus = bus
        self.devfn = devfn
        self.bars: dict[int, int] = {}
        """Where each BAR was placed."""

    def read(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return self.bus.read(self.devfn, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self.bus.write(self.devfn, offset, size, value)

    @property
    def ids(self) -> tuple[int, int]:
        """Vendor and device."""
        return self.read(0, 2), self.read(2, 2)

    def enable(self) -> None:
        """Place the memory BARs, the first time, and switch memory space and bus mastering on."""
        number = 0
        while number < 6:
            step = self._place(number)
            number += step
        self.write(COMMAND, 2, COMMAND_MEMORY | COMMAND_MASTER)

    def _place(self, number: int) -> int:
        """Place a BAR; how many registers it has."""
        register = BAR0 + 4 * number
        kind = self.read(register, 4)
        wide = not kind & _BAR_IO and bool(kind & _BAR_64)
        if not kind & _BAR_IO:
            self.write(register, 4, 0xFFFF_FFFF)
            mask = self.read(register, 4) & _BAR_MASK
            if mask:
                size = (~mask & 0xFFFF_FFFF) + 1
                if number not in self.bars:
                    base = -(-self.bus.next_bar // size) * size
                    self.bus.next_bar = base + size
                    self.bars[number] = base
                self.write(register, 4, self.bars[number])
            if wide:
                self.write(register + 4, 4, 0)
        return 2 if wide else 1

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """Every capability's ID and offset."""
        at = self.read(CAPABILITY_LIST, 1)
        while at:
            yield self.read(at, 1), at
            at = self.read(at + 1, 1)
