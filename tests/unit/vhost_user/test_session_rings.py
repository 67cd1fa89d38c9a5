"""Rings: what makes one run, what stops it, and what is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from frontend import wire

from unit.vhost_user.fake_device import FEATURES, RAM_GPA, Eventfd, Harness
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.features import OFFERED_PROTOCOL_MASK

PACKED_BASE = wire.PACKED_INITIAL_BASE
GOOD_ADDR = wire.vring_addr(0, RAM_GPA, RAM_GPA + 0x8000, RAM_GPA + 0x4000)


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A session with RAM."""
    with Harness() as harness:
        yield harness.ready()


def starts(harness: Harness) -> list[int]:
    """Rings in the order in which they were started."""
    return [call[1] for call in harness.device.calls if call[0] == "start_queue"]


def test_rings_run_when_enabled(harness: Harness) -> None:
    """In QEMU's order: everything first, then SET_VRING_ENABLE."""
    harness.configure(0)
    harness.configure(1, size=64)
    assert starts(harness) == []
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert starts(harness) == [0]
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(1, 1))
    assert starts(harness) == [0, 1]
    setup = harness.device.running[1]
    at = RAM_GPA + 0x10000
    assert (64, at, at + 0x4000, at + 0x8000) == (setup.size, setup.desc, setup.avail, setup.used)
    assert setup.addresses_are_gpa
    assert (setup.base, setup.log_addr) == (0, None)


def test_only_the_enabled_ring_runs(harness: Harness) -> None:
    """Queue 1 without queue 0; enabling a ring that was never configured is nothing (QEMU does it)."""
    harness.configure(1)
    for index in (0, 1):
        harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(index, 1))
    assert starts(harness) == [1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_pieces_in_any_order(harness: Harness, order: tuple[int, ...]) -> None:
    """A ring runs with the last piece, whichever it is."""
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    with Eventfd() as kick:
        pieces: list[tuple[Any, ...]] = [
            (wire.SET_VRING_NUM, wire.vring_state(0, 256)),
            (wire.SET_VRING_ADDR, GOOD_ADDR),
            (wire.SET_VRING_KICK, wire.u64(0), [kick.fd]),
        ]
        for position in order:
            assert starts(harness) == []
            harness.grant(*pieces[position])
    assert starts(harness) == [0]


def test_without_protocol_features_a_ring_runs_at_its_kick() -> None:
    """And SET_VRING_ENABLE is not for such a session."""
    with Harness() as harness:
        harness.ready()
        harness.grant(wire.SET_FEATURES, wire.u64(wire.F_VERSION_1))
        harness.configure(0)
        assert starts(harness) == [0]
        reason = harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 0))
        assert "PROTOCOL_FEATURES is not acknowledged" in reason
        assert 0 in harness.device.running


def test_dropping_protocol_features_enables_every_ring(harness: Harness) -> None:
    """SET_FEATURES without bit 30 enables all rings (vhost-user.rst, ring states)."""
    harness.configure(0)
    harness.grant(wire.SET_FEATURES, wire.u64(FEATURES & ~wire.F_RING_PACKED))
    assert starts(harness) == [0]


def test_disabled_ring_keeps_its_place(harness: Harness) -> None:
    """ENABLE 0 and 1 without anything between them: the ring goes on, and the device is not reset."""
    harness.start()
    harness.device.processed = {0: 17}
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 0))
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(1, 0))
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert harness.device.running[0].base == 17
    assert harness.device.resets == 0


def test_get_vring_base_stops_the_ring(harness: Harness) -> None:
    """The answer is where it stopped; it needs a new kick to run again."""
    harness.start()
    harness.device.processed = {0: 300}
    answer = harness.ask(wire.GET_VRING_BASE, wire.vring_state(0))
    assert struct.unpack("=II", answer.payload) == (0, 300)
    assert 0 not in harness.device.running
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert 0 not in harness.device.running


def test_get_vring_base_twice_and_without_a_run(harness: Harness) -> None:
    """The same answer again; an unused ring's base is that of its format."""
    assert harness.ask(wire.GET_VRING_BASE, wire.vring_state(1)).payload == wire.vring_state(1, 0)
    harness.start()
    harness.device.processed = {0: 300}
    for _ in range(2):
        assert harness.ask(wire.GET_VRING_BASE, wire.vring_state(0)).payload == wire.vring_state(0, 300)
    with Harness() as packed:
        packed.ready(features=FEATURES)
        assert packed.ask(wire.GET_VRING_BASE, wire.vring_state(0)).payload == wire.vring_state(0, PACKED_BASE)


