"""H7: what a driver can write into a ring."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from frontend import iommu, wire
from frontend import packed as packed_ring
from frontend.guest import POISON, Guest
from frontend.packed import AVAIL, PackedRing
from frontend.ring import INDIRECT, NEXT, WRITE, Buffer, quiet
from frontend.split import SplitRing, descriptor

from hostile.rewriter import Rewriter
from hostile.victim import ENDPOINT, RAM, Victim

SIZE = 64
NOWHERE = 0xDEAD_0000_0000


def guest_with(victim: Victim, *, packed: bool, without: int = 0) -> Guest:
    """A started guest with rings of 64."""
    with victim.connect() as client:
        offered = client.ask(wire.GET_FEATURES).u64
    guest = victim.guest(features=offered & ~without & ~(0 if packed else wire.F_RING_PACKED), queue_size=SIZE)
    guest.start()
    return guest


class Hands:
    """Writes descriptors by hand."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.memory = guest, guest.memory
        self.body, self.answer = self.memory.allocate(64), self.memory.allocate(64)
        self.table = self.memory.allocate(16 * 2048, 16)
        self.memory.write(self.body, iommu.attach(1, ENDPOINT))

    def split(self, *chain: tuple[int, int, int, int], head: int = 0, first: int = 0) -> None:
        """Descriptors from slot `first` on, and an available entry."""
        ring = self.guest.rings[0]
        assert isinstance(ring, SplitRing)
        for slot, (address, length, flags, following) in enumerate(chain, first):
            ring.write_descriptor(slot, descriptor(address, length, flags, following))
        ring.offer(head)
        ring.publish()
        ring.kick()

    def indirect(self, *entries: tuple[int, int, int, int]) -> None:
        """Entries of the table."""
        self.memory.write(self.table, b"".join(descriptor(*entry) for entry in entries))


