"""The topology of a platform: where the IOMMU is, and which endpoint ID each device behind it has.

The section of the configuration says where things are; the endpoints' IDs are the daemon's own, so that what a guest is
told and what the daemon serves cannot differ.

The ID of a PCI function is its bridge's first_id plus the distance of its requester ID from the bridge's first
(Documentation/devicetree/bindings/pci/pci-iommu.txt and drivers/acpi/viot.c of Linux count the same way).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from viommud.schema import Wrong
from viommud.topology.errors import TopologyError
from viommud.topology.place import MAX_ADDRESS, MmioPlace, PciPlace, Place, parse_place, rid_text
from viommud.topology.section import MAX_ID, BridgeSection, Machine, PlatformSection, TopologySection

_ACPI_PATH = re.compile(r"\\[A-Z_][A-Z0-9_]{0,3}(\.[A-Z_][A-Z0-9_]{0,3})*")
_MAX_ACPI_PATH = 255


@dataclass(frozen=True, slots=True, order=True)
class Ids:
    """Endpoint IDs from first to last, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first:#x}" if self.first == self.last else f"{self.first:#x}-{self.last:#x}"

    def overlaps(self, other: Ids) -> bool:
        """Whether an ID is in both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class Bridge:
    """A PCI host bridge, and the IDs of the functions behind it."""

    segment: int
    first_bus: int
    last_bus: int
    first_id: int

    @property
    def first_rid(self) -> int:
        """Requester ID of the first function of the first bus."""
        return self.first_bus << 8

    @property
    def last_rid(self) -> int:
        """Requester ID of the last function of the last bus."""
        return self.last_bus << 8 | 0xFF

    @property
    def ids(self) -> Ids:
        """The IDs of its functions."""
        return Ids(self.first_id, self.first_id + self.last_rid - self.first_rid)

    def holds(self, place: PciPlace) -> bool:
        """Whether the function is on one of its buses."""
        return self.segment == place.segment and self.first_rid <= place.rid <= self.last_rid

    def __str__(self) -> str:
        return f"bridge {self.segment:04x}:{self.first_bus:02x}-{self.last_bus:02x}"


@dataclass(frozen=True, slots=True, order=True)
class PciRange:
    """Consecutive functions of one bridge with consecutive endpoint IDs, both ends included."""

    segment: int
    first_rid: int
    last_rid: int
    first_id: int

    @property
    def ids(self) -> Ids:
        """The endpoint IDs."""
        return Ids(self.first_id, self.first_id + self.last_rid - self.first_rid)

    @property
    def count(self) -> int:
        """How many functions."""
        return self.last_rid - self.first_rid + 1

    def __str__(self) -> str:
        first = f"{self.segment:04x}:{rid_text(self.first_rid)}"
        return first if self.count == 1 else f"{first}-{rid_text(self.last_rid)}"


@dataclass(frozen=True, slots=True, order=True)
class PlatformEndpoint:
    """An endpoint with registers of its own in guest-physical space."""

    id: int
    base: int
    acpi: str | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole and valid topology; made by :meth:`build`."""

    machine: Machine
    iommu: Place
    bridges: tuple[Bridge, ...]
    pci: tuple[PciRange, ...]
    """Ordered by segment and requester ID, neighbours merged."""
    platform: tuple[PlatformEndpoint, ...]
    """Ordered by ID."""

    @classmethod
    def build(cls, section: TopologySection, endpoints: Iterable[Ids]) -> Self:
        """The topology of these endpoint IDs on the platform of this section.

        :raises TopologyError: they contradict each other, or an endpoint has no place.
        """
        iommu = _iommu(section)
        bridges = tuple(_bridges(section.bridge))
        platform = _platform(section.platform, bridges, iommu)
        if isinstance(iommu, PciPlace) and not any(bridge.holds(iommu) for bridge in bridges):
            raise TopologyError(f"topology.iommu: {iommu} is on no bus of {_names(bridges)}")
        ids = _disjoint(endpoints)
        pci = _merged(part for given in ids for part in _functions(given, bridges, platform))
        if isinstance(iommu, PciPlace):
            for part in pci:
                if part.segment == iommu.segment and part.first_rid <= iommu.rid <= part.last_rid:
                    own = part.first_id + iommu.rid - part.first_rid
                    raise TopologyError(
                        f"endpoint {own:#x}: {iommu} is the IOMMU's own function, which cannot be an endpoint",
                        hint="end the range before it and begin another one after it",
                    )
        for endpoint in platform:
            if not any(given.first <= endpoint.id <= given.last for given in ids):
                raise TopologyError(f"topology.platform: there is no endpoint with the ID {endpoint.id:#x}")
        return cls(section.machine, iommu, bridges, pci, platform)

    def find(self, endpoint: int) -> PciPlace | PlatformEndpoint | None:
        """Where the endpoint with this ID is."""
        for part in self.pci:
            if part.ids.first <= endpoint <= part.ids.last:
                return PciPlace(part.segment, part.first_rid + endpoint - part.first_id)
        return next((found for found in self.platform if found.id == endpoint), None)


