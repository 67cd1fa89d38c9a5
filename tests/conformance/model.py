"""What a virtio-iommu does, as plainly as it can be written down: bytes of a request in, status out.

A model to compare the engine with: dictionaries of domains and lists of mappings, no cleverness, nothing in common with
the C code but the specification and the choices that viommud documents where that leaves one (the order of checks, and
the statuses that it names none for).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

U64 = (1 << 64) - 1


class Status(IntEnum):
    """Of a tail."""

    OK = 0
    UNSUPP = 2
    INVAL = 4
    RANGE = 5
    NOENT = 6
    FAULT = 7
    NOMEM = 8


class Flag(IntFlag):
    """Of a MAP."""

    READ = 1
    WRITE = 2
    MMIO = 4


ATTACH, DETACH, MAP, UNMAP, PROBE = range(1, 6)
READABLE = {ATTACH: 20, DETACH: 20, MAP: 36, UNMAP: 28, PROBE: 72}
HEAD = TAIL = 4

Range = tuple[int, int]
"""First and last; both inside."""


def overlap(one: Range, other: Range) -> bool:
    """Have two ranges an address in common?"""
    return one[0] <= other[1] and other[0] <= one[1]


@dataclass(frozen=True)
class Mapping:
    """One MAP."""

    first: int
    last: int
    phys: int
    flags: int

    @property
    def range(self) -> Range:
        """Its IOVAs."""
        return self.first, self.last


@dataclass
class Domain:
    """Endpoints, and what they share."""

    bypass: bool
    endpoints: set[int] = field(default_factory=set)
    mappings: list[Mapping] = field(default_factory=list)

    def overlaps(self, wanted: Range) -> bool:
        """Is something of a range mapped?"""
        return any(overlap(mapping.range, wanted) for mapping in self.mappings)


@dataclass(frozen=True)
class Limits:
    """What a guest can make the device keep."""

    domains: int = 4096
    mappings: int = 1 << 20
    mappings_per_domain: int = 1 << 18


@dataclass
class Model:
    """The state of the device, and the rules by which it changes."""

    endpoints: dict[int, Sequence[Range]]
    """Reserved regions by endpoint."""
    memory: Sequence[Range]
    """Guest-physical addresses where memory is."""
    granule: int = 4096
    input_range: Range = (0, U64)
    domain_range: Range = (0, 0xFFFF_FFFF)
    probe_size: int = 512
    limits: Limits = Limits()
    mmio: bool = True
    """The driver has accepted MMIO."""
    bypass_config: bool = True
    """The driver has accepted BYPASS_CONFIG."""
    bypass: bool = False
    domains: dict[int, Domain] = field(default_factory=dict)
    attached: dict[int, int] = field(default_factory=dict)
    """Domain by endpoint."""

    def reset(self) -> None:
        """Device reset."""
        self.domains.clear()
        self.attached.clear()

    def serve(self, readable: bytes, writable: int) -> Status | None:
        """Carry out a request; None: it comes back unanswered."""
        if len(readable) < HEAD or writable < TAIL:
            return None
        kind = readable[0]
        if kind not in READABLE or len(readable) < READABLE[kind]:
            return None
        body = readable[HEAD:]
        match kind:
            case 1:
                domain, endpoint, flags, reserved = struct.unpack_from("<IIII", body)
                return Status.INVAL if reserved else self.attach(domain, endpoint, flags)
            case 2:
                return self.detach(*struct.unpack_from("<II", body))
            case 3:
                return self.map(*struct.unpack_from("<IQQQI", body))
            case 4:
                return self.unmap(*struct.unpack_from("<IQQ", body))
            case _:
                return self.probe(struct.unpack_from("<I", body)[0], writable - TAIL)

    def attach(self, domain: int, endpoint: int, flags: int) -> Status:
        """ATTACH, its reserved bytes being zero."""
        bypass = bool(flags & 1)
        if flags & ~1 or (bypass and not self.bypass_config):
            return Status.INVAL
        if not self._in_domain_range(domain):
            return Status.RANGE
        if endpoint not in self.endpoints:
            return Status.NOENT
        there = self.domains.get(domain)
        if there is not None and there.bypass != bypass:
            return Status.INVAL
        before = self.attached.get(endpoint)
        if before == domain:
            # As DETACH and ATTACH: with its only endpoint a domain loses its mappings.
            if len(self.domains[domain].endpoints) == 1:
                self.domains[domain].mappings.clear()
            return Status.OK
        if there is None:
            ends = before is not None and len(self.domains[before].endpoints) == 1
            if len(self.domains) - ends >= self.limits.domains:
                return Status.NOMEM
        elif any(there.overlaps(region) for region in self.endpoints[endpoint]):
            return Status.UNSUPP
        if before is not None:
            self._leave(endpoint)
        self.domains.setdefault(domain, Domain(bypass)).endpoints.add(endpoint)
        self.attached[endpoint] = domain
        return Status.OK

    def detach(self, domain: int, endpoint: int) -> Status:
        """DETACH."""
        if not self._in_domain_range(domain):
            return Status.RANGE
        if endpoint not in self.endpoints:
            return Status.NOENT
        if self.attached.get(endpoint) != domain:
            return Status.INVAL
        self._leave(endpoint)
        return Status.OK

    def _leave(self, endpoint: int) -> None:
        domain = self.attached.pop(endpoint)
        self.domains[domain].endpoints.remove(endpoint)
        if not self.domains[domain].endpoints:
            del self.domains[domain]

    def map(self, domain: int, first: int, last: int, phys: int, flags: int) -> Status:
        """MAP."""
        if flags & ~7 or (flags & Flag.MMIO and not self.mmio):
            return Status.INVAL
        if not self._in_domain_range(domain):
            return Status.RANGE
        there = self.domains.get(domain)
        if there is None:
            return Status.NOENT
        if there.bypass or first > last:
            return Status.INVAL
        if first % self.granule or phys % self.granule or (last + 1) % self.granule:
            return Status.RANGE
        if first < self.input_range[0] or last > self.input_range[1] or phys + last - first > U64:
            return Status.RANGE
        if any(overlap(region, (first, last)) for endpoint in there.endpoints for region in self.endpoints[endpoint]):
            return Status.INVAL
        if there.overlaps((first, last)):
            return Status.INVAL
        everywhere = sum(len(each.mappings) for each in self.domains.values())
        if len(there.mappings) >= self.limits.mappings_per_domain or everywhere >= self.limits.mappings:
            return Status.NOMEM
        # A driver that has both features has no reason to map what is neither memory nor marked as MMIO.
        must_be_memory = self.mmio and self.bypass_config and not flags & Flag.MMIO
        if must_be_memory and not self._is_memory(phys, phys + last - first):
            return Status.FAULT
        there.mappings.append(Mapping(first, last, phys, flags))
        return Status.OK

    def unmap(self, domain: int, first: int, last: int) -> Status:
        """UNMAP."""
        if not self._in_domain_range(domain):
            return Status.RANGE
        there = self.domains.get(domain)
        if there is None:
            return Status.NOENT
        if there.bypass or first > last:
            return Status.INVAL
        touched = [mapping for mapping in there.mappings if overlap(mapping.range, (first, last))]
        if any(mapping.first < first or mapping.last > last for mapping in touched):
            return Status.RANGE
        for mapping in touched:
            there.mappings.remove(mapping)
        return Status.OK

    def probe(self, endpoint: int, room: int) -> Status:
        """PROBE, with so many bytes for properties."""
        if room < self.probe_size:
            return Status.INVAL
        return Status.OK if endpoint in self.endpoints else Status.NOENT

    def translate(self, endpoint: int, iova: int, access: int) -> int | None:
        """Where an access of an endpoint that exists leads."""
        domain = self.attached.get(endpoint)
        if domain is None:
            return iova if self.bypass else None
        there = self.domains[domain]
        if there.bypass:
            return iova
        for mapping in there.mappings:
            if mapping.first <= iova <= mapping.last:
                return mapping.phys + iova - mapping.first if access & ~mapping.flags == 0 else None
        return None

    def interesting(self, domains: Iterable[int]) -> list[int]:
        """Addresses at the edges of what some domains map."""
        edges = {0, U64}
        for domain in domains:
            for mapping in self.domains[domain].mappings:
                edges |= {mapping.first, mapping.last, max(mapping.first - 1, 0), min(mapping.last + 1, U64)}
        return sorted(edges)

    def _in_domain_range(self, domain: int) -> bool:
        return self.domain_range[0] <= domain <= self.domain_range[1]

    def _is_memory(self, first: int, last: int) -> bool:
        return any(overlap((first, last), piece) for piece in self.memory)
