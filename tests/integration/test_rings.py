"""Both ring formats over the real engine, driven by the front-end of the project's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.guest import Guest
from frontend.memory import DEFAULT_GPA
from frontend.packed import PackedRing
from frontend.ring import Buffer

from integration.daemon import Daemon

ENDPOINT = 8
PAGE = 4096
RAM = DEFAULT_GPA
PACKED = "[device]\npacked-ring = true\n"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that offers packed rings as well."""
    with Daemon(tmp_path, config=PACKED) as daemon:
        yield daemon


def features(daemon_offers: int, *, packed: bool, event_idx: bool) -> int:
    """Everything that is offered, with or without two ring features."""
    without = (0 if packed else wire.F_RING_PACKED) | (0 if event_idx else wire.F_EVENT_IDX)
    return daemon_offers & ~without


def start(daemon: Daemon, *, packed: bool = False, event_idx: bool = True, queue_size: int = 256) -> Guest:
    """A guest whose rings run."""
    client = daemon.connect()
    offered = client.ask(wire.GET_FEATURES).u64
    guest = Guest(client, features=features(offered, packed=packed, event_idx=event_idx), queue_size=queue_size)
    assert isinstance(guest.rings[0], PackedRing) is packed
    guest.start()
    return guest


@pytest.mark.parametrize(("packed", "event_idx", "indirect"), list(itertools.product((False, True), repeat=3)))
def test_requests_are_answered(daemon: Daemon, packed: bool, event_idx: bool, indirect: bool) -> None:
    """Every kind of ring and descriptor, several times around the ring."""
    with start(daemon, packed=packed, event_idx=event_idx, queue_size=16) as guest:
        assert guest.request(iommu.attach(1, ENDPOINT), indirect=indirect).status == iommu.OK
        for index in range(100):
            body = iommu.map_(1, index * PAGE, index * PAGE + PAGE - 1, RAM)
            assert guest.request(body, indirect=indirect, split=(4, 1)).status == iommu.OK
        assert guest.unmap(1, 0, 100 * PAGE - 1) == iommu.OK
        assert guest.probe(ENDPOINT).status == iommu.OK


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_full_ring_in_one_batch(daemon: Daemon, packed: bool, event_idx: bool) -> None:
    """Everything is published before the one kick; the notification comes because it was asked for."""
    with start(daemon, packed=packed, event_idx=event_idx, queue_size=64) as guest:
        ring = guest.rings[0]
        assert guest.attach(1, ENDPOINT) == iommu.OK
        while ring.called(0):
            pass
        ring.want_calls(True)
        answers = []
        for index in range(32):
            body = iommu.map_(1, index * PAGE, index * PAGE + PAGE - 1, RAM)
            answers.append(guest.queue_request(body, iommu.TAIL)[1][-1].address)
        ring.publish()
        ring.kick()
        assert ring.called()
        assert [used.length for used in ring.wait(32)] == [iommu.TAIL] * 32
        assert [guest.memory.read(address, iommu.TAIL) for address in answers] == [bytes(iommu.TAIL)] * 32


def fill_round(guest: Guest, count: int) -> None:
    """Send requests that change nothing, so many that the ring's counter moves by `count` buffers."""
    ring = guest.rings[0]
    body = iommu.unmap(1, 1 << 40, (1 << 40) + PAGE - 1)
    mark = guest.memory.mark()
    readable, writable = guest.memory.allocate(len(body)), guest.memory.allocate(iommu.TAIL)
    guest.memory.write(readable, body)
    chain = [Buffer(readable, len(body)), Buffer(writable, iommu.TAIL, writable=True)]
    while count:
        batch = min(count, ring.size // 2)
        for _ in range(batch):
            ring.add(chain)
        ring.publish()
        ring.kick()
        ring.wait(batch)
        count -= batch
    guest.memory.release(mark)


@pytest.mark.parametrize(("packed", "buffers"), [(False, 65536), (True, 256)])
def test_pause_where_the_counter_has_wrapped(daemon: Daemon, packed: bool, buffers: int) -> None:
    """The base is that of an unused ring: guest memory tells a pause (mappings stay) from a reset (they go).

    A split ring's counter wraps after 65536 buffers; a packed ring of 256 is back after two rounds of it, which are
    256 buffers of two descriptors.
    """
    with start(daemon, packed=packed) as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
        fill_round(guest, buffers - 2)
        bases = guest.stop()
        assert bases[0] == (wire.PACKED_INITIAL_BASE if packed else 0)
        guest.start(bases)
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL
        fill_round(guest, buffers - 1)
        guest.reset_and_start()
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.NOENT


@pytest.mark.parametrize("packed", [False, True])
def test_pause_keeps_and_reset_forgets(daemon: Daemon, packed: bool) -> None:
    """Over and over, with the event queue at its beginning all the time."""
    with start(daemon, packed=packed) as guest:
        for _ in range(20):
            assert guest.attach(1, ENDPOINT) == iommu.OK
            assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
            guest.pause_and_continue()
            assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL
            guest.reset_and_start()
            assert guest.map(1, 0, PAGE - 1, RAM) == iommu.NOENT