def _split_cases() -> Iterator[tuple[str, Callable[[Hands], None]]]:
    """Rings that cannot be gone on with."""
    yield "head", lambda h: h.split(head=SIZE)
    yield "head 0xffff", lambda h: h.split(head=0xFFFF)
    yield "next", lambda h: h.split((h.body, 20, NEXT, SIZE))
    yield "next 0xffff", lambda h: h.split((h.body, 20, NEXT, 0xFFFF))
    yield "self loop", lambda h: h.split((h.body, 1, NEXT, 0))
    yield "loop of two", lambda h: h.split((h.body, 1, NEXT, 1), (h.body, 1, NEXT, 0))
    yield "loop without length", lambda h: h.split((h.body, 0, NEXT, 1), (h.body, 0, NEXT, 0))
    yield "4 GiB", lambda h: h.split((RAM, 0xFFFF_FFFF, NEXT, 1), (h.answer, 4, WRITE, 0))
    yield "wraps around", lambda h: h.split(((1 << 64) - 8, 20, NEXT, 1), (h.answer, 4, WRITE, 0))
    yield "outside", lambda h: h.split((NOWHERE, 20, NEXT, 1), (h.answer, 4, WRITE, 0))
    yield "outside, no length", lambda h: h.split((NOWHERE, 0xFFFF_FFFF, WRITE, 0))
    yield "end outside", lambda h: h.split((RAM + (4 << 20) - 8, 20, NEXT, 1), (h.answer, 4, WRITE, 0))
    yield "answer outside", lambda h: h.split((h.body, 20, NEXT, 1), (NOWHERE, 4, WRITE, 0))
    yield "writable first", lambda h: h.split((h.answer, 4, WRITE | NEXT, 1), (h.body, 20, 0, 0))
    yield (
        "readable last",
        lambda h: h.split((h.body, 8, NEXT, 1), (h.answer, 4, WRITE | NEXT, 2), (h.body + 8, 12, 0, 0)),
    )
    yield "table of no length", lambda h: h.split((h.table, 0, INDIRECT, 0))
    yield "table of 15 bytes", lambda h: h.split((h.table, 15, INDIRECT, 0))
    yield "table of 33 bytes", lambda h: h.split((h.table, 33, INDIRECT, 0))
    yield "table outside", lambda h: h.split((NOWHERE, 32, INDIRECT, 0))
    yield "table of 4 GiB", lambda h: h.split((h.table, 0xFFFF_FFF0, INDIRECT, 0))
    yield "table with NEXT", lambda h: h.split((h.table, 32, INDIRECT | NEXT, 1), (h.body, 1, 0, 0))

    def nested(hands: Hands) -> None:
        hands.indirect((hands.table, 32, INDIRECT, 0))
        hands.split((hands.table, 32, INDIRECT, 0))

    def table_loop(hands: Hands) -> None:
        hands.indirect((hands.body, 1, NEXT, 1), (hands.body, 1, NEXT, 0))
        hands.split((hands.table, 32, INDIRECT, 0))

    def table_next(hands: Hands) -> None:
        hands.indirect((hands.body, 1, NEXT, 2), (hands.body, 1, 0, 0))
        hands.split((hands.table, 32, INDIRECT, 0))

    def long_table(hands: Hands) -> None:
        hands.indirect(*((hands.body, 1, NEXT, slot + 1) for slot in range(SIZE + 1)), (hands.answer, 4, WRITE, 0))
        hands.split((hands.table, 16 * (SIZE + 2), INDIRECT, 0))

    def jump(hands: Hands) -> None:
        ring = hands.guest.rings[0]
        assert isinstance(ring, SplitRing)
        ring.set_avail_idx(SIZE + 1)
        ring.kick()

    def backwards(hands: Hands) -> None:
        assert hands.guest.attach(1, ENDPOINT) == iommu.OK
        ring = hands.guest.rings[0]
        assert isinstance(ring, SplitRing)
        ring.set_avail_idx(0)
        ring.kick()

    yield "nested table", nested
    yield "loop in a table", table_loop
    yield "next outside its table", table_next
    yield "chain longer than the ring", long_table
    yield "index jumps", jump
    yield "index goes back", backwards


@pytest.mark.parametrize("name", [name for name, _ in _split_cases()])
def test_a_split_ring_that_makes_no_sense(victim: Victim, name: str) -> None:
    """It stops: status and eventfd say so, nothing is used, no memory outside is touched, a reset mends it.

    DPDK a436f53ebf, cc7301908c, 6ec1778134 (loops), c687b0b635 (next), CVE-2020-10725 (addresses), CVE-2020-14378.
    """
    with guest_with(victim, packed=False) as guest:
        hands = Hands(guest)
        dict(_split_cases())[name](hands)
        assert guest.rings[0].broken()
        assert guest.client.ask(wire.GET_STATUS).u64 & 0x40
        ring = guest.rings[0]
        assert isinstance(ring, SplitRing)
        assert ring.used_idx() == ring.next_used
        guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK


def test_tables_without_their_feature(victim: Victim) -> None:
    """A driver that has not accepted INDIRECT_DESC cannot use them."""
    for packed in (False, True):
        with guest_with(victim, packed=packed, without=wire.F_INDIRECT_DESC) as guest:
            guest.queue_request(iommu.attach(1, ENDPOINT), 4, indirect=True)
            guest.rings[0].publish()
            guest.rings[0].kick()
            assert guest.rings[0].broken()


def _packed(hands: Hands, *chain: tuple[int, int, int]) -> None:
    ring = hands.guest.rings[0]
    assert isinstance(ring, PackedRing)
    for slot, (address, length, flags) in reversed(list(enumerate(chain))):
        ring.write_descriptor(slot, packed_ring.descriptor(address, length, slot, flags | AVAIL))
    ring.kick()


