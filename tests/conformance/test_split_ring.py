"""The split virtqueue from the driver's side (VIRTIO 1.3, 2.7)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from frontend import iommu, wire
from frontend.guest import POISON, Guest
from frontend.ring import INDIRECT, NEXT, WRITE, Buffer, quiet
from frontend.split import SplitRing, descriptor

from conformance.backend import ENDPOINT, GUARDED, RAM, Backend, pages

PROBE_SIZE = 512


@pytest.fixture
def plain(backend: Backend) -> Iterator[Guest]:
    """A guest without EVENT_IDX."""
    with backend.guest(features=backend.features(without=wire.F_EVENT_IDX)) as guest:
        yield guest


def requests() -> list[tuple[bytes, int]]:
    """One of each kind that succeeds in this order, with the size of its writable part."""
    return [
        (iommu.attach(1, ENDPOINT), 4),
        (iommu.map_(1, *pages(1), RAM), 4),
        (iommu.probe(ENDPOINT), PROBE_SIZE + 4),
        (iommu.unmap(1, *pages(1)), 4),
        (iommu.detach(1, ENDPOINT), 4),
    ]


@pytest.mark.rule("R-Q-FRAME")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_one_byte_in_each_descriptor(backend: Backend, packed: bool, indirect: bool) -> None:
    """Every request in as many descriptors as it has bytes."""
    with backend.guest(features=backend.features(packed=packed), queue_size=1024) as guest:
        for readable, writable in requests():
            reply = guest.request(readable, (1,) * writable, split=(1,) * (len(readable) - 1), indirect=indirect)
            assert reply.status == iommu.OK
            assert reply.used_length == writable
        assert iommu.reserved_regions(guest.probe(GUARDED).data)


@pytest.mark.rule("R-Q-FRAME")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_every_boundary(backend: Backend, packed: bool, indirect: bool) -> None:
    """Each request cut in two at every byte, the tail too; also with descriptors of no length before and between."""
    with backend.guest(features=backend.features(packed=packed)) as guest:
        for index, (readable, writable) in enumerate(requests()):
            for cut in range(1, len(readable)):
                assert guest.request(readable[:cut], writable).untouched
                parts = (writable - 1, 1) if cut % 2 else (writable - 3, 3)
                if index == 2:  # only PROBE can be repeated
                    assert guest.request(readable, parts, split=(cut,), indirect=indirect).status == iommu.OK
            assert guest.request(readable, (1, writable - 1), split=(len(readable) // 2,)).status == iommu.OK


@pytest.mark.rule("R-Q-FRAME")
@pytest.mark.parametrize("packed", [False, True])
def test_descriptors_of_no_length(backend: Backend, packed: bool) -> None:
    """They hold nothing and hurt nothing, wherever they stand."""
    with backend.guest(features=backend.features(packed=packed)) as guest:
        memory = guest.memory
        body = iommu.attach(1, ENDPOINT)
        readable, writable = memory.allocate(64), memory.allocate(64)
        memory.write(readable, body)
        memory.write(writable, bytes([POISON]) * 4)
        guest.rings[0].submit(
            [
                Buffer(readable, 0),
                Buffer(readable, 7),
                Buffer(readable, 0),
                Buffer(readable + 7, len(body) - 7),
                Buffer(writable, 0, writable=True),
                Buffer(writable, 1, writable=True),
                Buffer(writable, 0, writable=True),
                Buffer(writable + 1, 3, writable=True),
            ]
        )
        (used,) = guest.rings[0].wait()
        assert used.length == 4
        assert memory.read(writable, 4) == bytes(4)


@pytest.mark.rule("R-Q-RO")
@pytest.mark.parametrize("indirect", [False, True])
def test_what_is_the_drivers_stays(guest: Guest, indirect: bool) -> None:
    """Descriptor table, available ring, indirect tables and readable buffers are never written."""
    ring = guest.rings[0]
    assert isinstance(ring, SplitRing)
    for readable, writable in [*requests(), (iommu.head(0x7F) + bytes(16), 4), (b"\1", 4)]:
        mark = guest.memory.mark()
        _, chain = guest.queue_request(readable, writable, indirect=indirect, split=(1,))
        table = guest.memory.read(ring.desc, 16 * ring.size)
        avail = ring.avail
        ring.publish()
        driver = guest.memory.read(avail, 6 + 2 * ring.size)
        rest = guest.memory.read(mark, guest.memory.mark() - mark)
        ring.kick()
        ring.wait()
        assert guest.memory.read(ring.desc, 16 * ring.size) == table
        assert guest.memory.read(avail, 6 + 2 * ring.size) == driver
        written = [(b.address - mark, b.length) for b in chain if b.writable]
        now = bytearray(guest.memory.read(mark, guest.memory.mark() - mark))
        for at, length in written:
            now[at : at + length] = rest[at : at + length]
        assert bytes(now) == rest


def play(guest: Guest, head: int) -> int:
    """Offer a chain that was written by hand; its used length."""
    ring = guest.rings[0]
    assert isinstance(ring, SplitRing)
    ring.offer(head)
    ring.publish()
    ring.kick()
    (used,) = ring.wait()
    assert used.id == head
    return used.length


@pytest.mark.rule("R-Q-IND-1")
def test_write_flag_of_the_descriptor_of_a_table(guest: Guest) -> None:
    """It is ignored."""
    ring, memory = guest.rings[0], guest.memory
    assert isinstance(ring, SplitRing)
    body, tail, table = memory.allocate(64), memory.allocate(16), memory.allocate(64, 16)
    memory.write(body, iommu.attach(1, ENDPOINT))
    memory.write(table, descriptor(body, 20, NEXT, 1) + descriptor(tail, 4, WRITE))
    ring.write_descriptor(5, descriptor(table, 32, INDIRECT | WRITE))
    assert play(guest, 5) == 4
    assert memory.read(tail, 4) == bytes(4)


@pytest.mark.rule("R-Q-IND-2")
def test_direct_descriptors_before_a_table(guest: Guest) -> None:
    """The chain goes on in the table; entries may stand in any order in it."""
    ring, memory = guest.rings[0], guest.memory
    assert isinstance(ring, SplitRing)
    body, tail, table = memory.allocate(64), memory.allocate(16), memory.allocate(64, 16)
    memory.write(body, iommu.attach(1, ENDPOINT))
    ring.write_descriptor(9, descriptor(body, 3, NEXT, 2))
    ring.write_descriptor(2, descriptor(body + 3, 5, NEXT, 40))
    ring.write_descriptor(40, descriptor(table, 48, INDIRECT))
    entries = [descriptor(body + 8, 12, NEXT, 2), descriptor(tail + 1, 3, WRITE), descriptor(tail, 1, WRITE | NEXT, 1)]
    memory.write(table, b"".join(entries))
    assert play(guest, 9) == 4
    assert memory.read(tail, 4) == bytes(4)


@pytest.mark.rule("R-Q-USED-1")
def test_used_lengths_cover_what_was_written(any_ring: Guest) -> None:
    """In every answer, all bytes up to the used length were written, and none behind it."""
    for readable, writable in (*requests(), (iommu.head(9) + bytes(32), 4), (iommu.probe(GUARDED), 100)):
        for more in (0, 1, 50):
            reply = any_ring.request(readable, writable + more)
            assert bytes([POISON]) not in reply.data[: reply.used_length]
            assert reply.data[reply.used_length :] == bytes([POISON]) * (len(reply.data) - reply.used_length)


@pytest.mark.rule("R-Q-NOTE-1")
def test_notifications_by_flag(plain: Guest, backend: Backend) -> None:
    """avail.flags 0: every batch is told of; 1: none is. used_event means nothing."""
    ring = plain.rings[0]
    assert isinstance(ring, SplitRing)
    for event, wanted in itertools.product((0, 1, 0x8000), (True, False)):
        while ring.called(0):
            pass
        ring.want_calls(wanted)
        ring.set_used_event(event)
        for _ in range(5):
            assert plain.attach(1, ENDPOINT) == iommu.OK
            if wanted:
                assert ring.called()
        backend.served()
        assert quiet(ring.call_fd)


@pytest.mark.rule("R-Q-NOTE-2")
def test_notifications_by_event_index(guest: Guest, backend: Backend) -> None:
    """One, when the used index passes used_event; avail.flags means nothing."""
    ring = guest.rings[0]
    assert isinstance(ring, SplitRing)
    for flags in (0, 1):
        guest.memory.store16(ring.avail, flags)
        for ahead in (0, 1, 7):
            while ring.called(0):
                pass
            ring.set_used_event(ring.next_used + ahead)
            ring.memory.barrier()
            for _ in range(ahead):
                assert guest.attach(1, ENDPOINT) == iommu.OK
            backend.served()
            assert quiet(ring.call_fd)
            assert guest.attach(1, ENDPOINT) == iommu.OK
            assert ring.called()
            for _ in range(5):
                assert guest.attach(1, ENDPOINT) == iommu.OK
            backend.served()
            assert quiet(ring.call_fd)


@pytest.mark.rule("R-Q-NOTE-2")
def test_event_index_within_a_batch(guest: Guest) -> None:
    """It is enough that one entry of a batch passes it."""
    ring = guest.rings[0]
    assert isinstance(ring, SplitRing)
    for position in range(8):
        while ring.called(0):
            pass
        ring.set_used_event(ring.next_used + position)
        mark = guest.memory.mark()
        for _ in range(8):
            guest.queue_request(iommu.attach(1, ENDPOINT), 4)
        ring.publish()
        ring.kick()
        assert ring.called()
        ring.wait(8)
        guest.memory.release(mark)


@pytest.mark.rule("R-Q-NOTE-3")
@pytest.mark.parametrize("event_idx", [False, True])
def test_flags_of_the_used_ring(backend: Backend, event_idx: bool) -> None:
    """0 with EVENT_IDX, 0 or 1 without, whatever the worker does."""
    features = backend.features(without=0 if event_idx else wire.F_EVENT_IDX)
    with backend.guest(features=features) as guest:
        ring, seen = guest.rings[0], set()
        for round_ in range(200):
            seen.add(guest.memory.load16(ring.used))
            assert guest.attach(1, ENDPOINT) == iommu.OK
            if round_ % 20 == 0:
                backend.served()
                seen.add(guest.memory.load16(ring.used))
        assert seen <= ({0} if event_idx else {0, 1})
        assert 0 in seen


@pytest.mark.rule("R-Q-NOTE-3")
def test_spurious_kicks(any_ring: Guest, backend: Backend) -> None:
    """Thousands of kicks for nothing: nothing is used, nothing is signalled, and the next request is served."""
    for _ in range(5000):
        for ring in any_ring.rings:
            ring.kick()
    backend.served()
    assert any_ring.rings[0].take() is None
    assert all(quiet(ring.err_fd) for ring in any_ring.rings)
    assert any_ring.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-Q-BARR")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_no_request_is_slept_through(backend: Backend, packed: bool, event_idx: bool) -> None:
    """A driver that kicks only when it is asked to is always served, however the worker falls asleep."""
    features = backend.features(packed=packed, without=0 if event_idx else wire.F_EVENT_IDX)
    with backend.guest(features=features) as guest:
        ring = guest.rings[0]
        address, tail = guest.memory.allocate(20), guest.memory.allocate(4)
        guest.memory.write(address, iommu.attach(1, ENDPOINT))
        chain = [Buffer(address, 20), Buffer(tail, 4, writable=True)]
        for number in range(1500):
            if number % 3 == 0:
                backend.served()
            elif number % 3 == 1:
                for _ in range(number % 97):
                    ring.take()
            ring.submit(chain)
            ring.wait()
        assert ring.kicks


@pytest.mark.rule("R-Q-ORDER")
@pytest.mark.parametrize("packed", [False, True])
def test_in_order(backend: Backend, packed: bool) -> None:
    """Buffers come back in the order they were offered in, those without an answer too, each with its own length."""
    with backend.guest(features=backend.features(packed=packed, in_order=True), queue_size=64) as guest:
        ring = guest.rings[0]
        offered: list[tuple[int, int]] = []
        mark = guest.memory.mark()
        for _ in range(20):
            guest.memory.release(mark)
            offered.clear()
            for number in range(12):
                if number % 3 == 1:
                    offered.append((guest.queue_request(iommu.head(0x55) + bytes(8), 4)[0], 0))
                else:
                    offered.append((guest.queue_request(iommu.attach(1, ENDPOINT), 4 + number)[0], 4 + number))
            ring.publish()
            ring.kick()
            assert [(used.id, used.length) for used in ring.wait(12)] == offered


@pytest.mark.rule("R-Q-FRAME", "R-Q-USED-1")
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_ring_sizes(backend: Backend, size: int) -> None:
    """Every power of two, several times around, in batches that fill the ring."""
    with backend.guest(features=backend.features(), queue_size=size) as guest:
        ring = guest.rings[0]
        address, tail = guest.memory.allocate(20), guest.memory.allocate(4)
        guest.memory.write(address, iommu.attach(1, ENDPOINT))
        chain = [Buffer(address, 20), Buffer(tail, 4, writable=True)]
        for _ in range(max(3, 64 // size)):
            for _ in range(size // 2):
                ring.add(chain)
            ring.publish()
            ring.kick()
            assert {used.length for used in ring.wait(size // 2)} == {4}
