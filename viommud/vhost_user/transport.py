"""A vhost-user connection over a UNIX stream socket, with trio.

Two rules shape it.  A read never takes more bytes than the message at hand has left: the kernel hands out descriptors
with the bytes they were sent with, and a longer read would mix those of the next message into this one.  And every
descriptor that arrives has an owner from the first moment, with close-on-exec set by the kernel.
"""

from __future__ import annotations

import array
import errno
import socket
from types import TracebackType
from typing import Self

import trio

from viommud.errors import ViommudError
from viommud.vhost_user.codec import NEED_DATA, Closed, Connection, Outgoing, Reply, Request, Role
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.fds import OwnedFd
from viommud.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, BackendRequest
from viommud.vhost_user.payloads import U64, Payload

SCM_MAX_FD = 253
"""Most descriptors the kernel lets one message carry (SCM_MAX_FD of linux/include/net/scm.h)."""
ANCILLARY_SPACE = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize)
MESSAGE_TIMEOUT = 10.0
"""Seconds from the first byte of a message to its last, and for a peer to take what is sent to it."""

_PEER_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


class PeerGoneError(ViommudError):
    """The connection broke without a message being cut in two."""


class Transport:
    """One socket and its Connection.  One task reads, one task writes."""

    def __init__(
        self, sock: trio.socket.SocketType, connection: Connection, *, message_timeout: float = MESSAGE_TIMEOUT
    ) -> None:
        self._sock = sock
        self.connection = connection
        self._timeout = message_timeout

    @classmethod
    def responder(cls, sock: trio.socket.SocketType, *, message_timeout: float = MESSAGE_TIMEOUT) -> Self:
        """The back-end's main connection."""
        return cls(sock, Connection(FRONTEND_REQUESTS, Role.RESPONDER), message_timeout=message_timeout)

    async def receive(self) -> Request | Reply | None:
        """The next message, or None when the peer has closed the connection between two.

        Waits for ever for a message to begin, and message_timeout for it to end.

        :raises RemoteProtocolError: the peer broke the protocol or stopped in the middle of a message.
        """
        while True:
            event = self.connection.next_event()
            if isinstance(event, Closed):
                return None
            if event is not NEED_DATA:
                return event
            if self.connection.between_messages:
                await self._read_some()
                continue
            with trio.move_on_after(self._timeout) as scope:
                while not self.connection.between_messages:
                    await self._read_some()
            if scope.cancelled_caught:
                raise RemoteProtocolError(f"a message was begun and not finished within {self._timeout:g} s")

    async def send(self, outgoing: Outgoing) -> None:
        """Send a message; its descriptors go with the first byte and stay the caller's.

        :raises RemoteProtocolError: the peer does not read what it asked for.
        :raises PeerGoneError: the connection is broken.
        """
        rest = memoryview(outgoing.data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", outgoing.fds))] if outgoing.fds else []
        with trio.move_on_after(self._timeout) as scope:
            try:
                while rest:
                    sent = await self._sock.sendmsg([rest], ancillary)
                    rest, ancillary = rest[sent:], []
            except OSError as error:
                if error.errno not in _PEER_GONE:
                    raise
                raise PeerGoneError(f"the peer is gone: {error.strerror}") from error
        if scope.cancelled_caught:
            raise RemoteProtocolError(f"the peer took no answer for {self._timeout:g} s")

    def close(self) -> None:
        """Close the socket and every descriptor that was received and not handed out."""
        self.connection.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _read_some(self) -> None:
        try:
            data, ancillary, flags, _ = await self._sock.recvmsg(
                self.connection.bytes_wanted, ANCILLARY_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            if error.errno not in _PEER_GONE:
                raise
            data, ancillary, flags = b"", [], 0
        fds = _received_fds(ancillary)
        if data:
            self.connection.receive_data(data, fds, truncated=bool(flags & socket.MSG_CTRUNC))
        else:
            self.connection.receive_eof()


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[OwnedFd]:
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # A truncated control message may end within a number; the kernel installed the whole ones only.
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return [OwnedFd(number) for number in numbers]


class BackendChannel:
    """The back-end's way to ask the front-end for something (SET_BACKEND_REQ_FD).

    QEMU's generic vhost-user device crashes on CONFIG_CHANGE_MSG while the guest's driver does not run: whoever uses
    this must know that rings run, and should do it only where it was asked for.
    """

    def __init__(
        self, sock: trio.socket.SocketType, *, reply_ack: bool, message_timeout: float = MESSAGE_TIMEOUT
    ) -> None:
        self._transport = Transport(sock, Connection(BACKEND_REQUESTS, Role.REQUESTER), message_timeout=message_timeout)
        self._reply_ack = reply_ack
        self._timeout = message_timeout
        self._one_at_a_time = trio.Lock()

    @classmethod
    def adopt(cls, fd: OwnedFd, *, reply_ack: bool, message_timeout: float = MESSAGE_TIMEOUT) -> Self:
        """Take over the socket that a session received."""
        sock = trio.socket.from_stdlib_socket(socket.socket(fileno=fd.take()))
        return cls(sock, reply_ack=reply_ack, message_timeout=message_timeout)

    async def request(self, code: BackendRequest, payload: Payload | None = None, fds: tuple[int, ...] = ()) -> bool:
        """Send a request and wait for its acknowledgement, if REPLY_ACK is negotiated.

        :returns: False when the front-end answered that it failed.
        :raises RemoteProtocolError: the front-end broke the protocol or answers nothing.
        :raises PeerGoneError: the channel is broken.
        """
        async with self._one_at_a_time:
            await self._transport.send(
                self._transport.connection.send_request(
                    BACKEND_REQUESTS[code], payload, fds, need_reply=self._reply_ack
                )
            )
            if not self._reply_ack:
                return True
            with trio.move_on_after(self._timeout):
                reply = await self._transport.receive()
                if reply is None:
                    raise PeerGoneError("the front-end closed the back-end channel")
                with reply:
                    return reply.payload == U64(0)
            raise RemoteProtocolError(f"no acknowledgement of {code.name} within {self._timeout:g} s")

    async def config_changed(self) -> bool:
        """Tell the front-end to read configuration space again."""
        return await self.request(BackendRequest.CONFIG_CHANGE_MSG)

    def close(self) -> None:
        """Close the channel."""
        self._transport.close()