def _iommu(section: TopologySection) -> Place:
    place = parse_place(section.iommu, "topology.iommu")
    if isinstance(place, PciPlace):
        return place
    window = MmioPlace(place.base, section.span, section.interrupt)
    if window.last > MAX_ADDRESS:
        raise TopologyError(f"topology.iommu: {window} with {window.span:#x} bytes ends beyond 64 bits")
    return window


def _bridges(sections: Sequence[BridgeSection]) -> list[Bridge]:
    bridges: list[Bridge] = []
    for number, section in enumerate(sections):
        where = f"topology.bridge[{number}]"
        first, last = section.first_bus, section.last_bus
        if first > last:
            raise Wrong(f"{where}.first-bus", first, f"at most its last-bus, which is {last}")
        base = section.segment << 16 | first << 8 if section.first_id is None else section.first_id
        bridge = Bridge(section.segment, first, last, base)
        if bridge.ids.last > MAX_ID:
            raise TopologyError(
                f"{where}.first-id: {bridge.ids.first:#x} leaves no room for the {bridge.ids.last - base + 1:#x}"
                f" functions of {bridge}; an endpoint ID has 32 bits"
            )
        for other in bridges:
            if bridge.segment == other.segment and first <= other.last_bus and other.first_bus <= last:
                raise TopologyError(f"{where}: {bridge} shares buses with {other}")
            if bridge.ids.overlaps(other.ids):
                raise TopologyError(
                    f"{where}.first-id: {bridge} would have endpoint IDs {bridge.ids}, and {other} has {other.ids}"
                )
        bridges.append(bridge)
    return bridges


def _platform(
    sections: Sequence[PlatformSection], bridges: Sequence[Bridge], iommu: Place
) -> tuple[PlatformEndpoint, ...]:
    found: list[PlatformEndpoint] = []
    for number, section in enumerate(sections):
        where = f"topology.platform[{number}]"
        if section.acpi is not None and (len(section.acpi) > _MAX_ACPI_PATH or not _ACPI_PATH.fullmatch(section.acpi)):
            raise Wrong(f"{where}.acpi", section.acpi, r"a path in the ACPI namespace, as '\_SB.VR00'")
        for bridge in bridges:
            if bridge.ids.first <= section.id <= bridge.ids.last:
                raise TopologyError(f"{where}.id: {section.id:#x} belongs to {bridge}, which has {bridge.ids}")
        for other in found:
            if other.id == section.id:
                raise TopologyError(f"{where}.id: {section.id:#x} is given to two devices")
            if other.base == section.base:
                raise TopologyError(f"{where}.base: two endpoints have their registers at {section.base:#x}")
        if isinstance(iommu, MmioPlace) and iommu.base <= section.base <= iommu.last:
            raise TopologyError(
                f"{where}.base: {section.base:#x} is in the window of the IOMMU itself, which cannot be an endpoint"
            )
        found.append(PlatformEndpoint(section.id, section.base, section.acpi))
    return tuple(sorted(found))


def _disjoint(endpoints: Iterable[Ids]) -> list[Ids]:
    ordered = sorted(endpoints)
    for given in ordered:
        if not 0 <= given.first <= given.last <= MAX_ID:
            raise TopologyError(f"endpoint {given}: IDs go upwards from 0 to {MAX_ID:#x}")
    for given, following in itertools.pairwise(ordered):
        if given.overlaps(following):
            raise TopologyError(f"endpoints {given} and {following} overlap: an ID names one endpoint")
    return ordered


def _functions(given: Ids, bridges: Sequence[Bridge], platform: Sequence[PlatformEndpoint]) -> Iterable[PciRange]:
    """The PCI functions that have these IDs; every ID must be that of a function or of a platform endpoint."""
    placed = 0
    for bridge in bridges:
        if bridge.ids.overlaps(given):
            first = max(given.first, bridge.ids.first)
            last = min(given.last, bridge.ids.last)
            rid = bridge.first_rid + first - bridge.first_id
            yield PciRange(bridge.segment, rid, rid + last - first, first)
            placed += last - first + 1
    placed += sum(1 for endpoint in platform if given.first <= endpoint.id <= given.last)
    if placed != given.last - given.first + 1:
        windows = ", ".join(f"{bridge} has {bridge.ids}" for bridge in bridges)
        raise TopologyError(
            f"endpoint {given}: not every ID has a place; {windows or 'there is no bridge'},"
            f" and topology.platform places {len(platform)} more"
        )


def _merged(parts: Iterable[PciRange]) -> tuple[PciRange, ...]:
    merged: list[PciRange] = []
    for part in sorted(parts):
        before = merged[-1] if merged else None
        if (
            before is not None
            and before.segment == part.segment
            and before.last_rid + 1 == part.first_rid
            and before.ids.last + 1 == part.first_id
        ):
            merged[-1] = PciRange(before.segment, before.first_rid, part.last_rid, before.first_id)
        else:
            merged.append(part)
    return tuple(merged)


def _names(bridges: Sequence[Bridge]) -> str:
    return ", ".join(map(str, bridges)) or "any bridge: there is none"
