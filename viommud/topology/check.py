"""Hold a topology against what a guest is told and against what is plugged in; say every difference in one line."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from viommud.topology.description import Description
from viommud.topology.machines import mmio_slot
from viommud.topology.model import Ids, PciRange, PlatformEndpoint, Topology
from viommud.topology.place import MmioPlace, PciPlace, Place
from viommud.topology.running import TRANSLATED, VIRTIO_IOMMU, Function, Running


class Severity(enum.IntEnum):
    """How bad a finding is."""

    NOTE = 0
    WARNING = 1
    """Works, and may not be what is wanted."""
    ERROR = 2
    """The guest's DMA would go wrong, or the guest's driver would refuse."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference."""

    severity: Severity
    sentence: str

    def __str__(self) -> str:
        return f"{self.severity.name.lower()}: {self.sentence}"


def _error(sentence: str) -> Finding:
    return Finding(Severity.ERROR, sentence)


def _warning(sentence: str) -> Finding:
    return Finding(Severity.WARNING, sentence)


def check_description(topology: Topology, description: Description) -> list[Finding]:
    """The differences between what viommud serves and what a guest is told."""
    found = list(_iommus(topology, description))
    ours = [entry.endpoint for entry in description.endpoints if _same(entry.iommu, topology.iommu)]
    found += _conflicts(ours)
    parts = [endpoint for endpoint in ours if isinstance(endpoint, PciRange)]
    found += _own_function(topology.iommu, parts)
    found += _pci_differences(topology, parts)
    found += _platform_differences(topology, [part for part in ours if isinstance(part, PlatformEndpoint)])
    return found


def _same(one: Place, other: Place) -> bool:
    if isinstance(one, MmioPlace) and isinstance(other, MmioPlace):
        return one.base == other.base
    return one == other


def _iommus(topology: Topology, description: Description) -> Iterator[Finding]:
    if not any(_same(place, topology.iommu) for place in description.iommus):
        there = ", ".join(map(str, description.iommus)) or "none"
        yield _error(f"the IOMMU at {topology.iommu} is not described; virtio IOMMUs described: {there}")
    for name, count in _counted(description.iommus):
        if count > 1:
            yield _error(f"the IOMMU at {name} is described {count} times")
    others: set[Place] = {entry.iommu for entry in description.endpoints if not _same(entry.iommu, topology.iommu)}
    for place in sorted(others, key=str):
        yield _warning(f"endpoints of another IOMMU, at {place}, are described too; they are not viommud's")


def _counted(places: Iterable[Place]) -> Iterator[tuple[str, int]]:
    for text, group in itertools.groupby(sorted(map(str, places))):
        yield text, len(list(group))


def _ids(endpoint: PciRange | PlatformEndpoint) -> Ids:
    return endpoint.ids if isinstance(endpoint, PciRange) else Ids(endpoint.id, endpoint.id)


def _name(endpoint: PciRange | PlatformEndpoint) -> str:
    return str(endpoint) if isinstance(endpoint, PciRange) else f"mmio:{endpoint.base:#x}"


def _conflicts(endpoints: list[PciRange | PlatformEndpoint]) -> Iterator[Finding]:
    """IDs given twice, and functions listed twice."""
    by_id = sorted(endpoints, key=lambda endpoint: (_ids(endpoint), _name(endpoint)))
    for one, other in itertools.pairwise(by_id):
        if _ids(one).overlaps(_ids(other)):
            yield _error(f"{_name(one)} and {_name(other)} share endpoint IDs: {_ids(one)} and {_ids(other)}")
    for endpoint in by_id:
        if _ids(endpoint).last > 0xFFFF_FFFF:
            yield _error(f"{_name(endpoint)} has endpoint IDs {_ids(endpoint)}; an ID has 32 bits")
    parts = sorted(endpoint for endpoint in endpoints if isinstance(endpoint, PciRange))
    for before, after in itertools.pairwise(parts):
        if before.segment == after.segment and after.first_rid <= before.last_rid:
            yield _error(f"{before} and {after} list the same functions")


def _own_function(iommu: Place, parts: Iterable[PciRange]) -> Iterator[Finding]:
    for part in parts:
        if (
            isinstance(iommu, PciPlace)
            and part.segment == iommu.segment
            and part.first_rid <= iommu.rid <= part.last_rid
        ):
            yield _error(f"{part} contains the IOMMU's own function {iommu}, which cannot be an endpoint")


