"""File descriptors that arrive over a socket: who owns them, and what they are."""

from __future__ import annotations

import os
import socket
import stat
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from viommud.vhost_user.errors import Refused

MAX_FILE_OFFSET = (1 << 63) - 1
"""off_t is signed."""


class OwnedFd:
    """A file descriptor with exactly one owner.

    The owner closes it, or gives it away with take() or move(); afterwards this object holds -1.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})"

    @property
    def fd(self) -> int:
        """The number, or -1 once it is closed or given away."""
        return self._fd

    def fileno(self) -> int:
        """The number of a descriptor that is still owned.

        :raises ValueError: it is closed or was given away.
        """
        if self._fd < 0:
            raise ValueError("the file descriptor is closed or has another owner")
        return self._fd

    def take(self) -> int:
        """Give the descriptor to the caller, who must close it."""
        fd, self._fd = self.fileno(), -1
        return fd

    def move(self) -> OwnedFd:
        """Give the descriptor to a new OwnedFd."""
        return OwnedFd(self.take())

    def close(self) -> None:
        """Close; nothing if that is done or the descriptor was given away."""
        if self._fd >= 0:
            os.close(self.take())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"file descriptor {self._fd} was never closed", ResourceWarning, stacklevel=1)
            self.close()


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close every descriptor of a collection that is still owned."""
    for fd in fds:
        fd.close()


def is_eventfd(fd: int) -> bool:
    """Is this an eventfd?  The kernel has no call for it; the name of the anonymous inode tells."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False


def is_unix_stream_socket(fd: int) -> bool:
    """Is this a connected or connectable UNIX stream socket?"""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    sock = socket.socket(fileno=fd)
    try:
        return sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
    finally:
        sock.detach()


def memory_size(fd: int) -> int | None:
    """Size in bytes of a file that can hold shared memory: a regular file or a memfd.  None for anything else.

    Pipes, directories, sockets and devices are refused by kind rather than by a failing mmap: some devices can be
    mapped, with surprising results.
    """
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def require_eventfd(fd: OwnedFd, use: str) -> None:
    """Refuse a descriptor that is no eventfd.

    :raises Refused: naming its use.
    """
    if not is_eventfd(fd.fileno()):
        raise Refused(f"the {use} descriptor is not an eventfd")


def replace_eventfd(old: OwnedFd | None, fds: Sequence[OwnedFd], use: str) -> OwnedFd | None:
    """Take an eventfd, or none, in place of another, which is closed.

    :raises Refused: it is no eventfd; the old one is still there.
    """
    if fds:
        require_eventfd(fds[0], use)
    if old is not None:
        old.close()
    return fds[0].move() if fds else None


def require_memory(fd: OwnedFd, use: str) -> int:
    """Size in bytes of a descriptor that must be a regular file or a memfd.

    :raises Refused: it is something else.
    """
    size = memory_size(fd.fileno())
    if size is None:
        raise Refused(f"the descriptor for {use} is not a regular file or memfd")
    return size


def check_area(fd: OwnedFd, use: str, size: int, offset: int) -> None:
    """Refuse an area that is empty or not wholly inside its file.

    :raises Refused: naming its use.
    """
    file_size = require_memory(fd, use)
    if size == 0:
        raise Refused(f"the {use} is empty")
    if offset + size > min(file_size, MAX_FILE_OFFSET):
        raise Refused(f"the {use}, {size} bytes at {offset}, is not in a file of {file_size} bytes")
