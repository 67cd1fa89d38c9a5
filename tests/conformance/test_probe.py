"""PROBE and its properties (VIRTIO 1.3, 5.13.6.7)."""

from __future__ import annotations

import struct

import pytest
from frontend import iommu
from frontend.guest import Guest

from conformance.backend import (
    ENDPOINT,
    GUARDED,
    HOLE_FIRST,
    HOLE_LAST,
    MSI_FIRST,
    MSI_LAST,
    NOBODY,
    Backend,
)
from conformance.conftest import MakeBackend
from viommud.config import parse
from viommud.device_setup import plan
from viommud.engine import Engine
from viommud.errors import UsageError
from viommud.settings import Reserved, ReservedKind, Settings

SIZE = 512
REGIONS = [iommu.ReservedRegion(1, MSI_FIRST, MSI_LAST), iommu.ReservedRegion(0, HOLE_FIRST, HOLE_LAST)]


@pytest.mark.rule("R-PROBE-1")
@pytest.mark.parametrize("reserved", [b"\xff" * 64, b"\1" + bytes(63), bytes(63) + b"\x80"])
def test_reserved_bytes(guest: Guest, reserved: bytes) -> None:
    """They are ignored."""
    reply = guest.request(iommu.probe(GUARDED, reserved=reserved), SIZE + iommu.TAIL)
    assert reply.status == iommu.OK
    assert iommu.reserved_regions(reply.data) == REGIONS


@pytest.mark.rule("R-PROBE-2")
@pytest.mark.parametrize("endpoint", [0, NOBODY, 0xFFFF_FFFF])
def test_an_endpoint_that_does_not_exist(guest: Guest, endpoint: int) -> None:
    """NOENT, no property, and the full length."""
    reply = guest.probe(endpoint)
    assert reply.used_length == SIZE + iommu.TAIL
    assert reply.data == bytes(SIZE) + bytes([iommu.NOENT, 0, 0, 0])


@pytest.mark.rule("R-PROBE-3")
def test_not_offered(make_backend: MakeBackend) -> None:
    """Without properties to tell, PROBE is an unknown type."""
    backend = make_backend("[device]\nprobe-size = 0\nmsi = 'none'\n")
    with backend.guest() as guest:
        assert not guest.features & iommu.F_PROBE
        assert guest.config().probe_size == 0
        assert guest.request(iommu.probe(ENDPOINT), iommu.TAIL).untouched
        assert guest.request(iommu.probe(ENDPOINT), SIZE + iommu.TAIL).untouched


@pytest.mark.rule("R-PROBE-4", "R-PROBE-5", "R-PROBE-6", "R-PROBE-9", "R-RESV-1")
def test_every_byte_of_the_properties(any_ring: Guest) -> None:
    """Header without reserved bits, lengths without the header, one behind the other, zeroes behind the last."""
    reply = any_ring.probe(GUARDED)
    expected = b"".join(
        struct.pack("<HHB3xQQ", 1, 20, subtype, first, last)
        for subtype, first, last in ((1, MSI_FIRST, MSI_LAST), (0, HOLE_FIRST, HOLE_LAST))
    )
    assert reply.data[: -iommu.TAIL] == expected.ljust(SIZE, b"\0")
    assert reply.status == iommu.OK


@pytest.mark.rule("R-PROBE-6", "R-PROBE-9", "R-PROBE-10")
@pytest.mark.parametrize("count", [0, 1, 2, 21])
@pytest.mark.parametrize("size", [504, 505, 512, 4096])
def test_walking_the_list(make_backend: MakeBackend, count: int, size: int) -> None:
    """Any number of regions that fits, in any size of list; full to the last byte it needs no end mark."""
    regions = ", ".join(f"{{ start = {n << 20:#x}, end = {(n << 20) + 0xFFF:#x} }}" for n in range(count))
    backend = make_backend(
        f"[device]\nmsi = 'none'\nprobe-size = {size}\n[[endpoint]]\nid = {ENDPOINT}\nreserved = [{regions}]\n"
    )
    with backend.guest() as guest:
        reply = guest.probe(ENDPOINT)
        assert reply.status == iommu.OK
        found = iommu.reserved_regions(reply.data[: -iommu.TAIL])
        assert found == [iommu.ReservedRegion(0, n << 20, (n << 20) + 0xFFF) for n in range(count)]
        assert not any(reply.data[count * 24 : size])


