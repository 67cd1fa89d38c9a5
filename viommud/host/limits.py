"""What the host's IOMMU can do for a device reaches the guest: smallest page, input range, reserved regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from viommud.endpoint_id import show
from viommud.errors import UsageError
from viommud.host.uapi import IovaRanges
from viommud.schema import U64_MAX
from viommud.settings import Reserved

if TYPE_CHECKING:
    from viommud.device_setup import DeviceSetup


def holes(ranges: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """What of first to last is in none of the ranges, which are in order."""
    found = []
    at = first
    for start, end in ranges:
        if end < at:
            continue
        if start > last:
            break
        if start > at:
            found.append((at, start - 1))
        at = end + 1
    if at <= last:
        found.append((at, last))
    return found


def reserve(own: Sequence[Reserved], ranges: IovaRanges, first: int, last: int) -> tuple[Reserved, ...]:
    """Regions of an endpoint and the host's holes in its input range; none overlaps another.

    The host's window for interrupts is such a hole: where the endpoint has its MSI region, that says it already.
    """
    regions = list(own)
    taken = sorted((region.first, region.last) for region in own)
    for start, end in holes(ranges.ranges, first, last):
        regions += [Reserved(*piece) for piece in holes(taken, start, end)]
    return tuple(regions)


def apply(setup: DeviceSetup, found: Mapping[int, IovaRanges], resv_mem_bytes: int) -> DeviceSetup:
    """A setup narrowed to what the host can do.

    :param found: by endpoint.
    :raises UsageError: nothing is left, or the regions cannot be told in probe-size bytes.
    """
    if not found:
        return setup
    settings = setup.settings
    alignment = max(ranges.alignment for ranges in found.values())
    mask = settings.page_size_mask & ~(alignment - 1)
    if mask == 0:
        raise UsageError(f"device.page-size-mask: the host's IOMMU maps no less than {alignment:#x} bytes")
    granule = mask & -mask
    first = max(settings.input_first, *(ranges.ranges[0][0] for ranges in found.values()))
    last = min(settings.input_last, *(ranges.ranges[-1][1] for ranges in found.values()))
    first = (first + granule - 1) // granule * granule
    last = (last + 1) // granule * granule - 1
    if first > last:
        raise UsageError("device.input-range: the host's IOMMU translates none of it for all devices")
    endpoints = []
    for entry in setup.endpoints:
        ranges = found.get(entry.first)
        if ranges is None:
            endpoints.append(entry)
            continue
        reserved = reserve(entry.reserved, ranges, first, last)
        if len(reserved) * resv_mem_bytes > settings.probe_size:
            raise UsageError(
                f"device.probe-size = {settings.probe_size}: must be at least {len(reserved) * resv_mem_bytes} "
                f"for the regions that the host reserves for {show(entry.first)}"
            )
        endpoints.append(replace(entry, reserved=reserved))
    return replace(
        setup,
        settings=replace(settings, page_size_mask=mask & U64_MAX, input_first=first, input_last=last),
        endpoints=tuple(endpoints),
    )
