"""Ownership and kinds of descriptors."""

from __future__ import annotations

import os
import socket

import pytest

from viommud.vhost_user.errors import Refused
from viommud.vhost_user.fds import (
    OwnedFd,
    check_area,
    is_eventfd,
    is_unix_stream_socket,
    memory_size,
    replace_eventfd,
)


def test_take_ends_ownership() -> None:
    """The owner closes nothing that it gave away."""
    owned = OwnedFd(os.eventfd(0))
    number = owned.take()
    owned.close()
    assert owned.fd == -1
    os.close(number)
    with pytest.raises(ValueError, match="another owner"):
        owned.fileno()


def test_a_forgotten_descriptor_is_closed_with_a_warning() -> None:
    """Nothing is leaked even by a mistake, and the mistake is seen."""
    number = os.eventfd(0)
    with pytest.warns(ResourceWarning, match="never closed"):
        OwnedFd(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_kinds() -> None:
    """What is an eventfd, memory, or a stream socket, and what only looks like it."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    internet = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reader, writer = os.pipe()
    opened = {
        "eventfd": os.eventfd(0),
        "semaphore": os.eventfd(0, os.EFD_SEMAPHORE),
        "memfd": os.memfd_create("anon_inode:[eventfd]"),
        "null": os.open("/dev/null", os.O_RDWR),
        "directory": os.open("/", os.O_RDONLY),
        "file": os.open(__file__, os.O_RDONLY),
        "pipe": reader,
        "stream": left.fileno(),
        "datagram": datagram.fileno(),
        "internet": internet.fileno(),
    }
    assert {"eventfd", "semaphore"} == {name for name, fd in opened.items() if is_eventfd(fd)}
    assert {"memfd", "file"} == {name for name, fd in opened.items() if memory_size(fd) is not None}
    assert {"stream"} == {name for name, fd in opened.items() if is_unix_stream_socket(fd)}
    for sock in (left, right, datagram, other, internet):
        sock.close()
    for name in ("eventfd", "semaphore", "memfd", "null", "directory", "file", "pipe"):
        os.close(opened[name])
    os.close(writer)


def test_a_refused_eventfd_leaves_the_old_one() -> None:
    """The ring keeps what it had."""
    with OwnedFd(os.eventfd(0)) as old, OwnedFd(os.open("/dev/null", os.O_RDONLY)) as bad:
        with pytest.raises(Refused, match="call descriptor is not an eventfd"):
            replace_eventfd(old, [bad], "call")
        os.fstat(old.fileno())


@pytest.mark.parametrize(
    ("size", "offset"),
    [(0, 0), (4097, 0), (4096, 1), (1, 4096), (1 << 63, 1 << 63), ((1 << 64) - 1, 1), (1, (1 << 64) - 1)],
)
def test_areas_outside_the_file(size: int, offset: int) -> None:
    """Ancestor: DPDK CVE-2020-10722, a sum that wraps around."""
    with OwnedFd(os.memfd_create("area")) as fd:
        os.ftruncate(fd.fileno(), 4096)
        check_area(fd, "log", 4096, 0)
        with pytest.raises(Refused, match="log"):
            check_area(fd, "log", size, offset)
