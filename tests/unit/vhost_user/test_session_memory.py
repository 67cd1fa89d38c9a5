"""Guest memory, dirty log and in-flight memory as a front-end may describe them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from frontend import wire
from frontend.guest import memfd

from unit.vhost_user.fake_device import FakeDevice, Harness
from viommud.vhost_user.features import OFFERED_PROTOCOL_MASK
from viommud.vhost_user.session import SessionLimits

USER_ADDRESSES = OFFERED_PROTOCOL_MASK & ~wire.P_GPA_ADDRESSES
PAGE = 4096


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A session whose ring addresses are user addresses."""
    with Harness() as harness:
        yield harness.negotiate(protocol=USER_ADDRESSES)


@pytest.fixture
def ram() -> Iterator[int]:
    """A memfd of 16 pages."""
    fd = memfd(16 * PAGE)
    yield fd
    os.close(fd)


def single(gpa: int, size: int, user: int | None = None, offset: int = 0) -> bytes:
    """ADD_MEM_REG, REM_MEM_REG."""
    return wire.single_region(wire.region(gpa, size, gpa if user is None else user, offset))


def layout(device: FakeDevice) -> list[tuple[int, int, int, int]]:
    """What the device has as memory."""
    regions = [mapped.region for mapped in device.memory]
    return [(region.guest_addr, region.size, region.user_addr, region.mmap_offset) for region in regions]


def test_regions_come_and_go(harness: Harness, ram: int) -> None:
    """ADD_MEM_REG and REM_MEM_REG; what is dropped is unmapped after the device has let go of it."""
    harness.grant(wire.ADD_MEM_REG, single(0, PAGE, 0x7000_0000), [ram])
    harness.grant(wire.ADD_MEM_REG, single(PAGE, PAGE, 0x8000_0000, PAGE), [ram])
    assert layout(harness.device) == [(0, PAGE, 0x7000_0000, 0), (PAGE, PAGE, 0x8000_0000, PAGE)]
    harness.grant(wire.REM_MEM_REG, single(0, PAGE, 0x7000_0000))
    assert layout(harness.device) == [(PAGE, PAGE, 0x8000_0000, PAGE)]
    assert [mapping.closed for mapping in harness.device.mappings] == [True, False]


def test_with_gpa_addresses_the_user_address_is_ignored(ram: int) -> None:
    """QEMU repeats the guest address there; a front-end that puts anything else there is understood as well."""
    with Harness() as harness:
        harness.negotiate()
        harness.grant(wire.ADD_MEM_REG, single(0, PAGE, 0x7000_0000), [ram])
        harness.grant(wire.ADD_MEM_REG, single(PAGE, PAGE, 0x7000_0000), [ram])
        assert [(gpa, user) for gpa, _, user, _ in layout(harness.device)] == [(0, 0), (PAGE, PAGE)]
        harness.grant(wire.REM_MEM_REG, single(0, PAGE, 0))


