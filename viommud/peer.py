"""Accepting connections on UNIX sockets, and who is at the other end."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

import trio

ACCEPT_PAUSE = 0.2
"""Seconds to wait when a connection cannot be accepted for lack of something."""
_CREDENTIALS = struct.Struct("3i")


async def accept(listener: trio.socket.SocketType, on_trouble: Callable[[str], None]) -> trio.socket.SocketType:
    """The next connection, however long it takes for one to be had.

    :param on_trouble: told what is lacking, each time.
    """
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as error:
            if error.errno == errno.ECONNABORTED:
                continue
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            on_trouble(error.strerror or "")
            await trio.sleep(ACCEPT_PAUSE)
        else:
            return connection


def peer_credentials(sock: trio.socket.SocketType) -> dict[str, int]:
    """Who is at the other end (SO_PEERCRED), as far as the kernel knows."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return {"pid": pid, "uid": uid, "gid": gid}
