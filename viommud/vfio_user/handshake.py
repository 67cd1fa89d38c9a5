"""The exchange of VERSION over two sockets, with trio; nothing is read beyond it.

The client is a monitor that waits with its whole virtual machine, so it is answered in any case: with what was agreed
on, or with an errno.
"""

from __future__ import annotations

import array
import errno
import os
import socket

import trio

from viommud.vfio_user.agreement import Limits, agree, offer
from viommud.vfio_user.messages import (
    ERROR,
    HEADER,
    Header,
    Version,
    VfioUserError,
    parse_header,
    parse_version,
    render_refusal,
    render_version,
)

HANDSHAKE_SECONDS = 4.0
"""QEMU gives up after 5 (x-msg-timeout)."""
CONNECT_PAUSE = 0.05
"""Seconds between two attempts to reach a server that does not listen yet."""
_NOT_YET = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN})
_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)


async def receive_version(sock: trio.socket.SocketType, who: str, *, reply: bool) -> tuple[Header, bytes]:
    """Read one VERSION message, to its last byte and no further.

    :raises VfioUserError: it is none, or brings descriptors.
    """
    header = parse_header(await _read(sock, HEADER.size, who), reply=reply)
    return header, await _read(sock, header.size - HEADER.size, who)


async def _read(sock: trio.socket.SocketType, size: int, who: str) -> bytes:
    data = b""
    while len(data) < size:
        try:
            part, ancillary, _, _ = await sock.recvmsg(size - len(data), _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise VfioUserError(f"the {who} cannot be heard: {error.strerror}") from error
        if _close_descriptors(ancillary):
            raise VfioUserError(f"the {who} sent descriptors with VERSION")
        if not part:
            raise VfioUserError(f"the {who} closed the connection before VERSION")
        data += part
    return data


def _close_descriptors(ancillary: list[tuple[int, int, bytes]]) -> bool:
    found = False
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            for number in numbers:
                found = True
                os.close(number)
    return found


async def _send(sock: trio.socket.SocketType, data: bytes, who: str) -> None:
    try:
        while data:
            data = data[await sock.send(data) :]
    except OSError as error:
        raise VfioUserError(f"the {who} cannot be spoken to: {error.strerror}") from error


async def connect_server(path: str) -> trio.socket.SocketType:
    """Connect to a server, which may be about to start.

    :raises OSError: it cannot be reached, for a reason that time will not change.
    """
    while True:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await sock.connect(path)
        except OSError as error:
            sock.close()
            if error.errno not in _NOT_YET:
                raise
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        await trio.sleep(CONNECT_PAUSE)


async def shake_hands(
    client: trio.socket.SocketType, server_path: str, granule: int, *, seconds: float = HANDSHAKE_SECONDS
) -> tuple[trio.socket.SocketType, Limits]:
    """From a client that has connected to a server that has agreed; returns the connection to the server.

    :param granule: bytes, the smallest mapping that the guest may make.
    :raises VfioUserError: it came to nothing; the client has been told as far as it can be.
    """
    with trio.move_on_after(seconds):
        request, payload = await receive_version(client, "client", reply=False)
        try:
            return await _agree(client, request, parse_version(payload), server_path, granule)
        except VfioUserError as error:
            await _send(client, render_refusal(request.id, _errno_of(error)), "client")
            raise
    raise VfioUserError(f"the client did not send VERSION within {seconds:g} s")


async def _agree(
    client: trio.socket.SocketType, request: Header, version: Version, server_path: str, granule: int
) -> tuple[trio.socket.SocketType, Limits]:
    offered = offer(version, granule)
    server: trio.socket.SocketType | None = None
    try:
        # A little less than what is left for the client, who is to hear why.
        with trio.move_on_at(trio.current_effective_deadline() - 0.5):
            server = await connect_server(server_path)
            await _send(server, render_version(0, offered, reply=False), "server")
            header, payload = await receive_version(server, "server", reply=True)
            if header.flags & ERROR:
                raise VfioUserError(f"the server refuses: {os.strerror(header.error)}")
            told, limits = agree(offered, parse_version(payload), granule)
            await _send(client, render_version(request.id, told, reply=True), "client")
            return server, limits
        raise TimeoutError(errno.ETIMEDOUT, "it does not listen" if server is None else "it does not answer VERSION")
    except BaseException as error:
        if server is not None:
            server.close()
        if isinstance(error, OSError):
            raise VfioUserError(f"the server at {server_path} cannot be used: {error.strerror}") from error
        raise


def _errno_of(error: VfioUserError) -> int:
    """What the client is told."""
    cause = error.__cause__
    return cause.errno if isinstance(cause, OSError) and cause.errno else errno.EPROTO