@pytest.mark.parametrize("index", [2, 0xFFFF, 0x10000, 0x8000_0000, 0xFFFF_FFFF])
def test_rings_that_do_not_exist(harness: Harness, index: int) -> None:
    """Ancestor: DPDK CVE-2020-10723, an index checked as 32 bits and used as 16."""
    for code in (wire.SET_VRING_NUM, wire.SET_VRING_BASE, wire.SET_VRING_ENABLE):
        assert "does not exist" in harness.refuse(code, wire.vring_state(index, 1))
    assert "does not exist" in harness.refuse(wire.SET_VRING_ADDR, wire.vring_addr(index, 0, 0, 0))
    with pytest.raises(RemoteProtocolError, match="does not exist"):
        harness.send(wire.GET_VRING_BASE, wire.vring_state(index))


@pytest.mark.parametrize("code", [wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR])
@pytest.mark.parametrize("index", [2, 0xFF])
def test_eventfds_for_rings_that_do_not_exist(harness: Harness, code: int, index: int) -> None:
    """Refused, and the descriptor is closed."""
    with Eventfd() as event:
        assert "does not exist" in harness.refuse(code, wire.u64(index), [event.fd])


@pytest.mark.parametrize("size", [0, 1025, 32768, 32769, 65536, 0x8000_0000, 0xFFFF_FFFF])
def test_sizes_that_are_never_possible(harness: Harness, size: int) -> None:
    """Refused at once, and an older size is forgotten.  Ancestor: DPDK CVE-2026-86565, two sizes of one ring."""
    harness.configure(0)
    assert "allowed are 1 to 1024" in harness.refuse(wire.SET_VRING_NUM, wire.vring_state(0, size))
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert starts(harness) == []


@pytest.mark.parametrize("size", [3, 255, 1023])
def test_sizes_that_depend_on_the_ring_format(size: int) -> None:
    """A split ring's is a power of two; known for sure when the ring is to run."""
    with Harness() as split:
        split.ready()
        split.configure(0, size=size)
        assert "not a power of two" in split.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert not split.device.running
    with Harness() as packed:
        packed.ready(features=FEATURES)
        packed.configure(0, size=size, base=PACKED_BASE)
        packed.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert packed.device.running[0].size == size


def test_a_size_that_is_refused_is_not_kept(harness: Harness) -> None:
    """The ring is enabled and waits for its size only; after a wrong one it goes on waiting."""
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    harness.grant(wire.SET_VRING_ADDR, GOOD_ADDR)
    with Eventfd() as kick:
        harness.grant(wire.SET_VRING_KICK, wire.u64(0), [kick.fd])
    assert "not a power of two" in harness.refuse(wire.SET_VRING_NUM, wire.vring_state(0, 3))
    harness.grant(wire.SET_VRING_ADDR, GOOD_ADDR)
    assert not harness.device.running
    harness.grant(wire.SET_VRING_NUM, wire.vring_state(0, 4))
    assert 0 in harness.device.running


def test_bases() -> None:
    """Any 16-bit index for a split ring, two slots inside the ring for a packed one."""
    for features, size, good, bad in (
        (FEATURES & ~wire.F_RING_PACKED, 16, (0, 0xFFFF, 17), (0x10000, 0x8000_8000)),
        (FEATURES, 16, (PACKED_BASE, 0, 0x800F_000F), (0x0010, 0x0010_0000, 0x8010_8000, 0xFFFF_FFFF)),
    ):
        for base in (*good, *bad):
            with Harness() as harness:
                harness.ready(features=features)
                harness.configure(0, size=size, base=base)
                if base in good:
                    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
                    assert harness.device.running[0].base == base
                else:
                    assert "base" in harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))


def test_unused_base(harness: Harness) -> None:
    """A front-end that never sends SET_VRING_BASE means the beginning, in either format."""
    for features, base in ((FEATURES & ~wire.F_RING_PACKED, 0), (FEATURES, PACKED_BASE)):
        with Harness() as fresh:
            fresh.ready(features=features)
            fresh.grant(wire.SET_VRING_NUM, wire.vring_state(0, 8))
            fresh.grant(wire.SET_VRING_ADDR, GOOD_ADDR)
            with Eventfd() as kick:
                fresh.grant(wire.SET_VRING_KICK, wire.u64(0), [kick.fd])
            fresh.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
            assert fresh.device.running[0].base == base


# Addresses


