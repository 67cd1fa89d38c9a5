"""H2: file descriptors that are missing, too many, or not what they should be."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from frontend import wire
from frontend.guest import memfd

from hostile.victim import Victim


@contextmanager
def opened(*fds: int) -> Iterator[tuple[int, ...]]:
    """Descriptors that are closed afterwards."""
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def eventfd() -> int:
    """As a front-end makes one."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


@pytest.mark.parametrize(
    ("code", "payload", "count"),
    [
        (wire.GET_FEATURES, b"", 1),
        (wire.SET_FEATURES, bytes(8), 1),
        (wire.SET_VRING_KICK, bytes(8), 0),
        (wire.SET_VRING_KICK, bytes(8), 2),
        (wire.SET_VRING_CALL, wire.u64(wire.NO_FD), 1),
        (wire.SET_VRING_KICK, bytes(8), 200),
        (wire.SET_BACKEND_REQ_FD, b"", 0),
        (wire.ADD_MEM_REG, wire.single_region(wire.region(0, 4096, 0)), 0),
        (wire.ADD_MEM_REG, wire.single_region(wire.region(0, 4096, 0)), 2),
        (wire.SET_MEM_TABLE, wire.memory_table(wire.region(0, 4096, 0)), 2),
        (wire.SET_MEM_TABLE, wire.memory_table(wire.region(0, 4096, 0), wire.region(8192, 4096, 8192)), 1),
        (99, b"", 3),
    ],
)
def test_wrong_number(victim: Victim, code: int, payload: bytes, count: int) -> None:
    """The connection ends and every one is closed. CVE-2019-14818, CVE-2022-0669, DPDK 218daf1664: they leaked."""
    for _ in range(3):
        with opened(*(eventfd() for _ in range(count))) as fds, victim.negotiated() as client:
            client.send(code, payload, fds)
            assert client.ended()


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.open("/", os.O_RDONLY),
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: socket.socket(socket.AF_UNIX).detach(),
        lambda: os.memfd_create("x"),
        lambda: os.open(tempfile.gettempdir(), os.O_RDWR | os.O_TMPFILE),
        lambda: os.pipe2(0)[0],
    ],
    ids=["null", "directory", "zero", "socket", "memfd", "file", "pipe"],
)
def test_no_eventfd(victim: Victim, make: Callable[[], int]) -> None:
    """Refused for kick, call and error, and the connection goes on."""
    before = set(os.listdir("/proc/self/fd"))
    with opened(make()) as fds, victim.negotiated() as client:
        for code in (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR):
            assert client.acknowledged(code, wire.u64(0), fds) != 0
    for fd in set(os.listdir("/proc/self/fd")) - before:
        if os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(int(fd))  # the other end of the pipe


@pytest.mark.parametrize(
    "make",
    [
        eventfd,
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: os.open("/", os.O_RDONLY),
        lambda: socket.socket(socket.AF_UNIX).detach(),
        lambda: memfd(4095),
        lambda: memfd(0),
    ],
    ids=["eventfd", "null", "zero", "directory", "socket", "short", "empty"],
)
def test_no_memory(victim: Victim, make: Callable[[], int]) -> None:
    """Refused as guest memory. CVE-2026-86561: a size that the file does not have was mapped."""
    with opened(make()) as fds, victim.negotiated() as client:
        assert client.acknowledged(wire.ADD_MEM_REG, wire.single_region(wire.region(0, 4096, 0)), fds) != 0
        assert client.acknowledged(wire.SET_MEM_TABLE, wire.memory_table(wire.region(0, 4096, 0)), fds) != 0
    assert victim.daemon.guest_mappings() == []


def test_replacing_without_end(victim: Victim) -> None:
    """Thousands of each: at most one is kept. CVE-2020-10726, DPDK 761d57651c: each one before was left open."""
    with opened(eventfd()) as fds, victim.negotiated() as client:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for _ in range(1500):
                for code in (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR):
                    client.send(code, wire.u64(0), fds)
                client.send(wire.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
                client.ask(wire.GET_QUEUE_NUM)
        assert len(victim.daemon.open_descriptors()) < 40


def test_inflight_without_end(victim: Victim) -> None:
    """GET_INFLIGHT_FD a thousand times: nothing is kept here. CVE-2020-10726."""
    with victim.negotiated() as client:
        for _ in range(1000):
            answer = client.ask(wire.GET_INFLIGHT_FD, wire.inflight(0, 0, 2, 256))
            (fd,) = answer.fds
            os.close(fd)
        assert len(victim.daemon.open_descriptors()) < 30
