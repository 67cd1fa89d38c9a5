"""H8 and H10: requests, and what is in the answers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from frontend import iommu, wire
from frontend.guest import POISON, Guest
from frontend.ring import NEXT, WRITE, wait_until
from frontend.split import SplitRing, descriptor

from hostile.victim import ENDPOINT, PAGE, RAM, Victim

U64 = (1 << 64) - 1


@pytest.fixture
def guest(victim: Victim) -> Iterator[Guest]:
    """A started guest with large rings."""
    with victim.guest(queue_size=1024) as started:
        started.start()
        yield started


def test_probe_then_others_in_one_batch(guest: Guest) -> None:
    """Each answer has its own length and content. QEMU cf2f89edf36a and 4bf58c72: PROBE's buffer outlived it."""
    for _ in range(50):
        mark = guest.memory.mark()
        bodies = [
            (iommu.probe(ENDPOINT), 516),
            (iommu.attach(1, ENDPOINT), 4),
            (iommu.probe(ENDPOINT), 516),
            (iommu.map_(1, 0, PAGE - 1, RAM), 4),
            (iommu.unmap(1, 0, PAGE - 1), 100),
            (iommu.probe(0x999), 516),
            (iommu.head(0x66) + bytes(80), 516),
            (iommu.detach(1, ENDPOINT), 4),
        ]
        chains = [guest.queue_request(body, room)[1] for body, room in bodies]
        guest.rings[0].publish()
        guest.rings[0].kick()
        lengths = [used.length for used in guest.rings[0].wait(len(bodies))]
        assert lengths == [516, 4, 516, 4, 100, 516, 0, 4]
        answers = [guest.memory.read(chain[-1].address, chain[-1].length) for chain in chains]
        assert answers[0] == answers[2]
        assert answers[1] == answers[3] == answers[7] == bytes(4)
        assert answers[4] == bytes(100)
        assert answers[5] == bytes(512) + bytes([iommu.NOENT, 0, 0, 0])
        assert answers[6] == bytes([POISON]) * 516
        guest.memory.release(mark)


@pytest.mark.parametrize("room", [4, 5, 27, 28, 515, 517, 1000])
def test_probe_with_any_room(guest: Guest, room: int) -> None:
    """No assertion, no property in too small a list. QEMU gitlab 2359: a short buffer ended the process."""
    reply = guest.request(iommu.probe(ENDPOINT), room)
    assert reply.used_length == room
    assert reply.status == (iommu.OK if room >= 516 else iommu.INVAL)
    assert bytes([POISON]) * 4 not in reply.data


def test_numbers_at_every_limit(guest: Guest) -> None:
    """Sums and differences that wrap, of all fields of MAP and UNMAP. cloud-hypervisor 8105: a range overflowed."""
    edges = [0, 1, PAGE - 1, PAGE, RAM, (1 << 63) - 1, 1 << 63, U64 - PAGE, U64 - PAGE + 1, U64 - 1, U64]
    assert guest.attach(1, ENDPOINT) == iommu.OK
    for first in edges:
        for last in edges:
            for phys in edges:
                status = guest.map(1, first, last, phys)
                valid = first <= last and not (first | phys | (last + 1)) % PAGE and phys + last - first <= U64
                assert valid or status in (iommu.INVAL, iommu.RANGE)
            assert guest.unmap(1, first, last) in (iommu.OK, iommu.INVAL, iommu.RANGE)
    assert guest.unmap(1, 0, U64) == iommu.OK


def test_more_than_the_limits(guest: Guest) -> None:
    """Domains and mappings: NOMEM, and memory does not grow. QEMU has no limit on MAP; CVE-2026-74713."""
    for domain in range(200):
        guest.attach(domain, ENDPOINT)
    assert guest.attach(1, ENDPOINT) == iommu.OK
    statuses = {guest.map(1, page * PAGE, page * PAGE + PAGE - 1, RAM) for page in range(2000)}
    assert statuses == {iommu.OK, iommu.NOMEM}
    assert guest.unmap(1, 0, U64) == iommu.OK
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK


def test_partial_unmap_removes_nothing(guest: Guest) -> None:
    """QEMU removes whole mappings in front of the one that would be split; here the second try finds them all."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    for page in (0, 1, 4):
        assert guest.map(1, page * PAGE, page * PAGE + PAGE - 1, RAM) == iommu.OK
    assert guest.map(1, 8 * PAGE, 16 * PAGE - 1, RAM) == iommu.OK
    assert guest.unmap(1, 0, 10 * PAGE - 1) == iommu.RANGE
    for page in (0, 1, 4):
        assert guest.map(1, page * PAGE, page * PAGE + PAGE - 1, RAM) == iommu.INVAL


def test_any_bytes_at_all(guest: Guest) -> None:
    """Thousands of requests of noise, of any length, in any pieces: each buffer comes back, whole or untouched."""
    rng = random.Random(5)
    for _ in range(1500):
        body = bytes([rng.randrange(8)]) + rng.randbytes(rng.randrange(80))
        cuts = [1] * rng.randrange(len(body)) if rng.random() < 0.3 else []
        room = rng.choice((0, 1, 3, 4, 5, 40, 516, 600))
        reply = guest.request(body, room, split=cuts, indirect=rng.random() < 0.3)
        assert reply.untouched or (reply.used_length == room and reply.status <= iommu.NOMEM)
        if not reply.untouched:
            assert bytes([POISON]) * 4 not in reply.data


def test_a_hundred_thousand_refusals_make_a_few_lines(victim: Victim) -> None:
    """DPDK 98b5ecbf76: the guest filled the host's disk."""
    with victim.connect() as client:
        offered = client.ask(wire.GET_FEATURES).u64
    before = len(victim.daemon.log("request-refused"))
    with victim.guest(features=offered & ~wire.F_RING_PACKED, queue_size=1024) as guest:
        guest.start()
        ring = guest.rings[0]
        assert isinstance(ring, SplitRing)
        body, answer = guest.memory.allocate(36), guest.memory.allocate(4)
        guest.memory.write(body, iommu.map_(9, 0, PAGE - 1, RAM))
        ring.write_descriptor(0, descriptor(body, 36, NEXT, 1))
        ring.write_descriptor(1, descriptor(answer, 4, WRITE))
        for _ in range(ring.size):
            ring.offer(0)
        for batch in range(1, 101):
            ring.set_avail_idx(batch * 1000)
            ring.kick()
            wait_until(lambda done=batch * 1000 & 0xFFFF: ring.used_idx() == done, "a batch")  # type: ignore[misc]
        assert guest.memory.read(answer, 4) == bytes([iommu.NOENT, 0, 0, 0])
    ended = victim.daemon.logged("session-ended", lambda line: line["requests"] == {"map": {"noent": 100_000}})
    assert ended["records_lost"] < 100_000
    assert len(victim.daemon.log("request-refused")) - before < 30