@pytest.mark.parametrize(
    ("desc", "used", "avail", "reason"),
    [
        (RAM_GPA + 8, RAM_GPA, RAM_GPA, "descriptor table at 0x40000008 is not aligned to 16"),
        (RAM_GPA, RAM_GPA + 2, RAM_GPA, "used ring at 0x40000002 is not aligned to 4"),
        (RAM_GPA, RAM_GPA, RAM_GPA + 1, "available ring at 0x40000001 is not aligned to 2"),
        (0, RAM_GPA, RAM_GPA, "descriptor table at 0x0 is in no memory region"),
        (RAM_GPA, RAM_GPA + 0x100000, RAM_GPA, "used ring at 0x40100000 is in no memory region"),
        (RAM_GPA, RAM_GPA, RAM_GPA - 16, "available ring at 0x3ffffff0 is in no memory region"),
        ((1 << 64) - 16, RAM_GPA, RAM_GPA, "descriptor table at 0xfffffffffffffff0 is in no memory region"),
    ],
)
def test_addresses_that_cannot_be(harness: Harness, desc: int, used: int, avail: int, reason: str) -> None:
    """A guest chooses them, so they are refused and nothing worse; the ring does not run later either."""
    harness.configure(0)
    harness.grant(wire.SET_VRING_ADDR, wire.vring_addr(0, desc, used, avail))
    assert reason in harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    harness.grant(wire.SET_VRING_ADDR, GOOD_ADDR)
    assert not harness.device.running
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert 0 in harness.device.running


def test_ram_that_is_not_shared() -> None:
    """QEMU then sends no region at all and carries on: the log must say what is missing on its command line."""
    with Harness() as harness:
        harness.negotiate()
        harness.configure(0)
        harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
        assert "share=on" in harness.lines[-1].kwargs["hint"]


def test_the_device_has_the_last_word(harness: Harness) -> None:
    """It knows whether a ring crosses the end of a region; its refusal leaves the ring disabled."""
    harness.configure(0)
    harness.device.refuse = "start_queue"
    assert harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 1)) == "start_queue does not want to"
    harness.device.refuse = ""
    harness.grant(wire.SET_VRING_NUM, wire.vring_state(0, 128))
    assert not harness.device.running
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert harness.device.running[0].size == 128


def test_a_kick_that_cannot_start_its_ring_is_refused() -> None:
    """Where rings are enabled from the start, the kick is what starts them."""
    with Harness() as harness:
        harness.negotiate()
        harness.grant(wire.SET_FEATURES, wire.u64(wire.F_VERSION_1))
        harness.grant(wire.SET_VRING_NUM, wire.vring_state(0, 8))
        harness.grant(wire.SET_VRING_ADDR, GOOD_ADDR)
        with Eventfd() as kick:
            assert "no memory region" in harness.refuse(wire.SET_VRING_KICK, wire.u64(0), [kick.fd])
            harness.add_ram()
            assert not harness.device.running
            harness.grant(wire.SET_VRING_KICK, wire.u64(0), [kick.fd])
        assert 0 in harness.device.running


def test_user_addresses() -> None:
    """Without GPA_ADDRESSES ring addresses are looked up in the user addresses of the regions."""
    with Harness() as harness:
        harness.negotiate(protocol=OFFERED_PROTOCOL_MASK & ~wire.P_GPA_ADDRESSES)
        fd = os.memfd_create("ram")
        os.ftruncate(fd, 1 << 20)
        region = wire.region(0, 1 << 20, RAM_GPA)
        harness.grant(wire.ADD_MEM_REG, wire.single_region(region), [fd])
        os.close(fd)
        harness.start()
        assert not harness.device.running[0].addresses_are_gpa
        assert harness.device.running[0].desc == RAM_GPA


# Live changes


def test_num_and_base_of_a_running_ring(harness: Harness) -> None:
    """Ancestor: DPDK 04c27cb673, a ring's size changed while it ran."""
    harness.start()
    for code in (wire.SET_VRING_NUM, wire.SET_VRING_BASE):
        assert "ring 0 runs" in harness.refuse(code, wire.vring_state(0, 8))
    assert starts(harness) == [0, 1]


def test_logging_of_a_running_ring(harness: Harness) -> None:
    """QMP calc-dirty-rate repeats the addresses with the log flag, and without it: the ring does not stop."""
    harness.start()
    for flags, log_addr in ((1, 0x1234), (0, None)):
        addr = wire.vring_addr(0, RAM_GPA, RAM_GPA + 0x8000, RAM_GPA + 0x4000, flags=flags, log=0x1234)
        harness.grant(wire.SET_VRING_ADDR, addr)
        assert ("set_queue_log", 0, log_addr) == harness.device.calls[-1]
    assert "stop_queue" not in harness.device.names()


def test_log_flag_before_the_start(harness: Harness) -> None:
    """It is part of the setup."""
    harness.configure(0)
    addr = wire.vring_addr(0, RAM_GPA, RAM_GPA + 0x8000, RAM_GPA + 0x4000, flags=1, log=0x42)
    harness.grant(wire.SET_VRING_ADDR, addr)
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert harness.device.running[0].log_addr == 0x42


