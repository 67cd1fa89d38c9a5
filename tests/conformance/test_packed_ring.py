"""The packed virtqueue from the driver's side (VIRTIO 1.3, 2.8)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from frontend import iommu, wire
from frontend.guest import POISON, Guest
from frontend.packed import AVAIL, EVENTS_AT_DESCRIPTOR, EVENTS_DISABLE, EVENTS_ENABLE, USED, PackedRing, descriptor
from frontend.ring import INDIRECT, NEXT, WRITE, Buffer, quiet, wait_until

from conformance.backend import ENDPOINT, Backend


@pytest.fixture
def packed(backend: Backend) -> Iterator[Guest]:
    """A guest with a packed ring of 64."""
    with backend.guest(features=backend.features(packed=True), queue_size=64) as guest:
        yield guest


def request_ring(guest: Guest) -> PackedRing:
    """The request queue's ring."""
    ring = guest.rings[0]
    assert isinstance(ring, PackedRing)
    return ring


def slot(guest: Guest, number: int) -> tuple[int, int, int, int]:
    """Address, length, id and flags of a descriptor."""
    raw = guest.memory.read(request_ring(guest).desc + 16 * number, 16)
    address, length, identifier, flags = struct.unpack("<QIHH", raw)
    return address, length, identifier, flags


def buffers(guest: Guest, body: bytes = iommu.attach(1, ENDPOINT)) -> tuple[int, int]:
    """Guest addresses of a request and of room for its tail."""
    address, tail = guest.memory.allocate(len(body)), guest.memory.allocate(4)
    guest.memory.write(address, body)
    guest.memory.write(tail, bytes([POISON]) * 4)
    return address, tail


def used_in(guest: Guest, number: int) -> tuple[int, int, int]:
    """Wait until a slot of the first round is used; its length, id and flags."""
    wait_until(lambda: slot(guest, number)[3] & (AVAIL | USED) == AVAIL | USED, f"slot {number} to be used")
    return slot(guest, number)[1:]


@pytest.mark.rule("R-P-1", "R-Q-ORDER")
def test_in_the_order_of_the_ring(packed: Guest) -> None:
    """Requests that depend on each other, published together, are carried out one after the other."""
    ring = request_ring(packed)
    mark = packed.memory.mark()
    for _ in range(20):
        packed.memory.release(mark)
        chain = []
        for domain in range(10):
            body = iommu.detach(domain, ENDPOINT) if domain % 2 else iommu.attach(domain + 1, ENDPOINT)
            chain.append(packed.queue_request(body, 4))
        ring.publish()
        ring.kick()
        assert [used.id for used in ring.wait(10)] == [identifier for identifier, _ in chain]
        assert [packed.memory.read(buffers[-1].address, 1)[0] for _, buffers in chain] == [0] * 10


@pytest.mark.rule("R-P-2")
def test_only_what_is_available(packed: Guest, backend: Backend) -> None:
    """A descriptor whose AVAIL bit is that of the round before is not touched, whatever else it says."""
    ring = request_ring(packed)
    address, tail = buffers(packed)
    ring.write_descriptor(1, descriptor(tail, 4, 0, WRITE | AVAIL))
    before = [descriptor(address, 20, 0, NEXT | flags) for flags in (0, USED, AVAIL | USED)]
    for raw in before:
        ring.write_descriptor(0, raw)
        ring.kick()
        backend.served()
        assert packed.memory.read(ring.desc, 16) == raw
    ring.write_descriptor(0, descriptor(address, 20, 0, NEXT | AVAIL))
    ring.kick()
    assert used_in(packed, 0) == (4, 0, WRITE | AVAIL | USED)
    # What was used is the driver's again: nothing of it changes afterwards.
    image = packed.memory.read(ring.desc, 16 * ring.size)
    backend.served()
    assert packed.memory.read(ring.desc, 16 * ring.size) == image


