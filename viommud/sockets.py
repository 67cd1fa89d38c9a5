"""Where the vhost-user socket comes from: made here, inherited, or passed by systemd."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from viommud.errors import UsageError
from viommud.options import Options
from viommud.service import listen_fds

FD_NAME = "vhost"
"""FileDescriptorName= of the socket in a systemd unit, where more than one is passed."""
_BACKLOG = 8


@dataclass(frozen=True, slots=True)
class VhostSocket:
    """A UNIX stream socket to talk vhost-user on."""

    sock: socket.socket
    listening: bool
    """False: a front-end is connected already."""
    described: str
    """Where it came from, for the log."""
    bound: tuple[Path, int, int] | None = None
    """Path, device and inode of the socket file that was made here."""

    def close(self) -> None:
        """Close it, and remove the file if it is still the one that was made here."""
        if self.bound is not None:
            path, device, inode = self.bound
            try:
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) == (device, inode):
                    os.unlink(path)
            except FileNotFoundError:
                pass
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def acquire(options: Options, environ: MutableMapping[str, str] = os.environ) -> VhostSocket:
    """The socket that the options or the environment name.

    :raises UsageError: there is none, or it cannot be used.
    """
    passed = listen_fds(environ)
    if options.socket_path is not None:
        return _bind(options.socket_path, options.socket_group, options.socket_mode)
    if options.fd is not None:
        found = _adopt(options.fd, f"--fd {options.fd}")
    elif passed:
        found = _adopt(_choose(passed), "the socket in LISTEN_FDS")
    else:
        raise UsageError("no socket: give --socket-path PATH or --fd N, or start through socket activation")
    if options.keep_listening and not found.listening:
        found.close()
        raise UsageError(f"--keep-listening needs a listening socket, and {found.described} is connected already")
    return found


def listen_at(path: Path, key: str, *, group: str | None = None, mode: int | None = None) -> VhostSocket:
    """A socket at a path that the configuration names at a key; for the user of this process alone by default.

    :raises UsageError: there can be none.
    """
    return _bind(path, group, mode, f"{key} = ")


def adopt_listening(number: int, described: str) -> VhostSocket:
    """A listening socket that was passed to us.

    :raises UsageError: it is something else.
    """
    found = _adopt(number, described)
    if not found.listening:
        found.close()
        raise UsageError(f"{described}: connected already; a listening socket is needed")
    return found


def _choose(passed: list[tuple[str, int]]) -> int:
    if len(passed) == 1:
        return passed[0][1]
    named = [number for name, number in passed if name == FD_NAME]
    if len(named) != 1:
        names = ", ".join(name for name, _ in passed)
        raise UsageError(
            f"LISTEN_FDS passes {len(passed)} descriptors ({names}): exactly one must be named {FD_NAME} "
            "(FileDescriptorName=)"
        )
    return named[0]


def _adopt(number: int, described: str) -> VhostSocket:
    wanted = "a UNIX stream socket, listening or connected, is needed"
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError as error:
        raise UsageError(f"{described}: {os.strerror(error.errno or 0)}; {wanted}") from error
    if not is_socket:
        raise UsageError(f"{described}: not a socket; {wanted}")
    sock = socket.socket(fileno=number)
    sock.set_inheritable(False)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UsageError(f"{described}: a socket of another kind; {wanted}")
    listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    if not listening:
        try:
            sock.getpeername()
        except OSError as error:
            sock.detach()
            raise UsageError(f"{described}: neither listening nor connected; {wanted}") from error
    return VhostSocket(sock, listening, described)


def _bind(path: Path, group: str | None, mode: int | None, named: str = "--socket-path ") -> VhostSocket:
    gid = -1 if group is None else _group_id(group, f"{named}{path}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    bound = None
    try:
        # Nobody else may connect between bind and the change of group and mode.
        before = os.umask(0o077)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        status = os.lstat(path)
        bound = (path, status.st_dev, status.st_ino)
        if gid >= 0:
            os.chown(path, -1, gid)
        if mode is not None:
            os.chmod(path, mode)
        sock.listen(_BACKLOG)
    except OSError as error:
        VhostSocket(sock, True, str(path), bound).close()
        raise UsageError(f"{named}{path}: {_bind_problem(path, error)}") from error
    return VhostSocket(sock, True, str(path), bound)


def _group_id(group: str, what: str) -> int:
    try:
        return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise UsageError(f"{what}: there is no group {group}") from error


def _bind_problem(path: Path, error: OSError) -> str:
    """What is wrong, in words that say what to do."""
    if error.strerror is None:  # raised by Python itself: the name is longer than sun_path
        return f"{error}; a socket's path has at most 107 bytes"
    if error.errno != errno.EADDRINUSE:
        return error.strerror
    try:
        there = os.lstat(path)
    except OSError:
        return error.strerror
    if not stat.S_ISSOCK(there.st_mode):
        return "something other than a socket is there already"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return "a socket is there that nobody listens on any more; remove it if it was viommud's"
        except OSError:
            pass
    return "another process listens there"
