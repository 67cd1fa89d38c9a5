"""The front-end's end of the socket."""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from frontend import wire

DEADLINE = 30.0
"""Seconds; far more than any answer takes."""


class ConnectionEndedError(Exception):
    """The back-end closed the connection."""


@dataclass
class Answer:
    """A message from the back-end.  The descriptors belong to whoever has the answer."""

    code: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def u64(self) -> int:
        """The payload as one number."""
        (value,) = struct.unpack("=Q", self.payload)
        return int(value)


class Client:
    """A socket that speaks vhost-user, correctly or not."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(DEADLINE)
        self.reply_ack = False

    @classmethod
    def connect(cls, path: str) -> Self:
        """Connect to a listening back-end, which may be about to create its socket."""
        deadline = time.monotonic() + DEADLINE
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            return cls(sock)

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """A client, and the socket to give to a back-end in this process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(ours), theirs

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Raw

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes, with any descriptors at the first of them."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        rest = memoryview(data)
        while rest:
            sent = self.sock.sendmsg([rest], ancillary)
            rest, ancillary = rest[sent:], []

    def send(
        self,
        code: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        flags: int | None = None,
    ) -> None:
        """Send one message."""
        if flags is None:
            flags = wire.VERSION | (wire.NEED_REPLY if need_reply else 0)
        self.send_raw(wire.message(code, payload, flags), fds)

    def receive(self) -> Answer:
        """Read one message.

        :raises ConnectionEndedError: there is none any more.
        """
        head, fds = self._read(12)
        code, flags, size = struct.unpack("=III", head)
        try:
            payload = self._read(size)[0] if size else b""
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return Answer(code, flags, payload, fds)

    def _read(self, size: int) -> tuple[bytes, list[int]]:
        data, numbers = b"", array.array("i")
        while len(data) < size:
            try:
                part, ancillary, _, _ = self.sock.recvmsg(
                    size - len(data), socket.CMSG_SPACE(16 * numbers.itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError as error:
                raise ConnectionEndedError("connection reset") from error
            for level, kind, body in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers.frombytes(body[: len(body) - len(body) % numbers.itemsize])
            if not part:
                for fd in numbers:
                    os.close(fd)
                raise ConnectionEndedError(f"end of stream after {len(data)} of {size} bytes")
            data += part
        return data, list(numbers)

    def ended(self) -> bool:
        """Wait for the back-end to close the connection: True when it did, False when it sent something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # Requests

    def ask(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a request that has its own reply, and read it."""
        self.send(code, payload, fds)
        answer = self.receive()
        assert (code, wire.VERSION | wire.REPLY) == (answer.code, answer.flags)
        return answer

    def acknowledged(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request with NEED_REPLY, and read what it was acknowledged with: 0 when it was granted."""
        assert self.reply_ack, "REPLY_ACK is not negotiated"
        self.send(code, payload, fds, need_reply=True)
        answer = self.receive()
        assert (code, wire.VERSION | wire.REPLY, 8) == (answer.code, answer.flags, len(answer.payload))
        return answer.u64

    def do(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that must be granted; whether it was is known as far as it can be."""
        if self.reply_ack:
            granted = self.acknowledged(code, payload, fds)
            assert granted == 0, f"request {code} was refused with {granted:#x}"
        else:
            self.send(code, payload, fds)
            # As QEMU does it: an answer to this shows that what was sent before has been handled.
            self.ask(wire.GET_FEATURES)

    # The usual sequences

    def negotiate(self, features: int | None = None, protocol_features: int | None = None) -> tuple[int, int]:
        """Start a session as QEMU does.  None: everything that is offered.

        :returns: features and protocol features as acknowledged.
        """
        offered = self.ask(wire.GET_FEATURES).u64
        acknowledged = offered if features is None else features
        protocol = 0
        if offered & wire.F_PROTOCOL_FEATURES:
            offered_protocol = self.ask(wire.GET_PROTOCOL_FEATURES).u64
            protocol = offered_protocol if protocol_features is None else protocol_features
            self.send(wire.SET_PROTOCOL_FEATURES, wire.u64(protocol))
            self.reply_ack = bool(protocol & wire.P_REPLY_ACK)
        self.do(wire.SET_OWNER)
        self.do(wire.SET_FEATURES, wire.u64(acknowledged))
        return acknowledged, protocol

    def get_config(self, size: int, offset: int = 0) -> bytes:
        """Read configuration space; b"" when the back-end refuses."""
        return self.ask(wire.GET_CONFIG, wire.config(offset, bytes(size))).payload[12:]

    def get_base(self, index: int) -> int:
        """Stop a ring; its base."""
        answer = self.ask(wire.GET_VRING_BASE, wire.vring_state(index))
        ring, base = struct.unpack("=II", answer.payload)
        assert ring == index
        return int(base)