PACKED_CASES: dict[str, Callable[[Hands], None]] = {
    "outside": lambda h: _packed(h, (NOWHERE, 20, NEXT), (h.answer, 4, WRITE)),
    "wraps around": lambda h: _packed(h, ((1 << 64) - 4, 20, NEXT), (h.answer, 4, WRITE)),
    "writable first": lambda h: _packed(h, (h.answer, 4, WRITE | NEXT), (h.body, 20, 0)),
    "without end": lambda h: _packed(h, *[(h.body, 1, NEXT)] * SIZE),
    "list not available": lambda h: _packed(h, (h.body, 20, NEXT)),
    "table of no length": lambda h: _packed(h, (h.table, 0, INDIRECT)),
    "table of 17 bytes": lambda h: _packed(h, (h.table, 17, INDIRECT)),
    "table outside": lambda h: _packed(h, (NOWHERE, 32, INDIRECT)),
    "table in a list": lambda h: _packed(h, (h.body, 20, NEXT), (h.table, 32, INDIRECT)),
    "table with NEXT": lambda h: _packed(h, (h.table, 32, INDIRECT | NEXT), (h.body, 4, 0)),
    "table longer than the ring": lambda h: _packed(h, (h.table, 16 * (SIZE + 1), INDIRECT)),
}


@pytest.mark.parametrize("name", PACKED_CASES)
def test_a_packed_ring_that_makes_no_sense(victim: Victim, name: str) -> None:
    """As for a split ring. CVE-2020-10725, DPDK cc7301908c."""
    with guest_with(victim, packed=True) as guest:
        PACKED_CASES[name](Hands(guest))
        assert guest.rings[0].broken()
        assert guest.client.ask(wire.GET_STATUS).u64 & 0x40
        guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.parametrize("packed", [False, True])
