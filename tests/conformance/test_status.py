"""When a device may touch its queues, and what it says when it cannot go on (VIRTIO 1.3, 2.1 and 3.1)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.client import Client
from frontend.guest import Guest
from frontend.ring import Buffer, quiet, wait_until
from integration.daemon import Daemon

from conformance.backend import CONFIG, ENDPOINT, RAM, Backend, pages

RINGS = 0x2000
"""More than the first pages of RAM, where the rings lie."""


def memory_image(guest: Guest) -> bytes:
    """All that the device could have written to."""
    return guest.memory.read(guest.memory.rams[0].gpa, 1 << 20)


def offer_requests(guest: Guest) -> None:
    """Requests and event buffers in the rings, published and kicked."""
    guest.queue_request(iommu.attach(1, ENDPOINT), iommu.TAIL)
    guest.rings[0].publish()
    guest.rings[0].kick()
    guest.post_event_buffers(2)
    guest.rings[1].kick()


@pytest.mark.rule("R-STAT-1")
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_before_the_start(backend: Backend, packed: bool) -> None:
    """Rings that are described, filled and kicked, and not enabled: no byte of memory changes, and none is notified."""
    with backend.guest(features=backend.features(packed=packed), start=False) as guest:
        for ring in guest.rings:
            ring.want_calls(True)
        offer_requests(guest)
        before = memory_image(guest)
        for index in range(2):
            guest.configure_ring(index)
        assert backend.fault(ENDPOINT, 2)
        backend.served()
        assert memory_image(guest) == before
        assert all(quiet(ring.call_fd) and quiet(ring.err_fd) for ring in guest.rings)
        assert backend.engine.stats().requests == {}
        guest.enable(True)
        assert guest.rings[0].wait()[0].length == iommu.TAIL
        assert guest.rings[0].called()


@pytest.mark.rule("R-STAT-1")
@pytest.mark.parametrize("enabled", [0, 1])
def test_one_ring_runs_alone(backend: Backend, enabled: int) -> None:
    """The other is left alone until it is enabled."""
    with backend.guest(features=backend.features(), start=False) as guest:
        offer_requests(guest)
        for index in range(2):
            guest.configure_ring(index)
        guest.client.do(wire.SET_VRING_ENABLE, wire.vring_state(enabled, 1))
        assert backend.fault(ENDPOINT, 2)
        assert guest.rings[enabled].wait()[0].length == (24 if enabled else 4)
        backend.served()
        assert guest.rings[1 - enabled].take() is None


def _reset_device(guest: Guest) -> None:
    guest.client.do(wire.RESET_DEVICE)


def _status_0(guest: Guest) -> None:
    guest.client.do(wire.SET_STATUS, wire.u64(0))


def _stop(guest: Guest) -> None:
    guest.stop()


@pytest.mark.rule("R-STAT-3")
@pytest.mark.parametrize("reset", [_reset_device, _status_0, _stop])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_after_a_reset(backend: Backend, reset: Callable[[Guest], None], packed: bool) -> None:
    """Requests, kicks and faults after a reset: not one byte is written, and nothing is signalled, until the start."""
    with backend.guest(features=backend.features(packed=packed)) as guest:
        guest.client.do(wire.SET_STATUS, wire.u64(0xF))
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, *pages(1), RAM) == iommu.OK
        reset(guest)
        assert backend.status() == 0 or reset is _stop
        for ring in guest.rings:
            ring.called(0)
        offer_requests(guest)
        backend.fault(ENDPOINT, 2)
        before = memory_image(guest)
        for _ in range(100):
            guest.rings[0].kick()
            guest.rings[1].kick()
        backend.served()
        assert memory_image(guest) == before
        assert all(quiet(ring.call_fd) and quiet(ring.err_fd) for ring in guest.rings)
        for ring in guest.rings:
            ring.reset()
        guest.start()
        assert backend.domains() == []
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-STAT-3")
def test_memory_of_rings_is_the_drivers_after_a_reset(backend: Backend) -> None:
    """Filled with what would be requests, on the page where the rings were: the device does not look."""
    with backend.guest(features=backend.features()) as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        guest.stop()
        guest.memory.write(guest.rings[0].desc, b"\xff" * RINGS)
        for ring in guest.rings:
            ring.kick()
        backend.served()
        assert guest.memory.read(guest.rings[0].desc, RINGS) == b"\xff" * RINGS
        assert all(quiet(ring.err_fd) for ring in guest.rings)


def break_ring(guest: Guest) -> None:
    """A buffer outside guest memory."""
    guest.rings[0].submit([Buffer(0xDEAD_0000, 20), Buffer(0xDEAD_1000, 4, writable=True)])
    assert guest.rings[0].broken()


@pytest.mark.rule("R-STAT-2")
@pytest.mark.parametrize("packed", [False, True])
def test_needs_reset(backend: Backend, packed: bool) -> None:
    """The status says so until a reset; the ring is served no more; the error eventfd is signalled."""
    with backend.guest(features=backend.features(packed=packed)) as guest:
        guest.client.do(wire.SET_STATUS, wire.u64(0xF))
        break_ring(guest)
        assert backend.status() == 0x4F
        guest.rings[0].kick()
        backend.served()
        assert guest.rings[0].take() is None
        guest.reset_and_start()
        guest.client.do(wire.SET_STATUS, wire.u64(0xF))
        assert backend.status() == 0xF
        assert guest.attach(1, ENDPOINT) == iommu.OK


def with_channel(guest: Guest) -> Client:
    """A back-end channel, as QEMU makes one."""
    ours, theirs = socket.socketpair()
    guest.client.do(wire.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    theirs.close()
    return Client(ours)


CONFIG_CHANGE = 2


@pytest.mark.rule("R-STAT-2")
def test_needs_reset_is_a_configuration_change(tmp_path: Path) -> None:
    """Where the user asks for it, the front-end is told to look at the device again, once for each broken ring."""
    config = CONFIG.replace("[device]", "[device]\nconfig-notices = true")
    with Daemon(tmp_path, config=config) as daemon, daemon.guest() as guest, with_channel(guest) as channel:
        guest.start()
        for _ in range(3):
            break_ring(guest)
            notice = channel.receive()
            assert (notice.code, notice.payload) == (CONFIG_CHANGE, b"")
            assert notice.flags == wire.VERSION | wire.NEED_REPLY
            channel.send(CONFIG_CHANGE, wire.u64(0), flags=wire.VERSION | wire.REPLY)
            assert guest.client.ask(wire.GET_STATUS).u64 & 0x40
            guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-STAT-2")
@pytest.mark.parametrize("answer", [b"", b"\xff" * 12, wire.message(CONFIG_CHANGE, wire.u64(1), 5)])
def test_a_front_end_that_does_not_take_the_notice(tmp_path: Path, answer: bytes) -> None:
    """Closed channel, nonsense, an error: it costs the channel or a line in the log, never the guest."""
    config = CONFIG.replace("[device]", "[device]\nconfig-notices = true")
    with Daemon(tmp_path, config=config) as daemon, daemon.guest() as guest:
        with with_channel(guest) as channel:
            guest.start()
            break_ring(guest)
            assert channel.receive().code == CONFIG_CHANGE
            if answer:
                channel.send_raw(answer)
                wait_until(lambda: bool(daemon.log("config-notice-failed")), "a line in the log")
        guest.reset_and_start()
        break_ring(guest)
        guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-STAT-2")
def test_no_notice_unasked(tmp_path: Path) -> None:
    """QEMU 11.1's generic device crashes on a notice that comes while its driver does not run: none by default."""
    with Daemon(tmp_path, config=CONFIG) as daemon, daemon.guest() as guest, with_channel(guest) as channel:
        guest.start()
        break_ring(guest)
        daemon.logged("ring-broken")
        guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert quiet(channel.sock.fileno())