def test_moving_a_running_ring(harness: Harness) -> None:
    """Stopped, moved, started at the place where it stopped; a place that cannot be leaves it stopped."""
    harness.start()
    harness.device.processed = {0: 5}
    moved = wire.vring_addr(0, RAM_GPA + 0x40000, RAM_GPA + 0x48000, RAM_GPA + 0x44000)
    harness.grant(wire.SET_VRING_ADDR, moved)
    assert (harness.device.running[0].base, harness.device.running[0].desc) == (5, RAM_GPA + 0x40000)
    assert "no memory region" in harness.refuse(wire.SET_VRING_ADDR, wire.vring_addr(0, 0, 0, 0))
    assert sorted(harness.device.running) == [1]
    assert harness.device.resets == 0


def test_a_new_kick_for_a_running_ring(harness: Harness) -> None:
    """The ring goes on with the new one."""
    harness.start()
    harness.device.processed = {0: 5}
    with Eventfd() as kick:
        harness.grant(wire.SET_VRING_KICK, wire.u64(0), [kick.fd])
        assert os.readlink(f"/proc/self/fd/{harness.device.running[0].kick_fd}") == "anon_inode:[eventfd]"
    assert harness.device.running[0].base == 5


def test_call_and_err_of_a_running_ring(harness: Harness) -> None:
    """Replaced and taken away on the fly, as QEMU does it when MSI-X vectors change."""
    harness.start()
    with Eventfd() as event:
        harness.grant(wire.SET_VRING_CALL, wire.u64(0), [event.fd])
        harness.grant(wire.SET_VRING_CALL, wire.u64(0 | wire.NO_FD))
        harness.grant(wire.SET_VRING_ERR, wire.u64(1), [event.fd])
        harness.grant(wire.SET_VRING_ERR, wire.u64(1 | wire.NO_FD))
    expected = [("set_call", 0, True), ("set_call", 0, False), ("set_err", 1, True), ("set_err", 1, False)]
    assert expected == harness.device.calls[-4:]


def test_call_and_err_before_the_start(harness: Harness) -> None:
    """QEMU sends ERR once, when it connects; GET_VRING_BASE does not take it away."""
    with Eventfd() as event:
        harness.grant(wire.SET_VRING_ERR, wire.u64(0), [event.fd])
    for bases in ((), (1, 1)):
        harness.start(*bases)
        assert harness.device.running[0].err_fd is not None
        assert harness.device.running[1].err_fd is None
        assert harness.device.running[0].call_fd is not None
        harness.stop()


# Descriptors


@pytest.mark.parametrize("code", [wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR])
@pytest.mark.parametrize("what", ["/dev/null", "/", "memfd", "pipe"])
def test_what_is_not_an_eventfd(harness: Harness, code: int, what: str) -> None:
    """Refused, and a running ring keeps what it has."""
    harness.start()
    calls = list(harness.device.calls)
    other = -1
    if what == "memfd":
        fd = os.memfd_create("x")
    elif what == "pipe":
        fd, other = os.pipe()
    else:
        fd = os.open(what, os.O_RDONLY)
    assert "is not an eventfd" in harness.refuse(code, wire.u64(0), [fd])
    os.close(fd)
    if other >= 0:
        os.close(other)
    assert calls == harness.device.calls


def test_polling_is_not_supported(harness: Harness) -> None:
    """Bit 8 of SET_VRING_KICK asks for a device that polls."""
    assert "polling" in harness.refuse(wire.SET_VRING_KICK, wire.u64(wire.NO_FD))


@pytest.mark.parametrize("live", [False, True])
def test_replacing_eventfds_10_000_times(harness: Harness, live: bool) -> None:
    """Ancestor: DPDK CVE-2019-14818 and 761d57651c, replaced descriptors leaked."""
    if live:
        harness.start()
    with Eventfd() as event:
        for code in (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR):
            harness.grant(code, wire.u64(0), [event.fd])
        before = len(os.listdir("/proc/self/fd"))
        for round_ in range(10_000):
            code = (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR)[round_ % 3]
            harness.send(code, wire.u64(0), [event.fd])
        assert before == len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("value", [2, 0xFFFF_FFFF])
def test_enable_is_0_or_1(harness: Harness, value: int) -> None:
    """Anything else is refused."""
    assert "0 or 1" in harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, value))


# The end


def test_close_leaves_nothing(harness: Harness) -> None:
    """Rings first, then memory; the device is reset for whoever comes next."""
    harness.start()
    harness.grant(wire.SET_FEATURES, wire.u64(FEATURES & ~wire.F_RING_PACKED | 1 << 30 | wire.F_LOG_ALL))
    device = harness.device
    harness.session.close()
    assert not device.running
    assert device.memory == ()
    assert not device.logging
    assert all(mapping.closed for mapping in device.mappings)
    names = device.names()
    assert names.index("stop_queue") < names.index("set_log") < len(names) - 1 - names[::-1].index("set_memory")
    assert names[-1] == "reset"
