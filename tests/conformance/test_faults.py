"""Fault reports (VIRTIO 1.3, 5.13.6.9): layout, buffers, and what happens when there are none."""

from __future__ import annotations

import itertools
import struct
import time

import pytest
from frontend import iommu, wire
from frontend.guest import POISON, Guest
from frontend.ring import Buffer, Used, quiet, wait_until

from conformance.backend import CONFIG, ENDPOINT, GUARDED, SIBLING, U64, Backend
from conformance.conftest import MakeBackend

UNKNOWN, DOMAIN, MAPPING = range(3)
ADDRESS = 0x100
EXEC = 4


def patient(faults: int, wait_ms: int = 3_600_000) -> str:
    """A configuration that keeps so many reports so long, and lets an endpoint raise what it likes."""
    return CONFIG + f"[limits]\nfault-wait-ms = {wait_ms}\nfault-burst = 1000000\nfaults = {faults}\n"


def report(guest: Guest, posted: dict[int, int], used: Used) -> bytes:
    """What the device put into an event buffer."""
    return guest.memory.read(posted.pop(used.id), used.length)


def events(guest: Guest) -> bytes:
    """One event buffer, posted and waited for."""
    posted = guest.post_event_buffers(1)
    (used,) = guest.rings[iommu.EVENT_QUEUE].wait()
    return report(guest, posted, used)


@pytest.mark.rule("R-FAULT-1", "R-FAULT-2", "R-FAULT-3")
@pytest.mark.parametrize("reason", [UNKNOWN, DOMAIN, MAPPING])
def test_layout(any_ring: Guest, backend: Backend, reason: int) -> None:
    """24 bytes, each where it belongs, for every reason and every set of flags; nothing undefined is set."""
    for flags in range(8):
        for address in (0, 0x1234_5678_9ABC_DEF0, U64):
            assert backend.fault(SIBLING, reason, flags | ADDRESS, address)
            expected = struct.pack("<B3xIII4xQ", reason, (flags & 3) | ADDRESS, SIBLING, 0, address)[:12]
            expected += struct.pack("<IQ", 0, address)
            assert events(any_ring) == expected


@pytest.mark.rule("R-FAULT-2")
def test_undefined_flags_are_never_told(guest: Guest, backend: Backend) -> None:
    """Whatever a back-end of the engine raises, bits other than READ, WRITE and ADDRESS stay zero."""
    assert backend.fault(ENDPOINT, MAPPING, 0xFFFF_FFFF, 0x1000)
    assert iommu.fault(events(guest)).flags == iommu.READ | iommu.WRITE | ADDRESS


@pytest.mark.rule("R-FAULT-3")
def test_only_endpoints_that_exist(guest: Guest, backend: Backend) -> None:
    """A fault of an endpoint that is not there is no report."""
    with pytest.raises(ValueError, match="no endpoint"):
        backend.fault(0x9999, MAPPING)
    assert backend.fault(GUARDED, MAPPING)
    assert iommu.fault(events(guest)).endpoint == GUARDED


@pytest.mark.rule("R-FAULT-4")
def test_without_an_address(guest: Guest, backend: Backend) -> None:
    """Where it is not known, ADDRESS is clear and the field is zero."""
    assert backend.fault(ENDPOINT, DOMAIN, iommu.READ, 0x1234)
    assert iommu.fault(events(guest)) == iommu.Fault(DOMAIN, iommu.READ, ENDPOINT, 0)


@pytest.mark.rule("R-FAULT-5")
@pytest.mark.parametrize("size", [1, 8, 20, 23])
def test_too_small_a_buffer(any_ring: Guest, backend: Backend, size: int) -> None:
    """It comes back empty; the report goes whole into the next that is large enough."""
    ring = any_ring.rings[iommu.EVENT_QUEUE]
    small = any_ring.post_event_buffers(2, size)
    large = any_ring.post_event_buffers(1)
    assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 0x4000)
    first, second, third = ring.wait(3)
    assert (first.length, second.length, third.length) == (0, 0, 24)
    assert all(any_ring.memory.read(address, size) == bytes([POISON]) * size for address in small.values())
    assert iommu.fault(report(any_ring, large, third)).address == 0x4000


@pytest.mark.rule("R-FAULT-5")
def test_a_larger_or_divided_buffer(any_ring: Guest, backend: Backend) -> None:
    """One buffer of many descriptors is one buffer; bytes behind the report are not touched and not counted."""
    ring = any_ring.rings[iommu.EVENT_QUEUE]
    address = any_ring.memory.allocate(64)
    any_ring.memory.write(address, bytes([POISON]) * 64)
    ring.submit([Buffer(address + at, 1, writable=True) for at in range(64)])
    assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 0x4000)
    (used,) = ring.wait()
    assert used.length == 24
    assert iommu.fault(any_ring.memory.read(address, 24)).address == 0x4000
    assert any_ring.memory.read(address + 24, 40) == bytes([POISON]) * 40


@pytest.mark.rule("R-FAULT-5")
def test_a_buffer_that_is_not_writable(any_ring: Guest, backend: Backend) -> None:
    """Given back empty: the report waits for a better one."""
    ring = any_ring.rings[iommu.EVENT_QUEUE]
    address = any_ring.memory.allocate(24)
    any_ring.memory.write(address, bytes([POISON]) * 24)
    ring.submit([Buffer(address, 24)])
    assert backend.fault(ENDPOINT, UNKNOWN)
    (used,) = ring.wait()
    assert used.length == 0
    assert any_ring.memory.read(address, 24) == bytes([POISON]) * 24
    assert iommu.fault(events(any_ring)).reason == UNKNOWN