def test_a_kick_storm(victim: Victim, packed: bool) -> None:
    """An empty ring and kicks without end: front-end messages are answered all the while."""
    with guest_with(victim, packed=packed) as guest:
        stop = threading.Event()

        def storm() -> None:
            while not stop.is_set():
                for ring in guest.rings:
                    ring.kick()

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(100):
                guest.client.ask(wire.GET_STATUS)
                assert guest.attach(1, ENDPOINT) == iommu.OK
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("event", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("packed", [False, True])
def test_event_indices_that_make_no_sense(victim: Victim, packed: bool, event: int) -> None:
    """They cost a notification too many or too few; requests are served."""
    with guest_with(victim, packed=packed) as guest:
        ring = guest.rings[0]
        for _ in range(100):
            if isinstance(ring, SplitRing):
                ring.set_used_event(event)
            else:
                guest.memory.store16(ring.avail, event)
                guest.memory.store16(ring.avail + 2, 0xFFFF if event == 1 else 2)
            assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.parametrize("packed", [False, True])
def test_bodies_rewritten_while_they_are_read(victim: Victim, packed: bool) -> None:
    """Another processor changes the request all the time: every answer is whole, and is one to some request.

    CVE-2020-14375, CVE-2026-86562: a field was checked, then read a second time.
    """
    with guest_with(victim, packed=packed) as guest:
        memory, ring = guest.memory, guest.rings[0]
        fence_low = memory.allocate(4096)
        body, answer = memory.allocate(80), memory.allocate(520)
        fence_high = memory.allocate(4096)
        for fence in (fence_low, fence_high):
            memory.write(fence, bytes([POISON]) * 4096)
        pieces = [
            iommu.attach(1, ENDPOINT),
            iommu.attach(1, ENDPOINT, flags=1),
            iommu.map_(1, 0, 4095, RAM),
            iommu.map_(1, 0, (1 << 64) - 1, (1 << 64) - 4096),
            iommu.unmap(1, 0, (1 << 64) - 1),
            iommu.probe(ENDPOINT),
            iommu.detach(1, ENDPOINT),
            b"\xff" * 72,
        ]
        noise = [(body + at, bytes([value])) for at in (0, 4, 8, 12, 16, 20, 32) for value in (0, 1, 0x10, 0xFF)]
        seen: set[int | None] = set()
        with Rewriter(memory.rams[0], [*((body, piece) for piece in pieces), *noise], seed=11):
            for number in range(3000):
                room = 516 if number % 2 else 4
                memory.write(answer, bytes([POISON]) * room)
                ring.submit([Buffer(body, 72), Buffer(answer, room, writable=True)])
                (used,) = ring.wait()
                data = memory.read(answer, room)
                if used.length == 0:
                    assert data == bytes([POISON]) * room
                    seen.add(None)
                else:
                    assert used.length == room
                    assert data[-3:] == bytes(3)
                    assert bytes([POISON]) * 4 not in data
                    seen.add(data[-4])
        assert {iommu.OK, iommu.INVAL, iommu.NOENT, None} <= seen <= {*range(9), None}
        assert memory.read(fence_low, 4096) == memory.read(fence_high, 4096) == bytes([POISON]) * 4096
        assert quiet(ring.err_fd)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_descriptors_rewritten_while_they_are_read(victim: Victim, packed: bool, indirect: bool) -> None:
    """Addresses, lengths, flags and links change at any moment: requests are served or the ring breaks, no more.

    CVE-2026-86848, CVE-2026-93683 (double fetch of next and of an indirect length), crosvm 1f4797875 (torn reads).
    """
    with guest_with(victim, packed=packed) as guest:
        memory, ring = guest.memory, guest.rings[0]
        table, body, answer = memory.allocate(64, 16), memory.allocate(80), memory.allocate(64)
        memory.write(body, iommu.attach(1, ENDPOINT))
        entries = descriptor(body, 20, NEXT, 1) + descriptor(answer, 4, WRITE, 0)
        if packed:
            entries = packed_ring.descriptor(body, 20, 0, NEXT) + packed_ring.descriptor(answer, 4, 0, WRITE)
        memory.write(table, entries)
        at = table if indirect else ring.desc
        flags = 14 if packed else 12
        damage = [
            (at, b"\xff" * 8),
            (at + 8, (0xFFFF_FFFF).to_bytes(4, "little")),
            (at + 16 + 8, bytes(4)),
            (at + flags, (NEXT | WRITE | (AVAIL if packed else 0)).to_bytes(2, "little")),
            (at + 12 if not packed else at + 28, b"\x04\x00"),
            (at + 14 if not packed else at + 12, b"\x40\x00"),
            (at + 16, bytes(8)),
        ]
        if packed and not indirect:
            entries = packed_ring.descriptor(body, 20, 0, NEXT | AVAIL) + packed_ring.descriptor(
                answer, 4, 0, WRITE | AVAIL
            )
        broken = rounds = 0
        with Rewriter(memory.rams[0], [*damage, *[(at, entries)] * len(damage)], seed=12):
            deadline = time.monotonic() + 30
            while (rounds := rounds + 1) < 100 or (not broken and time.monotonic() < deadline):
                if not indirect:
                    ring.add([Buffer(body, 20), Buffer(answer, 4, writable=True)])
                    ring.publish()
                elif isinstance(ring, SplitRing):
                    ring.write_descriptor(0, descriptor(table, 32, INDIRECT, 0))
                    ring.offer(0)
                    ring.publish()
                elif isinstance(ring, PackedRing):
                    ring.write_descriptor(0, packed_ring.descriptor(table, 32, 0, INDIRECT | AVAIL))
                ring.kick()
                # Served or not: after a reset everything is as at the start, whatever the rewriting has made of it.
                guest.client.ask(wire.GET_STATUS)
                broken += ring.broken(0)
                guest.stop()
                for each in guest.rings:
                    each.reset()
                guest.start()
        guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK
        guest.close()
        ended = victim.last_session()
        answered = sum(sum(by_status.values()) for by_status in ended["requests"].values())
        assert answered > 1, "the rewriting must leave something to be served"
        assert broken, "and must break something"
