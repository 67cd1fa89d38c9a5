"""H3: guest memory that cannot be, or changes under running rings."""

from __future__ import annotations

import os

import pytest
from frontend import iommu, wire
from frontend.guest import memfd
from frontend.memory import GuestMemory, Ram
from frontend.ring import Buffer

from hostile.victim import ENDPOINT, PAGE, Victim

U64 = (1 << 64) - 1
TOP = U64 - PAGE + 1


@pytest.mark.parametrize(
    ("gpa", "size", "offset"),
    [
        (0, 0, 0),
        (TOP, 2 * PAGE, 0),
        (U64, 2, 0),
        (0, U64, 0),
        (0, 1 << 62, 0),
        (0, PAGE, U64),
        (0, PAGE, TOP),
        (0, PAGE, 1 << 40),
        (0, 2 * PAGE + 1, 0),
    ],
)
def test_regions_that_cannot_be(victim: Victim, gpa: int, size: int, offset: int) -> None:
    """Refused. CVE-2018-1059 and CVE-2020-10722: base and size were not added up, or were, and wrapped around."""
    fd = memfd(2 * PAGE)
    try:
        with victim.negotiated() as client:
            body = wire.region(gpa, size, gpa, offset)
            assert client.acknowledged(wire.ADD_MEM_REG, wire.single_region(body), [fd]) != 0
            assert client.acknowledged(wire.SET_MEM_TABLE, wire.memory_table(body), [fd]) != 0
            assert client.acknowledged(wire.REM_MEM_REG, wire.single_region(body)) != 0
    finally:
        os.close(fd)


def test_overlaps_and_duplicates(victim: Victim) -> None:
    """Refused, and what was there stays. DPDK 4d490c7ce3 (number of regions), 2a2904fa9c (table replaced in use)."""
    fd = memfd(16 * PAGE)
    try:
        with victim.negotiated() as client:
            first = wire.region(16 * PAGE, 4 * PAGE, 16 * PAGE)
            assert client.acknowledged(wire.ADD_MEM_REG, wire.single_region(first), [fd]) == 0
            for gpa, size in ((16, 4), (15, 2), (19, 1), (17, 1), (0, 16 + 1)):
                body = wire.region(gpa * PAGE, min(size, 16) * PAGE + (PAGE if size > 16 else 0), gpa * PAGE)
                assert client.acknowledged(wire.ADD_MEM_REG, wire.single_region(body), [fd]) != 0
            twice = wire.memory_table(first, first)
            assert client.acknowledged(wire.SET_MEM_TABLE, twice, [fd, fd]) != 0
            assert len(victim.daemon.guest_mappings()) == 1
            assert client.acknowledged(wire.REM_MEM_REG, wire.single_region(first)) == 0
            assert client.acknowledged(wire.REM_MEM_REG, wire.single_region(first)) != 0
            assert victim.daemon.guest_mappings() == []
    finally:
        os.close(fd)


def test_slots_until_there_are_none(victim: Victim) -> None:
    """Every slot that is promised can be had, and not one more; 509 mappings go with the connection."""
    fd = memfd(PAGE)
    try:
        with victim.negotiated() as client:
            slots = client.ask(wire.GET_MAX_MEM_SLOTS).u64
            for slot in range(slots):
                body = wire.region(slot * PAGE, PAGE, slot * PAGE)
                assert client.acknowledged(wire.ADD_MEM_REG, wire.single_region(body), [fd]) == 0
            body = wire.region(slots * PAGE, PAGE, slots * PAGE)
            assert client.acknowledged(wire.ADD_MEM_REG, wire.single_region(body), [fd]) != 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_goes_under_running_rings(victim: Victim, packed: bool) -> None:
    """REM_MEM_REG and an empty table while requests are served: the rings stop. DPDK 2a2904fa9c."""
    for how in ("remove", "table"):
        with victim.connect() as probe:
            offered = probe.ask(wire.GET_FEATURES).u64
        with victim.guest(features=offered & ~(0 if packed else wire.F_RING_PACKED)) as guest:
            guest.start()
            assert guest.attach(1, ENDPOINT) == iommu.OK
            (ram,) = guest.memory.rams
            if how == "remove":
                guest.remove_memory(ram)
            else:
                guest.set_memory_table([])
            assert guest.rings[0].broken()
            guest.rings[0].kick()
            assert guest.client.ask(wire.GET_STATUS).u64 & 0x40
            guest.add_memory(ram)
            guest.reset_and_start()
            assert guest.attach(1, ENDPOINT) == iommu.OK


def test_the_table_is_swapped_all_the_time(victim: Victim) -> None:
    """Thousands of times with requests in between: each request finds its memory. DPDK 2a2904fa9c, 73ea44370d."""
    with victim.guest() as guest:
        guest.start()
        extra = Ram(gpa=1 << 40, size=1 << 16)
        try:
            for number in range(400):
                guest.set_memory_table([*guest.memory.rams, extra] if number % 2 else guest.memory.rams)
                assert guest.attach(1, ENDPOINT) == iommu.OK
        finally:
            extra.close()


@pytest.mark.parametrize("where", ["ring", "buffer"])
def test_a_file_that_shrinks(victim: Victim, where: str) -> None:
    """Truncated after it was mapped: no SIGBUS ends the daemon; the ring does. Every device that maps RAM has this."""
    memory = GuestMemory(Ram(), Ram(gpa=1 << 32, size=1 << 20))
    with victim.guest(memory=memory) as guest:
        guest.start()
        first, second = memory.rams
        if where == "ring":
            os.ftruncate(first.fd, 0)
            guest.rings[0].kick()
        else:
            guest.rings[0].submit([Buffer(second.gpa, 20), Buffer(second.gpa + 64, 4, writable=True)])
            guest.rings[0].wait()
            os.ftruncate(second.fd, 0)
            guest.rings[0].submit([Buffer(second.gpa, 20), Buffer(second.gpa + 64, 4, writable=True)])
        assert guest.rings[0].broken()
        os.ftruncate(first.fd, first.size)
        os.ftruncate(second.fd, second.size)


def test_buffers_at_the_edges_of_regions(victim: Victim) -> None:
    """Across two neighbours is fine, across a hole is not. CVE-2018-1059: only the first byte was looked up."""
    low, high, far = Ram(), Ram(gpa=0x4040_0000, size=1 << 16), Ram(gpa=0x4100_0000, size=1 << 16)
    with victim.guest(memory=GuestMemory(low, high, far)) as guest:
        guest.start()
        edge = high.gpa
        body = iommu.attach(1, ENDPOINT)
        guest.memory.write(edge - 7, body[:7])
        guest.memory.write(edge, body[7:])
        answer = guest.memory.allocate(4)
        guest.rings[0].submit([Buffer(edge - 7, 20), Buffer(answer, 4, writable=True)])
        assert guest.rings[0].wait()[0].length == 4
        assert guest.memory.read(answer, 4) == bytes(4)
        guest.rings[0].submit([Buffer(high.gpa + high.size - 7, 20), Buffer(answer, 4, writable=True)])
        assert guest.rings[0].broken()