@pytest.mark.rule("R-P-3")
def test_one_used_descriptor_for_a_list(packed: Guest) -> None:
    """In the list's first slot, with the ID of its last; the next list's is as many slots on as the list was long."""
    ring = request_ring(packed)
    address, tail = buffers(packed)
    middle = [descriptor(address + 4, 8, 99, NEXT | AVAIL), descriptor(address + 12, 8, 98, NEXT | AVAIL)]
    for start, identifier in ((0, 7), (4, 63)):
        for position, raw in enumerate([*middle, descriptor(tail, 4, identifier, WRITE | AVAIL)], start + 1):
            ring.write_descriptor(position, raw)
    rest = [packed.memory.read(ring.desc + 16 * number, 16) for number in (1, 2, 3, 5, 6, 7)]
    ring.write_descriptor(4, descriptor(address, 4, 97, NEXT | AVAIL))
    ring.write_descriptor(0, descriptor(address, 4, 97, NEXT | AVAIL))
    ring.kick()
    assert used_in(packed, 0) == (4, 7, WRITE | AVAIL | USED)
    assert used_in(packed, 4) == (4, 63, WRITE | AVAIL | USED)
    assert [packed.memory.read(ring.desc + 16 * number, 16) for number in (1, 2, 3, 5, 6, 7)] == rest


@pytest.mark.rule("R-P-4")
def test_write_flag_says_that_something_was_written(packed: Guest) -> None:
    """Set with an answer; clear where there is none, so that the length means nothing."""
    ring = request_ring(packed)
    address, tail = buffers(packed)
    refused, room = buffers(packed, iommu.head(0x33) + bytes(16))
    ring.write_descriptor(1, descriptor(tail, 4, 1, WRITE | AVAIL))
    ring.write_descriptor(3, descriptor(room, 4, 2, WRITE | AVAIL))
    ring.write_descriptor(2, descriptor(refused, 20, 2, NEXT | AVAIL))
    ring.write_descriptor(0, descriptor(address, 20, 1, NEXT | AVAIL))
    ring.kick()
    assert used_in(packed, 0) == (4, 1, WRITE | AVAIL | USED)
    _, identifier, flags = used_in(packed, 2)
    assert (identifier, flags) == (2, AVAIL | USED)
    assert packed.memory.read(room, 4) == bytes([POISON]) * 4


@pytest.mark.rule("R-P-5", "R-Q-IND-1")
@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
def test_indirect_tables(packed: Guest, flags: int) -> None:
    """Entries in sequence; only WRITE counts in them, not NEXT, not INDIRECT, not the ID."""
    ring, memory = request_ring(packed), packed.memory
    address, tail = buffers(packed)
    table = memory.allocate(64, 16)
    entries = [
        descriptor(address, 4, 0x1234, NEXT | INDIRECT | AVAIL | USED),
        descriptor(address + 4, 16, 9, 0),
        descriptor(tail, 3, 0xFFFF, WRITE | NEXT),
        descriptor(tail + 3, 1, 8, WRITE | INDIRECT),
    ]
    memory.write(table, b"".join(entries))
    ring.write_descriptor(0, descriptor(table, 64, 33, flags | AVAIL))
    ring.kick()
    assert used_in(packed, 0) == (4, 33, WRITE | AVAIL | USED)
    assert memory.read(tail, 4) == bytes(4)
    assert memory.read(table, 64) == b"".join(entries)


@pytest.mark.rule("R-P-6", "R-Q-ORDER")
def test_in_order_use(backend: Backend) -> None:
    """Each buffer has a used descriptor of its own in its own slot: right for drivers with IN_ORDER and without."""
    with backend.guest(features=backend.features(packed=True, in_order=True), queue_size=64) as guest:
        ring = request_ring(guest)
        for number in range(8):
            body = iommu.head(0x77) + bytes(16) if number == 3 else iommu.attach(1, ENDPOINT)
            address, tail = buffers(guest, body)
            ring.write_descriptor(2 * number + 1, descriptor(tail, 4, number, WRITE | AVAIL))
            ring.memory.write(ring.desc + 32 * number, descriptor(address, 20, number, NEXT))
        for number in reversed(range(8)):
            ring.memory.store16(ring.desc + 32 * number + 14, NEXT | AVAIL)
        ring.kick()
        for number in range(8):
            length, identifier, flags = used_in(guest, 2 * number)
            assert identifier == number
            assert (flags & WRITE, length) == ((0, length) if number == 3 else (WRITE, 4))


