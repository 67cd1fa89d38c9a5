"""Personalities for drivers from before the released specification, and what drivers of another age meet.

Nothing on the wire tells a driver's age, so the user chooses.  A wrong choice must not map what a driver did not mean:
its requests are refused, each in a way that the driver takes for a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from frontend import iommu
from frontend.guest import Guest
from frontend.legacy import EXEC, READ, WRITE, Driver2017, Driver2018, DriverEarly2018, EarlyConfig, EarlyDriver
from frontend.legacy import EarlyFault as Fault

from conformance.backend import (
    CONFIG,
    ENDPOINT,
    GUARDED,
    HOLE_FIRST,
    HOLE_LAST,
    MSI_FIRST,
    MSI_LAST,
    NOBODY,
    PAGE,
    RAM,
    SIBLING,
    U64,
    Backend,
)
from conformance.conftest import MakeBackend

OWN = {"0.9": Driver2018, "0.5": Driver2017}
"""The driver that each personality is for."""

UNANSWERED = None


def configuration(personality: str) -> str:
    """The usual configuration for drivers of an age."""
    if personality == "1.x":
        return CONFIG
    return CONFIG.replace(
        "[device]", f'[device]\npersonality = "{personality}"\ndomain-range = {{ start = 0, end = 0xffff }}'
    )


@contextmanager
def driver(backend: Backend, kind: type[EarlyDriver]) -> Iterator[EarlyDriver]:
    """A started driver of an age."""
    with backend.guest(features=kind.accepted(backend.features()), queue_size=64) as guest:
        yield kind(guest)


@pytest.mark.parametrize("personality", OWN)
def test_what_is_offered(make_backend: MakeBackend, personality: str) -> None:
    """Bit 1 with a number of bits in 32 bytes of configuration; no feature of a later age."""
    backend = make_backend(configuration(personality))
    later = iommu.F_MMIO | iommu.F_BYPASS_CONFIG
    assert not int(backend.engine.offered_features) & later
    with driver(backend, OWN[personality]) as early:
        assert early.config() == EarlyConfig((1 << 64) - PAGE, 0, U64, 16, 512)
        assert early.guest.client.get_config(40) == b"", "there are 32 bytes and no more"


@pytest.mark.rule("R-FAULT-6")
@pytest.mark.parametrize("personality", OWN)
def test_a_driver_of_its_age(make_backend: MakeBackend, personality: str) -> None:
    """Everything it does works: two endpoints, mappings, faults, probing, leaving."""
    backend = make_backend(configuration(personality))
    with driver(backend, OWN[personality]) as early:
        assert early.attach(1, ENDPOINT) == iommu.OK
        assert early.attach(1, SIBLING) == iommu.OK
        assert early.map(1, 0x10_0000, RAM + 0x3000, 2 * PAGE) == iommu.OK
        assert early.map(1, 0x20_0000, RAM + 0x8000, PAGE, READ) == iommu.OK
        for endpoint in (ENDPOINT, SIBLING):
            assert backend.translate(endpoint, 0x10_1234, WRITE) == RAM + 0x4234
            assert backend.translate(endpoint, 0x10_2000) is None
            assert backend.translate(endpoint, 0xF_FFFF) is None
            assert backend.translate(endpoint, 0x20_0000, WRITE) is None
        assert early.map(1, 0x10_1000, RAM, PAGE) == iommu.INVAL
        assert early.map(2, 0, RAM, PAGE) == iommu.NOENT
        assert early.unmap(1, 0x10_0000, PAGE) == iommu.RANGE
        assert early.unmap(1, 0x10_0000, 2 * PAGE) == iommu.OK
        assert backend.translate(ENDPOINT, 0x10_0000) is None
        assert early.probe(GUARDED) == [(1, MSI_FIRST, MSI_LAST), (0, HOLE_FIRST, HOLE_LAST)]
        assert early.probe(NOBODY) == iommu.NOENT
        posted = early.guest.post_event_buffers(1, early.FAULT_SIZE)
        assert backend.fault(SIBLING, 2, READ | 0x100, 0x1234_5678_9ABC)
        (used,) = early.guest.rings[1].wait()
        assert used.length == early.FAULT_SIZE
        data = early.guest.memory.read(posted[used.id], used.length)
        assert early.parse_fault(data) == Fault(2, READ | 0x100, SIBLING, 0x1234_5678_9ABC)
        assert early.detach(1, SIBLING) == iommu.OK
        assert backend.domain_of(SIBLING) is None
        assert early.detach(1, ENDPOINT) == iommu.OK
        assert backend.domains() == []


@pytest.mark.parametrize("personality", OWN)
@pytest.mark.parametrize("flags", range(4))
def test_exec_has_no_effect(make_backend: MakeBackend, personality: str, flags: int) -> None:
    """The flag that the drafts had is accepted; reading and writing are what the other two say."""
    backend = make_backend(configuration(personality))
    with driver(backend, OWN[personality]) as early:
        assert early.attach(1, ENDPOINT) == iommu.OK
        assert early.map(1, PAGE, RAM, PAGE, flags | EXEC) == iommu.OK
        for access in (READ, WRITE):
            assert (backend.translate(ENDPOINT, PAGE, access) is not None) == bool(flags & access)


def test_mmio_of_2018(make_backend: MakeBackend) -> None:
    """Flag 8, for the doorbell: no feature is needed, and the target need not be memory."""
    backend = make_backend(configuration("0.9"))
    with driver(backend, Driver2018) as early:
        assert early.attach(1, ENDPOINT) == iommu.OK
        assert early.map(1, 0x800_0000, 0x808_0000, PAGE, WRITE | Driver2018.MMIO) == iommu.OK
        (found,) = backend.mappings(1) or []
        assert (found.phys, found.flags) == (0x808_0000, iommu.WRITE | iommu.MMIO)
        for flags in (16, 32, 1 << 31):
            assert early.map(1, PAGE, RAM, PAGE, flags | READ) == iommu.INVAL


def test_mmio_in_2017(make_backend: MakeBackend) -> None:
    """There was none: flag 8 is unknown."""
    backend = make_backend(configuration("0.5"))
    with driver(backend, Driver2017) as early:
        assert early.attach(1, ENDPOINT) == iommu.OK
        assert early.map(1, PAGE, RAM, PAGE, WRITE | 8) == iommu.INVAL
        assert backend.mappings(1) == []


@pytest.mark.parametrize(
    ("virt", "phys", "size", "status"),
    [
        (PAGE, RAM, 0, iommu.INVAL),
        (U64 - PAGE + 1, RAM, 2 * PAGE, iommu.INVAL),
        (PAGE, RAM, U64, iommu.INVAL),
        (PAGE, RAM, PAGE - 1, iommu.RANGE),
        (PAGE + 1, RAM, PAGE, iommu.RANGE),
        (PAGE, RAM + 1, PAGE, iommu.RANGE),
        (PAGE, U64 - PAGE + 1, 2 * PAGE, iommu.RANGE),
        (U64 - PAGE + 1, RAM, PAGE, iommu.OK),
    ],
)
def test_sizes_of_2017(make_backend: MakeBackend, virt: int, phys: int, size: int, status: int) -> None:
    """No size, one that wraps around or is not aligned, and the last page of all."""
    backend = make_backend(configuration("0.5"))
    with driver(backend, Driver2017) as early:
        assert early.attach(1, ENDPOINT) == iommu.OK
        assert early.map(1, virt, phys, size) == status
        assert len(backend.mappings(1) or []) == (status == iommu.OK)
        if status == iommu.INVAL:
            assert early.unmap(1, virt, size) == iommu.INVAL
        elif status == iommu.OK:
            assert early.unmap(1, virt, size) == iommu.OK
            assert backend.mappings(1) == []


@pytest.mark.rule("R-OPS-7")
@pytest.mark.parametrize("personality", ["1.x", "0.9"])
@pytest.mark.parametrize("kind", [Driver2017, DriverEarly2018])
def test_drivers_with_the_short_attach(make_backend: MakeBackend, personality: str, kind: type[EarlyDriver]) -> None:
    """Their ATTACH is no ATTACH: unanswered, which they log as a failure. No missing byte is made up."""
    backend = make_backend(configuration(personality))
    with driver(backend, kind) as early:
        assert early.attach(1, ENDPOINT) is UNANSWERED
        assert backend.domains() == []
        assert early.map(1, PAGE, RAM, PAGE) == iommu.NOENT
        assert early.unmap(1, PAGE, PAGE) in (iommu.NOENT, iommu.INVAL)
        assert early.detach(1, ENDPOINT) is UNANSWERED
        assert [backend.translate(endpoint, PAGE) for endpoint in (ENDPOINT, SIBLING, GUARDED)] == [None] * 3


def test_sizes_are_never_taken_for_addresses(make_backend: MakeBackend) -> None:
    """A driver of early 2018 before the personality of 2017: what it maps has a misaligned target there, RANGE."""
    backend = make_backend(configuration("0.5"))
    with driver(backend, DriverEarly2018) as early:
        assert early.attach(1, ENDPOINT) == iommu.OK
        for virt, phys, size in ((0, RAM, PAGE), (PAGE, RAM, PAGE), (RAM, RAM, 16 * PAGE), (0, 0, 1 << 40)):
            assert early.map(1, virt, phys, size) in (iommu.RANGE, iommu.INVAL)
        assert backend.mappings(1) == []


@pytest.mark.rule("R-OPS-7")
def test_a_driver_of_2018_before_2017(make_backend: MakeBackend) -> None:
    """Its ATTACH and DETACH are too long for their age: unanswered. DETACH would name the domain as the endpoint."""
    backend = make_backend(configuration("0.5"))
    with driver(backend, Driver2018) as late:
        assert late.attach(1, ENDPOINT) is UNANSWERED
        assert backend.domains() == []
        # Were there a domain, a MAP would have a misaligned target.
        assert Driver2017(late.guest).attach(1, ENDPOINT) == iommu.OK
        assert late.map(1, PAGE, RAM, PAGE) == iommu.RANGE
        assert late.detach(ENDPOINT, SIBLING) is UNANSWERED
        assert backend.domain_of(ENDPOINT) == 1
        assert backend.mappings(1) == []


@pytest.mark.rule("R-OPS-7")
@pytest.mark.parametrize("flags", [0, iommu.ATTACH_BYPASS])
def test_a_driver_of_today_before_2017(make_backend: MakeBackend, flags: int) -> None:
    """As one of 2018: unanswered, whatever its flags."""
    backend = make_backend(configuration("0.5"))
    with backend.guest(features=backend.features()) as guest:
        assert guest.request(iommu.attach(1, ENDPOINT, flags=flags)).untouched
        assert backend.domains() == []
        assert guest.map(1, PAGE, 2 * PAGE - 1, RAM) in (iommu.NOENT, iommu.INVAL)


def test_a_driver_of_2018_before_today(make_backend: MakeBackend) -> None:
    """Its memory mappings are right, its MMIO flag is unknown: INVAL, and no mapping."""
    backend = make_backend(configuration("1.x"))
    with driver(backend, Driver2018) as early:
        assert early.attach(0, ENDPOINT) == iommu.OK
        assert early.map(0, PAGE, RAM, PAGE) == iommu.OK
        assert backend.translate(ENDPOINT, PAGE + 5, WRITE) == RAM + 5
        assert early.map(0, 0x800_0000, 0x808_0000, PAGE, WRITE | Driver2018.MMIO) == iommu.INVAL
        assert early.unmap(0, PAGE, PAGE) == iommu.OK
        assert early.detach(0, ENDPOINT) == iommu.OK


@pytest.mark.parametrize("flags", [iommu.READ, iommu.WRITE, iommu.READ | iommu.WRITE])
def test_a_driver_of_today_before_2018(make_backend: MakeBackend, flags: int) -> None:
    """ATTACH with BYPASS is INVAL; what it maps, also with its MMIO flag, is what it meant."""
    backend = make_backend(configuration("0.9"))
    with backend.guest(features=backend.features()) as guest:
        assert guest.attach(1, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.INVAL
        assert backend.domains() == []
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, PAGE, 2 * PAGE - 1, RAM, flags=flags | iommu.MMIO) == iommu.OK
        (found,) = backend.mappings(1) or []
        assert (found.first, found.last, found.phys, found.flags & 3) == (PAGE, 2 * PAGE - 1, RAM, flags)


def test_a_driver_of_2019(guest: Guest, backend: Backend) -> None:
    """Version 0.12: ATTACH with eight reserved bytes, everything else as today."""
    assert guest.request(iommu.attach(3, ENDPOINT)).status == iommu.OK
    assert guest.map(3, PAGE, 2 * PAGE - 1, RAM, flags=iommu.WRITE | iommu.MMIO) == iommu.OK
    assert backend.translate(ENDPOINT, PAGE, WRITE) == RAM
