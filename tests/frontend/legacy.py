"""virtio-iommu drivers from before the released specification, each with exactly the layouts of its age.

The device was proposed in versions 0.1 to 0.12 with Linux drivers beside them; some of those drivers live on in the
kernels of old guests.  What they have in common is in `EarlyDriver`; nothing is shared with `frontend.iommu`, which
speaks the released layouts.  Sources: the driver series "Add virtio-iommu driver" on the iommu and virtualization
mailing lists (versions of November 2017, February 2018 and November 2018) and their linux/virtio_iommu.h.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from frontend import wire
from frontend.guest import Guest, Reply

ATTACH, DETACH, MAP, UNMAP, PROBE = range(1, 6)
READ, WRITE, EXEC = 1, 2, 4
TAIL = 4

F_INPUT_RANGE, F_DOMAIN_BITS, F_MAP_UNMAP, F_BYPASS, F_PROBE = (1 << bit for bit in range(5))
FEATURES = F_INPUT_RANGE | F_DOMAIN_BITS | F_MAP_UNMAP | F_BYPASS | F_PROBE | wire.F_VERSION_1
"""What such a driver accepts of what is offered, ring features beside."""


@dataclass(frozen=True)
class EarlyConfig:
    """Configuration space of 32 bytes."""

    page_size_mask: int
    first: int
    last: int
    domain_bits: int
    probe_size: int


@dataclass(frozen=True)
class EarlyFault:
    """A fault report."""

    reason: int
    flags: int
    endpoint: int
    address: int


class EarlyDriver(ABC):
    """A driver behind a guest's rings; statuses are None where a request comes back unanswered."""

    CONFIG_SIZE: ClassVar[int] = 32
    FAULT_SIZE: ClassVar[int]

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    @staticmethod
    def accepted(offered: int) -> int:
        """The features that this driver accepts."""
        return offered & (FEATURES | wire.F_INDIRECT_DESC | wire.F_EVENT_IDX | wire.F_PROTOCOL_FEATURES)

    def config(self) -> EarlyConfig:
        """Read the whole space."""
        raw = self.guest.client.get_config(self.CONFIG_SIZE)
        return EarlyConfig(*struct.unpack("<QQQB3xI", raw))

    def _ask(self, readable: bytes, writable: int = TAIL) -> Reply:
        return self.guest.request(readable, writable)

    @staticmethod
    def _status(reply: Reply) -> int | None:
        return None if reply.untouched else reply.status

    @abstractmethod
    def attach(self, domain: int, endpoint: int) -> int | None:
        """Put an endpoint into a domain."""

    @abstractmethod
    def detach(self, domain: int, endpoint: int) -> int | None:
        """Take an endpoint out of its domain."""

    @abstractmethod
    def map(self, domain: int, virt: int, phys: int, size: int, flags: int = READ | WRITE) -> int | None:
        """Map bytes from virt on to phys."""

    @abstractmethod
    def unmap(self, domain: int, virt: int, size: int) -> int | None:
        """Unmap bytes from virt on."""

    @abstractmethod
    def parse_region(self, value: bytes) -> tuple[int, int, int]:
        """Subtype, first and last address of a reserved region."""

    @abstractmethod
    def parse_fault(self, data: bytes) -> EarlyFault:
        """A fault report."""

    def probe(self, endpoint: int) -> list[tuple[int, int, int]] | int | None:
        """Reserved regions of an endpoint; a status that is not OK otherwise."""
        size = self.config().probe_size
        reply = self._ask(struct.pack("<B3xI64x", PROBE, endpoint), size + TAIL)
        if self._status(reply) != 0:
            return self._status(reply)
        regions, data = [], reply.data[:-TAIL]
        while len(data) >= 4:
            kind, length = struct.unpack_from("<HH", data)
            if not kind & 0xFFF:
                break
            assert kind == 1
            regions.append(self.parse_region(data[4 : 4 + length]))
            data = data[4 + length :]
        return regions


class Driver2018(EarlyDriver):
    """Version 0.9, November 2018: today's sizes, a flag of its own for MMIO, domain bits for a range."""

    FAULT_SIZE = 24
    MMIO: ClassVar[int] = 8

    def attach(self, domain: int, endpoint: int) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xII8x", ATTACH, domain, endpoint)))

    def detach(self, domain: int, endpoint: int) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xII8x", DETACH, domain, endpoint)))

    def map(self, domain: int, virt: int, phys: int, size: int, flags: int = READ | WRITE) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xIQQQI", MAP, domain, virt, virt + size - 1, phys, flags)))

    def unmap(self, domain: int, virt: int, size: int) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xIQQ4x", UNMAP, domain, virt, virt + size - 1)))

    def parse_region(self, value: bytes) -> tuple[int, int, int]:  # noqa: D102
        subtype, first, last = struct.unpack("<B3xQQ", value)
        return subtype, first, last

    def parse_fault(self, data: bytes) -> EarlyFault:  # noqa: D102
        return EarlyFault(*struct.unpack("<B3xII4xQ", data))


class DriverEarly2018(Driver2018):
    """Version 0.6, February 2018: short ATTACH and DETACH, first and last addresses, no MMIO flag."""

    FAULT_SIZE = 20

    def attach(self, domain: int, endpoint: int) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xII4x", ATTACH, domain, endpoint)))

    def detach(self, domain: int, endpoint: int) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xI4x", DETACH, endpoint)))

    def parse_region(self, value: bytes) -> tuple[int, int, int]:  # noqa: D102
        subtype, first, size = struct.unpack("<B3xQQ", value)
        return subtype, first, first + size - 1

    def parse_fault(self, data: bytes) -> EarlyFault:  # noqa: D102
        return EarlyFault(*struct.unpack("<B3xIIQ", data))


class Driver2017(DriverEarly2018):
    """Version 0.5, November 2017: an address, a target and a size in MAP; an address and a size in UNMAP."""

    def map(self, domain: int, virt: int, phys: int, size: int, flags: int = READ | WRITE) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xIQQQI", MAP, domain, virt, phys, size, flags)))

    def unmap(self, domain: int, virt: int, size: int) -> int | None:  # noqa: D102
        return self._status(self._ask(struct.pack("<B3xIQQ4x", UNMAP, domain, virt, size)))