@pytest.mark.rule("R-PROBE-7", "R-PROBE-8", "R-PROBE-8a")
@pytest.mark.parametrize("room", [0, 1, 23, 24, 48, SIZE - 1])
def test_too_small_a_list(any_ring: Guest, room: int) -> None:
    """INVAL in the last four bytes, no property before them, and every byte that is counted was written."""
    reply = any_ring.request(iommu.probe(GUARDED), room + iommu.TAIL)
    assert reply.used_length == room + iommu.TAIL
    assert reply.data == bytes(room) + bytes([iommu.INVAL, 0, 0, 0])


@pytest.mark.rule("R-PROBE-10")
def test_properties_that_do_not_fit_are_refused_at_start() -> None:
    """By the configuration, and by the engine."""
    regions = ", ".join(f"{{ start = {n << 20:#x}, end = {(n << 20) + 0xFFF:#x} }}" for n in range(3))
    text = f"[device]\nmsi = 'none'\nprobe-size = 71\n[[endpoint]]\nid = 1\nreserved = [{regions}]\n"
    with pytest.raises(UsageError, match="probe-size"):
        plan(parse(text))
    with Engine(Settings(probe_size=71)) as engine:
        with pytest.raises(ValueError, match="cannot be described"):
            engine.add_endpoints(1, 1, [Reserved(n << 20, (n << 20) + 0xFFF) for n in range(3)])
        engine.add_endpoints(1, 1, [Reserved(n << 20, (n << 20) + 0xFFF) for n in range(2)])


@pytest.mark.rule("R-RESV-2")
def test_one_doorbell() -> None:
    """Two MSI regions of one endpoint are refused, by the configuration and by the engine."""
    two = '{ start = 0, end = 0xfff, type = "msi" }, { start = 0x1000, end = 0x1fff, type = "msi" }'
    with pytest.raises(UsageError, match="one MSI region"):
        plan(parse(f"[[endpoint]]\nid = 1\nreserved = [{two}]\n"))
    with Engine(Settings()) as engine, pytest.raises(ValueError, match="cannot be described"):
        engine.add_endpoints(1, 1, [Reserved(0, 0xFFF, ReservedKind.MSI), Reserved(0x1000, 0x1FFF, ReservedKind.MSI)])


@pytest.mark.rule("R-RESV-3")
@pytest.mark.parametrize(("first", "last"), [(0x1000, 0x1FFF), (0x1FFF, 0x2FFF), (0, 0x1000), (0x1400, 0x15FF)])
def test_regions_that_overlap(first: int, last: int) -> None:
    """Refused, by the configuration and by the engine."""
    text = f"{{ start = 0x1000, end = 0x1fff }}, {{ start = {first}, end = {last} }}"
    with pytest.raises(UsageError, match="apart from the reserved region"):
        plan(parse(f"device.msi = 'none'\n[[endpoint]]\nid = 1\nreserved = [{text}]\n"))
    with Engine(Settings()) as engine, pytest.raises(ValueError, match="cannot be described"):
        engine.add_endpoints(1, 1, [Reserved(0x1000, 0x1FFF), Reserved(first, last)])


@pytest.mark.rule("R-PROBE-2")
def test_probing_changes_nothing(guest: Guest, backend: Backend) -> None:
    """An endpoint can be probed before and after it is attached, as often as a driver likes."""
    first = guest.probe(GUARDED).data
    assert guest.attach(1, GUARDED) == iommu.OK
    for _ in range(100):
        assert guest.probe(GUARDED).data == first
    assert backend.domain_of(GUARDED) == 1