def _pci_differences(topology: Topology, parts: Iterable[PciRange]) -> Iterator[Finding]:
    listed = sorted(parts)
    for part in listed:
        for piece in _without(part, topology.pci):
            if topology.iommu == PciPlace(piece.segment, piece.first_rid) and piece.count == 1:
                continue  # said already
            yield _error(f"{piece} (ID {piece.ids}) is described, and viommud does not translate for it")
        for ours in topology.pci:
            piece_or_none = _overlap(part, ours)
            if piece_or_none is not None:
                served = ours.first_id + piece_or_none.first_rid - ours.first_rid
                if served != piece_or_none.first_id:
                    yield _error(
                        f"{piece_or_none} is described with ID {piece_or_none.ids}, and viommud has it"
                        f" as {Ids(served, served + piece_or_none.count - 1)}"
                    )
    for ours in topology.pci:
        for piece in _without(ours, listed):
            yield _error(
                f"{piece} (ID {piece.ids}) is an endpoint, and is not described: the guest would not map for it"
            )


def _overlap(part: PciRange, other: PciRange) -> PciRange | None:
    """The functions of a range that are in another one."""
    first, last = max(part.first_rid, other.first_rid), min(part.last_rid, other.last_rid)
    if part.segment != other.segment or first > last:
        return None
    return PciRange(part.segment, first, last, part.first_id + first - part.first_rid)


def _without(part: PciRange, others: Iterable[PciRange]) -> Iterator[PciRange]:
    """The functions of a range that are in no other one."""
    first = part.first_rid
    for other in sorted(others):
        if other.segment == part.segment and other.last_rid >= first and other.first_rid <= part.last_rid:
            if first < other.first_rid:
                yield PciRange(part.segment, first, other.first_rid - 1, part.first_id + first - part.first_rid)
            first = max(first, other.last_rid + 1)
    if first <= part.last_rid:
        yield PciRange(part.segment, first, part.last_rid, part.first_id + first - part.first_rid)


def _platform_differences(topology: Topology, described: Iterable[PlatformEndpoint]) -> Iterator[Finding]:
    by_base = {endpoint.base: endpoint for endpoint in described}
    ours = {endpoint.base: endpoint for endpoint in topology.platform}
    for base, endpoint in sorted(by_base.items()):
        if base not in ours:
            yield _error(f"{_name(endpoint)} (ID {endpoint.id:#x}) is described, and viommud does not translate for it")
        elif ours[base].id != endpoint.id:
            yield _error(f"{_name(endpoint)} is described with ID {endpoint.id:#x}, and viommud has {ours[base].id:#x}")
    for base, endpoint in sorted(ours.items()):
        if base not in by_base:
            yield _error(f"{_name(endpoint)} (ID {endpoint.id:#x}) is an endpoint, and is not described")


def check_running(topology: Topology, running: Running) -> list[Finding]:
    """The differences between what viommud serves and what is plugged into QEMU."""
    return [*_running_iommu(topology, running), *_running_endpoints(topology, running)]


def _running_iommu(topology: Topology, running: Running) -> Iterator[Finding]:
    place = topology.iommu
    if isinstance(place, MmioPlace):
        slot = mmio_slot(topology.machine, place.base)
        if slot not in running.mmio_slots:
            there = ", ".join(map(str, running.mmio_slots)) or "none"
            yield _error(
                f"no generic vhost-user device is in virtio-mmio slot {slot}, which is {place}; slots: {there}"
            )
        return
    function = next((found for found in running.functions if found.rid == place.rid), None)
    if function is None or place.segment != 0:
        yield _error(f"the IOMMU's place {place} is empty")
    elif (function.vendor, function.device) != VIRTIO_IOMMU:
        yield _error(f"{place} is {_what(function)} and no virtio-iommu")


def _running_endpoints(topology: Topology, running: Running) -> Iterator[Finding]:
    for part in topology.pci:
        inside = [
            found for found in running.functions if part.segment == 0 and part.first_rid <= found.rid <= part.last_rid
        ]
        if not inside:
            finding = _error if part.count == 1 else _warning
            yield finding(f"no device is at {part}, which is an endpoint")
        for function in inside:
            place = PciPlace(0, function.rid)
            if function.kind is None:
                yield Finding(Severity.NOTE, f"{place} is {_what(function)}; QEMU does not tell who does its DMA")
            elif function.kind not in TRANSLATED:
                yield _error(f"{place} is an endpoint and is {_what(function)}: QEMU does its DMA itself, untranslated")
    for function in running.functions:
        listed = any(part.segment == 0 and part.first_rid <= function.rid <= part.last_rid for part in topology.pci)
        if function.kind in TRANSLATED and not listed:
            yield _warning(f"{PciPlace(0, function.rid)} is {_what(function)} and no endpoint: its DMA is not confined")


def _what(function: Function) -> str:
    name = f"{function.vendor:04x}:{function.device:04x}"
    return f"{function.kind} ({name})" if function.kind else name