def test_the_session_keeps_no_memory_descriptor(harness: Harness, ram: int) -> None:
    """A mapping needs none; 509 slots would be 509 descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    for index in range(8):
        harness.grant(wire.ADD_MEM_REG, single(index * PAGE, PAGE), [ram])
    assert before == len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("gpa", "size", "user", "offset", "reason"),
    [
        (0, 0, 0, 0, "is empty"),
        ((1 << 64) - PAGE, PAGE + 1, 0, 0, "beyond the last guest address"),
        ((1 << 64) - 1, 1 << 62, 0, 0, "beyond the last guest address"),
        (0, PAGE, (1 << 64) - PAGE + 1, 0, "beyond the last user address"),
        (0, PAGE, 0, (1 << 63) - PAGE, "greatest file offset"),
        (0, PAGE, 0, (1 << 64) - PAGE, "greatest file offset"),
        (0, (1 << 64) - 1, 0, 0, "greatest file offset"),
    ],
)
def test_impossible_numbers(
    harness: Harness, ram: int, gpa: int, size: int, user: int, offset: int, reason: str
) -> None:
    """Every sum is checked.  Ancestors: DPDK CVE-2026-86561, c6420a3632."""
    assert reason in harness.refuse(wire.ADD_MEM_REG, single(gpa, size, user, offset), [ram])
    body = wire.memory_table(wire.region(gpa, size, user, offset))
    assert reason in harness.refuse(wire.SET_MEM_TABLE, body, [ram])
    assert "map_region" not in harness.device.names()


def test_the_last_byte_of_the_address_space_is_usable(harness: Harness, ram: int) -> None:
    """Ends are inclusive."""
    harness.grant(wire.ADD_MEM_REG, single((1 << 64) - PAGE, PAGE, (1 << 64) - PAGE), [ram])


@pytest.mark.parametrize(
    ("gpa", "size", "user", "reason"),
    [
        (4 * PAGE, 4 * PAGE, 0x9000_0000, "overlaps memory region"),
        (0, 5 * PAGE, 0x9000_0000, "overlaps memory region"),
        (7 * PAGE, PAGE, 0x9000_0000, "overlaps memory region"),
        (5 * PAGE, PAGE, 0x9000_0000, "overlaps memory region"),
        (0, 16 * PAGE, 0x9000_0000, "overlaps memory region"),
        (0x1000_0000, PAGE, 0x7000_3000, "in user addresses"),
        (0x1000_0000, 2 * PAGE, 0x6FFF_F000, "in user addresses"),
    ],
)
def test_overlaps(harness: Harness, ram: int, gpa: int, size: int, user: int, reason: str) -> None:
    """In guest and in user addresses, from every side."""
    harness.grant(wire.ADD_MEM_REG, single(4 * PAGE, 4 * PAGE, 0x7000_0000), [ram])
    assert reason in harness.refuse(wire.ADD_MEM_REG, single(gpa, size, user), [ram])
    table = wire.memory_table(wire.region(4 * PAGE, 4 * PAGE, 0x7000_0000, 0), wire.region(gpa, size, user))
    assert reason in harness.refuse(wire.SET_MEM_TABLE, table, [ram, ram])
    assert len(harness.device.memory) == 1


def test_neighbours_are_no_overlap(harness: Harness, ram: int) -> None:
    """Regions may touch."""
    harness.grant(wire.ADD_MEM_REG, single(PAGE, PAGE), [ram])
    harness.grant(wire.ADD_MEM_REG, single(0, PAGE), [ram])
    harness.grant(wire.ADD_MEM_REG, single(2 * PAGE, PAGE), [ram])


def test_slots_run_out(ram: int) -> None:
    """And come back."""
    with Harness(limits=SessionLimits(memory_slots=3)) as harness:
        harness.negotiate()
        for index in range(3):
            harness.grant(wire.ADD_MEM_REG, single(index * PAGE, PAGE), [ram])
        assert "all 3 memory slots" in harness.refuse(wire.ADD_MEM_REG, single(3 * PAGE, PAGE), [ram])
        harness.grant(wire.REM_MEM_REG, single(PAGE, PAGE))
        harness.grant(wire.ADD_MEM_REG, single(3 * PAGE, PAGE), [ram])


@pytest.mark.parametrize(("gpa", "size", "user"), [(PAGE, PAGE, PAGE), (0, 2 * PAGE, 0), (0, PAGE, PAGE)])
def test_removing_what_is_not_there(harness: Harness, ram: int, gpa: int, size: int, user: int) -> None:
    """Guest address, user address and size must all be those of a region."""
    harness.grant(wire.ADD_MEM_REG, single(0, PAGE), [ram])
    assert "there is no memory region" in harness.refuse(wire.REM_MEM_REG, single(gpa, size, user))
    assert len(harness.device.memory) == 1


def test_a_descriptor_with_rem_mem_reg_is_closed(harness: Harness, ram: int) -> None:
    """Some front-ends send one."""
    harness.grant(wire.ADD_MEM_REG, single(0, PAGE), [ram])
    harness.grant(wire.REM_MEM_REG, single(0, PAGE), [ram])


def test_table_replaces_everything(harness: Harness, ram: int) -> None:
    """SET_MEM_TABLE, also with no region; the old ones are unmapped once."""
    harness.grant(wire.ADD_MEM_REG, single(0, PAGE), [ram])
    table = wire.memory_table(*(wire.region(index * PAGE, PAGE, index * PAGE, index * PAGE) for index in range(8)))
    harness.grant(wire.SET_MEM_TABLE, table, [ram] * 8)
    assert len(harness.device.memory) == 8
    assert harness.device.mappings[0].closed
    harness.grant(wire.SET_MEM_TABLE, wire.memory_table())
    assert not harness.device.memory
    assert all(mapping.closed for mapping in harness.device.mappings)


def test_table_that_fails_half_way(harness: Harness, ram: int) -> None:
    """What was mapped of it is unmapped again and the old table stays."""
    harness.grant(wire.ADD_MEM_REG, single(0, PAGE), [ram])
    write_only = os.open("/proc/self/fd/" + str(ram), os.O_WRONLY)
    table = wire.memory_table(wire.region(0, PAGE, 0), wire.region(PAGE, PAGE, PAGE))
    harness.device.refuse = ""
    mapped = harness.device.map_region

    def map_one(region: object, fd: int) -> object:
        if region.guest_addr == PAGE:  # type: ignore[attr-defined]
            harness.device.refuse = "map_region"
        return mapped(region, fd)  # type: ignore[arg-type]

    harness.device.map_region = map_one  # type: ignore[method-assign,assignment]
    assert harness.refuse(wire.SET_MEM_TABLE, table, [ram, write_only]) == "map_region does not want to"
    assert [mapping.closed for mapping in harness.device.mappings] == [False, True]
    assert len(harness.device.memory) == 1
    os.close(write_only)


@pytest.mark.parametrize("what", ["/dev/null", "/dev/zero", "/", "pipe", "socket", "eventfd"])
def test_what_is_not_memory(harness: Harness, what: str) -> None:
    """Refused by kind, as region, log and in-flight memory."""
    extra = -1
    if what == "pipe":
        fd, extra = os.pipe()
    elif what == "socket":
        one, two = socket.socketpair()
        fd, extra = one.detach(), two.detach()
    elif what == "eventfd":
        fd = os.eventfd(0)
    else:
        fd = os.open(what, os.O_RDONLY)
    try:
        assert "not a regular file or memfd" in harness.refuse(wire.ADD_MEM_REG, single(0, PAGE), [fd])
        table = wire.memory_table(wire.region(0, PAGE, 0))
        assert "not a regular file or memfd" in harness.refuse(wire.SET_MEM_TABLE, table, [fd])
        assert harness.ask(wire.SET_LOG_BASE, wire.log_area(PAGE), [fd]).u64 != 0
        inflight = wire.inflight(1 << 20, 0, 1, 1)
        assert "not a regular file or memfd" in harness.refuse(wire.SET_INFLIGHT_FD, inflight, [fd])
    finally:
        os.close(fd)
        if extra >= 0:
            os.close(extra)
    assert not {"map_region", "set_log", "set_inflight"} & set(harness.device.names())


# Dirty log


def test_log(harness: Harness, ram: int) -> None:
    """Answered by its own reply; a second log replaces the first."""
    assert harness.ask(wire.SET_LOG_BASE, wire.log_area(PAGE, 100), [ram]).u64 == 0
    assert harness.ask(wire.SET_LOG_BASE, wire.log_area(2 * PAGE), [ram]).u64 == 0
    assert harness.device.calls[-2:] == [("set_log", True, PAGE, 100), ("set_log", True, 2 * PAGE, 0)]


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (17 * PAGE, 0), (PAGE, 16 * PAGE), (PAGE, (1 << 64) - PAGE)])
def test_log_outside_its_file(harness: Harness, ram: int, size: int, offset: int) -> None:
    """Ancestors: DPDK CVE-2020-10722, CVE-2026-86563."""
    assert harness.ask(wire.SET_LOG_BASE, wire.log_area(size, offset), [ram]).u64 != 0
    assert "set_log" not in harness.device.names()


def test_log_without_a_descriptor(harness: Harness) -> None:
    """There is nothing to write to."""
    assert harness.ask(wire.SET_LOG_BASE, wire.log_area(PAGE)).u64 != 0


def test_log_without_its_protocol_feature(ram: int) -> None:
    """Then the message has no reply of its own and is only acknowledged: QEMU waits for nothing more."""
    with Harness() as harness:
        harness.negotiate(protocol=OFFERED_PROTOCOL_MASK & ~wire.P_LOG_SHMFD)
        assert harness.send(wire.SET_LOG_BASE, wire.log_area(PAGE)) is None
        assert "LOG_SHMFD" in harness.refuse(wire.SET_LOG_BASE, wire.log_area(PAGE), [ram])


def test_log_eventfd(harness: Harness, ram: int) -> None:
    """Accepted and not needed; anything else is refused."""
    event = os.eventfd(0)
    harness.grant(wire.SET_LOG_FD, fds=[event])
    os.close(event)
    assert "not an eventfd" in harness.refuse(wire.SET_LOG_FD, fds=[ram])


# In-flight memory


def test_inflight_memory(harness: Harness) -> None:
    """GET gives memory that nobody can shrink; SET takes it back."""
    answer = harness.ask(wire.GET_INFLIGHT_FD, wire.inflight(0, 0, 2, 256))
    size, offset, queues, queue_size = struct.unpack("=QQHH4x", answer.payload)
    assert (size, offset, queues, queue_size) == (2 * (64 + 16 * 256), 0, 2, 256)
    (fd,) = answer.fds
    assert os.fstat(fd).st_size == size
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    harness.grant(wire.SET_INFLIGHT_FD, answer.payload, [fd])
    assert ("set_inflight", True, size, 0, 2, 256) == harness.device.calls[-1]


@pytest.mark.parametrize(("queues", "size"), [(0, 256), (3, 256), (0xFFFF, 256), (2, 0), (2, 1025), (2, 0xFFFF)])
def test_inflight_for_rings_that_do_not_exist(harness: Harness, ram: int, queues: int, size: int) -> None:
    """Size 0 is how GET says no.  Ancestor: DPDK CVE-2021-3839."""
    answer = harness.ask(wire.GET_INFLIGHT_FD, wire.inflight(0, 0, queues, size))
    assert bytes(24) == answer.payload
    assert answer.fds == ()
    assert "in-flight memory for" in harness.refuse(wire.SET_INFLIGHT_FD, wire.inflight(PAGE, 0, queues, size), [ram])


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (64 + 15, 0), (17 * PAGE, 0), (PAGE, 16 * PAGE), (PAGE, (1 << 64) - 1)]
)
def test_inflight_outside_its_file(harness: Harness, ram: int, size: int, offset: int) -> None:
    """Too small for the rings, or not in the file.  Ancestor: DPDK CVE-2026-86565."""
    harness.refuse(wire.SET_INFLIGHT_FD, wire.inflight(size, offset, 1, 1), [ram])
    assert "set_inflight" not in harness.device.names()


def test_inflight_repeated(harness: Harness) -> None:
    """Ancestor: DPDK CVE-2020-10726, every GET_INFLIGHT_FD leaked a descriptor and a mapping."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        answer = harness.ask(wire.GET_INFLIGHT_FD, wire.inflight(0, 0, 2, 256))
        harness.grant(wire.SET_INFLIGHT_FD, answer.payload, answer.fds)
        os.close(harness.answers_fds.pop())
    assert before == len(os.listdir("/proc/self/fd"))


def test_inflight_under_a_running_ring(ram: int) -> None:
    """It belongs to the ring's run."""
    with Harness() as harness:
        harness.ready().start()
        assert "while a ring runs" in harness.refuse(wire.SET_INFLIGHT_FD, wire.inflight(PAGE, 0, 1, 1), [ram])