@pytest.mark.rule("R-FAULT-6")
def test_the_short_form_is_for_early_drivers(make_backend: MakeBackend) -> None:
    """20 bytes for a driver of 2017; never for one of the released specification, not even where only 20 fit."""
    backend = make_backend("[device]\npersonality = '0.5'\nbypass = false\nmsi = 'none'\n")
    with backend.guest() as guest:
        posted = guest.post_event_buffers(1, 20)
        assert backend.fault(ENDPOINT, MAPPING, iommu.WRITE | ADDRESS, 0x1234_5678_9ABC)
        (used,) = guest.rings[iommu.EVENT_QUEUE].wait()
        assert report(guest, posted, used) == struct.pack("<B3xIIQ", MAPPING, 0x102, ENDPOINT, 0x1234_5678_9ABC)


@pytest.mark.rule("R-FAULT-7")
def test_reports_wait_for_buffers(make_backend: MakeBackend) -> None:
    """As many as may wait do, in order; the rest is dropped and counted."""
    backend = make_backend(patient(20))
    with backend.guest(features=backend.features()) as guest:
        raised = [backend.fault(ENDPOINT, MAPPING, ADDRESS, number) for number in range(50)]
        assert raised == [True] * 20 + [False] * 30
        posted = guest.post_event_buffers(30)
        told = [iommu.fault(report(guest, posted, used)).address for used in guest.rings[1].wait(20)]
        assert told == list(range(20))
        stats = backend.engine.stats()
        assert (stats.faults_sent, stats.faults_dropped) == (20, 30)


@pytest.mark.rule("R-FAULT-7")
def test_a_report_that_waited_too_long(make_backend: MakeBackend) -> None:
    """It is dropped and counted: a driver that comes back later is told of what happens then."""
    backend = make_backend(patient(20, wait_ms=20))
    with backend.guest(features=backend.features()) as guest:
        assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 1)
        raised = time.monotonic()
        wait_until(lambda: time.monotonic() - raised > 0.1, "the report to be too old")
        posted = guest.post_event_buffers(2)
        wait_until(lambda: backend.engine.stats().faults_dropped == 1, "the report to be dropped")
        assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 2)
        (used,) = guest.rings[1].wait()
        assert iommu.fault(report(guest, posted, used)).address == 2


@pytest.mark.rule("R-FAULT-7")
def test_a_device_reset_drops_what_waits(backend: Backend) -> None:
    """A new driver is not told of the old one's faults."""
    with backend.guest(features=backend.features()) as guest:
        assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 1)
        guest.reset_and_start()
        assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 2)
        assert iommu.fault(events(guest)).address == 2


@pytest.mark.rule("R-FAULT-7")
def test_a_storm_of_one_endpoint_hides_no_other(make_backend: MakeBackend) -> None:
    """100 000 faults of one endpoint at its rate; another's is told all the same, and every one is accounted for."""
    backend = make_backend(CONFIG + "[limits]\nfault-burst = 8\nfault-rate = 1\nfaults = 64\nfault-wait-ms = 3600000\n")
    with backend.guest(features=backend.features()) as guest:
        sent = sum(backend.engine.raise_fault(ENDPOINT, MAPPING, ADDRESS, number) for number in range(100_000))
        assert 8 <= sent < 64
        assert backend.fault(SIBLING, MAPPING, ADDRESS, 7)
        posted = guest.post_event_buffers(100)
        told = [iommu.fault(report(guest, posted, used)) for used in guest.rings[1].wait(sent + 1)]
        assert told[-1] == iommu.Fault(MAPPING, ADDRESS, SIBLING, 7)
        assert [fault.address for fault in told[:8]] == list(range(8))
        stats = backend.engine.stats()
        assert stats.faults_sent + stats.faults_dropped == 100_001


@pytest.mark.rule("R-FAULT-8", "R-STAT-2")
@pytest.mark.parametrize("queue", [0, 1])
def test_a_broken_ring_is_no_fault(backend: Backend, queue: int) -> None:
    """What no endpoint did is told by DEVICE_NEEDS_RESET and the ring's error eventfd; the event queue stays empty."""
    with backend.guest(features=backend.features()) as guest:
        guest.client.do(wire.SET_STATUS, wire.u64(0xF))
        assert backend.status() == 0xF
        if queue == 0:
            guest.post_event_buffers(4)
            guest.rings[0].submit([Buffer(0xDEAD_0000, 20), Buffer(0xDEAD_1000, 4, writable=True)])
        else:
            guest.rings[1].submit([Buffer(0xDEAD_0000, 24, writable=True)])
            assert backend.fault(ENDPOINT, MAPPING)
        assert guest.rings[queue].broken()
        assert backend.status() == 0xF | 0x40
        assert guest.rings[1].take() is None
        assert quiet(guest.rings[1].call_fd)
        guest.reset_and_start()
        assert backend.status() & 0x40 == 0
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-FAULT-1", "R-FAULT-3")
@pytest.mark.parametrize("packed", [False, True])
def test_many_faults_keep_their_order(make_backend: MakeBackend, packed: bool) -> None:
    """Several times around the event ring, each report whole and in order."""
    backend = make_backend(patient(32))
    with backend.guest(features=backend.features(packed=packed), queue_size=64) as guest:
        endpoints = itertools.cycle((ENDPOINT, SIBLING, GUARDED))
        mark = guest.memory.mark()
        for batch in range(20):
            guest.memory.release(mark)
            posted = guest.post_event_buffers(16)
            expected = [iommu.Fault(MAPPING, ADDRESS, next(endpoints), batch * 16 + number) for number in range(16)]
            for fault in expected:
                assert backend.fault(fault.endpoint, fault.reason, fault.flags, fault.address)
            assert [iommu.fault(report(guest, posted, used)) for used in guest.rings[1].wait(16)] == expected