@pytest.mark.rule("R-P-7", "R-Q-RO")
def test_readable_buffers_and_the_drivers_area_stay(packed: Guest) -> None:
    """Neither is ever written."""
    ring = request_ring(packed)
    for body in (iommu.attach(1, ENDPOINT), iommu.head(0x44) + bytes(40), b"\1\0\0"):
        address, tail = buffers(packed, body)
        area = packed.memory.read(ring.avail, 4)
        ring.submit([Buffer(address, len(body)), Buffer(tail, 4, writable=True)])
        ring.wait()
        assert packed.memory.read(address, len(body)) == body
        assert packed.memory.read(ring.avail, 4) == area


@pytest.mark.rule("R-Q-NOTE-1")
@pytest.mark.parametrize("event_idx", [False, True])
def test_notifications_enabled_and_disabled(backend: Backend, event_idx: bool) -> None:
    """Every batch is told of, or none."""
    features = backend.features(packed=True, without=0 if event_idx else wire.F_EVENT_IDX)
    with backend.guest(features=features) as guest:
        ring = request_ring(guest)
        for flags in (EVENTS_ENABLE, EVENTS_DISABLE, EVENTS_ENABLE):
            while ring.called(0):
                pass
            guest.memory.store16(ring.avail + 2, flags)
            guest.memory.barrier()
            for _ in range(5):
                assert guest.attach(1, ENDPOINT) == iommu.OK
                if flags == EVENTS_ENABLE:
                    assert ring.called()
            backend.served()
            assert quiet(ring.call_fd)


@pytest.mark.rule("R-Q-NOTE-2")
@pytest.mark.parametrize("size", [7, 16])
def test_notification_at_a_descriptor(backend: Backend, size: int) -> None:
    """One, when the named position is passed, in this round or the next."""
    with backend.guest(features=backend.features(packed=True), queue_size=size) as guest:
        ring = request_ring(guest)
        for ahead in [0, 1, 2, 3] * size:
            while ring.called(0):
                pass
            position, wrap = ring.next_used + 2 * ahead, ring.used_wrap
            if position >= size:
                position, wrap = position - size, not wrap
            guest.memory.store16(ring.avail, position | wrap << 15)
            guest.memory.store16(ring.avail + 2, EVENTS_AT_DESCRIPTOR)
            guest.memory.barrier()
            for _ in range(ahead):
                assert guest.attach(1, ENDPOINT) == iommu.OK
            backend.served()
            assert quiet(ring.call_fd)
            assert guest.attach(1, ENDPOINT) == iommu.OK
            assert ring.called()


@pytest.mark.rule("R-Q-NOTE-3")
def test_the_devices_event_area(packed: Guest, backend: Backend) -> None:
    """Enabled, disabled or at a descriptor; a sleeping device asks to be kicked."""
    ring = request_ring(packed)
    seen = set()
    for number in range(200):
        if number % 10 == 0:
            backend.served()
            assert packed.memory.load16(ring.used + 2) & 3 == EVENTS_AT_DESCRIPTOR
        assert packed.attach(1, ENDPOINT) == iommu.OK
        seen.add(packed.memory.load16(ring.used + 2))
    assert seen <= {EVENTS_DISABLE, EVENTS_AT_DESCRIPTOR}


@pytest.mark.rule("R-P-1", "R-P-3")
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 13, 100, 255, 256, 1000, 1023, 1024])
def test_ring_sizes(backend: Backend, size: int) -> None:
    """Any size, several times around; in a ring of one, a chain is one descriptor, which is no request."""
    with backend.guest(features=backend.features(packed=True), queue_size=size) as guest:
        ring = request_ring(guest)
        address, tail = buffers(guest)
        chain = [Buffer(address, 20), Buffer(tail, 4, writable=True)]
        if size == 1:
            for _ in range(10):
                assert guest.request(iommu.attach(1, ENDPOINT), 0).used_length == 0
            return
        for _ in range(max(5, 64 // size)):
            for _ in range(size // 2):
                ring.add(chain)
            ring.publish()
            ring.kick()
            assert {used.length for used in ring.wait(size // 2)} == {4}
