"""H4: rings that are described wrongly, or changed while they run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from frontend import iommu, wire
from frontend.client import Client
from frontend.guest import Guest

from hostile.victim import ENDPOINT, RAM, Victim, turned_down

INDICES = (2, 3, 255, 256, 0x1_0000, 0x1_0001, 0x8000_0000, 0xFFFF_FFFF)


@pytest.fixture
def client(victim: Victim) -> Iterator[Client]:
    """A negotiated connection."""
    with victim.negotiated() as connected:
        yield connected


@pytest.mark.parametrize("index", INDICES)
def test_rings_that_do_not_exist(client: Client, index: int) -> None:
    """Refused, whatever is asked. CVE-2020-10723: the index was checked in 32 bits and used in 16."""
    for code in (wire.SET_VRING_NUM, wire.SET_VRING_BASE, wire.SET_VRING_ENABLE):
        assert client.acknowledged(code, wire.vring_state(index, 1)) != 0
    assert client.acknowledged(wire.SET_VRING_ADDR, wire.vring_addr(index, RAM, RAM, RAM)) != 0


@pytest.mark.parametrize("index", INDICES)
def test_the_base_of_a_ring_that_does_not_exist(victim: Victim, index: int) -> None:
    """It has no answer: the connection ends."""
    with victim.negotiated() as client:
        client.send(wire.GET_VRING_BASE, wire.vring_state(index))
        assert client.ended()


@pytest.mark.parametrize("bits", [2, 255, 0x80, 1 << 9, 1 << 16, 1 << 31, 1 << 63])
def test_eventfds_of_rings_that_do_not_exist(victim: Victim, bits: int) -> None:
    """Refused, or no message at all; the descriptor is closed."""
    fd = os.eventfd(0)
    try:
        for code in (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR):
            with victim.negotiated() as client:
                assert turned_down(client, code, wire.u64(bits), [fd])
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, 3, 1025, 32768, 32769, 65535, 65536, 1 << 31, 0xFFFF_FFFF])
def test_sizes(victim: Victim, size: int) -> None:
    """A split ring of that size never runs. CVE-2026-86565 (size and allocation disagree), ring alignment by zero."""
    with victim.guest(memory_slots=False, features=None) as guest:
        guest.client.do(wire.SET_FEATURES, wire.u64(guest.features & ~wire.F_RING_PACKED))
        guest.configure_ring(0, 0)
        refused = guest.client.acknowledged(wire.SET_VRING_NUM, wire.vring_state(0, size))
        refused |= guest.client.acknowledged(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert refused
        guest.rings[0].kick()


@pytest.mark.parametrize(
    ("desc", "used", "avail"),
    [
        (0, 0, 0),
        (RAM + 1, RAM + 0x2000, RAM + 0x3000),
        (RAM, RAM + 0x2002, RAM + 0x3000),
        (RAM, RAM + 0x2000, RAM + 0x3001),
        (RAM + (4 << 20) - 16, RAM + 0x2000, RAM + 0x3000),
        (RAM, RAM + (4 << 20) - 4, RAM + 0x3000),
        (RAM, RAM + 0x2000, RAM + (4 << 20) - 2),
        (RAM - 16, RAM + 0x2000, RAM + 0x3000),
        ((1 << 64) - 16, RAM + 0x2000, RAM + 0x3000),
        ((1 << 64) - 4096, (1 << 64) - 4096, (1 << 64) - 4096),
    ],
)
def test_addresses(victim: Victim, desc: int, used: int, avail: int) -> None:
    """Misaligned, outside, half outside, wrapping: refused. CVE-2018-1059, CVE-2020-10725, DPDK 04c27cb673."""
    with victim.guest(memory_slots=False) as guest:
        guest.client.do(wire.SET_FEATURES, wire.u64(guest.features & ~wire.F_RING_PACKED))
        guest.configure_ring(0, 0)
        refused = guest.client.acknowledged(wire.SET_VRING_ADDR, wire.vring_addr(0, desc, used, avail))
        refused |= guest.client.acknowledged(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert refused


def split_guest(victim: Victim) -> Guest:
    """A started guest with split rings."""
    with victim.connect() as probe:
        offered = probe.ask(wire.GET_FEATURES).u64
    guest = victim.guest(features=offered & ~wire.F_RING_PACKED)
    guest.start()
    return guest


def test_all_three_areas_in_one_place(victim: Victim) -> None:
    """The device overwrites what it reads: the ring breaks or goes on, nothing else happens."""
    with split_guest(victim) as guest:
        guest.stop()
        ring = guest.rings[0]
        ring.used = ring.avail = ring.desc
        guest.memory.write(ring.desc, b"\x01\x00" * 2048)
        guest.start([0, 0])
        for _ in range(50):
            ring.kick()
        guest.client.ask(wire.GET_STATUS)


def test_numbers_of_a_running_ring(victim: Victim) -> None:
    """Size and base cannot change under it; it goes on undisturbed. DPDK 04c27cb673."""
    with split_guest(victim) as guest:
        for value in (1, 256, 0xFFFF):
            assert guest.client.acknowledged(wire.SET_VRING_NUM, wire.vring_state(0, value)) != 0
            assert guest.client.acknowledged(wire.SET_VRING_BASE, wire.vring_state(0, value)) != 0
            assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.parametrize("base", [1, 0x7FFF, 0xFFFF])
def test_a_base_that_is_not_the_drivers(victim: Victim, base: int) -> None:
    """The available index is more than a ring away from it: the ring breaks, and is mended by a reset."""
    with split_guest(victim) as guest:
        guest.stop()
        guest.rings[0].reset()
        guest.start([base, 0])
        if base != 0xFFFF:
            guest.rings[0].kick()
            assert guest.rings[0].broken()
        guest.reset_and_start()
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.parametrize("base", [0x1_0000, 0xFFFF_FFFF])
def test_a_base_of_more_than_16_bits(victim: Victim, base: int) -> None:
    """No split ring has one."""
    with split_guest(victim) as guest:
        guest.stop()
        guest.client.acknowledged(wire.SET_VRING_BASE, wire.vring_state(0, base))
        fd = guest.rings[0].kick_fd
        refused = guest.client.acknowledged(wire.SET_VRING_KICK, wire.u64(0), [fd])
        refused |= guest.client.acknowledged(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert refused


def test_stopping_what_does_not_run(client: Client) -> None:
    """GET_VRING_BASE of a ring that was never described, twice. DPDK 1846fe767f."""
    assert [client.get_base(index) for index in (0, 0, 1)] == [client.get_base(0)] * 3


def test_only_the_event_queue(victim: Victim) -> None:
    """Enabled alone: requests wait, and are served when the other comes."""
    with victim.guest() as guest:
        for index in range(2):
            guest.configure_ring(index)
        guest.client.do(wire.SET_VRING_ENABLE, wire.vring_state(1, 1))
        guest.post_event_buffers(8)
        guest.rings[1].kick()
        guest.client.do(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert guest.attach(1, ENDPOINT) == iommu.OK
