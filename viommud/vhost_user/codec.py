"""The vhost-user wire, without a socket: bytes and descriptors in, messages out, and the way back.

A Connection is one direction of requests on one socket.  The responder end receives requests and sends replies;
the requester end sends requests and receives replies.  A back-end is the responder on its main socket and the
requester on the back-end channel; a front-end has the opposite ends.

Contract: bytes and descriptors from the peer cause no exception but RemoteProtocolError, and after one the
connection stays in that state.  LocalProtocolError is an error of this program.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NoReturn, Self

from viommud.vhost_user.errors import LocalProtocolError, RemoteProtocolError
from viommud.vhost_user.fds import OwnedFd, close_all
from viommud.vhost_user.messages import FdRule, RequestTable, RequestType
from viommud.vhost_user.payloads import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FLAG_VERSION_MASK,
    HEADER,
    MAX_PAYLOAD,
    U64,
    VERSION,
    Empty,
    InvalidPayload,
    Payload,
)


class NeedData(enum.Enum):
    """The type of NEED_DATA."""

    NEED_DATA = "need data"


NEED_DATA: Final = NeedData.NEED_DATA
"""No whole message yet: feed bytes_wanted bytes."""


@dataclass(frozen=True, slots=True)
class Message:
    """What both kinds of message have: the descriptors are owned by the message until they are taken from it."""

    kind: RequestType
    payload: Payload
    fds: tuple[OwnedFd, ...]

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Request(Message):
    """A request from the peer."""

    need_reply: bool
    """The sender asks for an acknowledgement; it only counts once REPLY_ACK is negotiated."""


@dataclass(frozen=True, slots=True)
class Reply(Message):
    """The peer's answer to the oldest request that awaits one."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer closed the connection between two messages."""


Event = Request | Reply | Closed | NeedData


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send: all descriptors go with the first byte.  They stay the caller's."""

    data: bytes
    fds: tuple[int, ...] = ()


class Role(enum.Enum):
    """Which end of the requests a Connection is."""

    RESPONDER = "responder"
    REQUESTER = "requester"


@dataclass(frozen=True, slots=True)
class _Header:
    """A checked header: what the payload must be."""

    kind: RequestType
    payload: type[Payload]
    rule: FdRule
    need_reply: bool
    size: int


class Connection:
    """The state of one socket.

    Drive it: read at most bytes_wanted bytes, receive_data(), next_event() until NEED_DATA.
    """

    def __init__(self, table: RequestTable, role: Role) -> None:
        self._table = table
        self._role = role
        self._buffer = bytearray()
        self._fds: tuple[OwnedFd, ...] = ()
        self._header: _Header | None = None
        self._ready: deque[Request | Reply | Closed] = deque()
        self._failed: RemoteProtocolError | None = None
        self._closed = False
        self._awaited: deque[tuple[RequestType, bool]] = deque()

    @property
    def bytes_wanted(self) -> int:
        """Bytes up to the end of the header or payload that is being received; 0 after the end or an error.

        Never read more: on a stream socket the descriptors of a following message would be mixed into this one's.
        """
        if self._closed or self._failed:
            return 0
        due = HEADER.size if self._header is None else self._header.size
        return due - len(self._buffer)

    @property
    def between_messages(self) -> bool:
        """True when no part of a message has been received."""
        return self._header is None and not self._buffer

    def receive_data(self, data: bytes, fds: Sequence[OwnedFd] = (), *, truncated: bool = False) -> None:
        """Take what one read gave.  The descriptors belong to the connection from here on.

        :param truncated: the kernel dropped descriptors for want of room (MSG_CTRUNC).
        :raises RemoteProtocolError: the peer broke the protocol; every descriptor held so far is closed.
        """
        received = tuple(fds)
        if self._failed or self._closed or len(data) > self.bytes_wanted or not data:
            close_all(received)
            raise LocalProtocolError(f"{len(data)} bytes fed where {self.bytes_wanted} were wanted")
        if truncated:
            self._reject("descriptors were lost on the way: too many for one message or for this process", received)
        if received and not self.between_messages:
            self._reject("descriptors came later than a message's first byte", received)
        if received:
            self._fds = received
        self._buffer += data
        if self.bytes_wanted == 0:
            self._advance()

    def receive_eof(self) -> None:
        """Take the end of the stream.

        :raises RemoteProtocolError: a message was cut in two.
        """
        if self._failed or self._closed:
            raise LocalProtocolError("end of stream fed to a connection that has ended")
        if not self.between_messages:
            where = "header" if self._header is None else f"{self._header.kind.name} payload"
            self._reject(f"the connection was closed in the middle of a {where}")
        self._closed = True
        self._ready.append(Closed())

    def next_event(self) -> Event:
        """The next whole message, Closed, or NEED_DATA.

        :raises RemoteProtocolError: as receive_data() did.
        """
        if self._ready:
            return self._ready.popleft()
        if self._failed:
            raise self._failed
        return NEED_DATA

    def send_request(
        self,
        kind: RequestType,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        own_reply: bool | None = None,
    ) -> Outgoing:
        """Encode a request (requester only).

        :param need_reply: ask for an acknowledgement; ignored for a request that has a reply of its own.
        :param own_reply: whether the request's own reply is due; needed only where that depends on a feature.
        """
        if self._role is not Role.REQUESTER:
            raise LocalProtocolError("a responder sends no requests")
        body = payload if payload is not None else Empty()
        self._check_outgoing(kind, kind.payload, body, kind.fds, len(fds))
        own = kind.reply is not None and kind.reply_needs is None if own_reply is None else own_reply
        if own or need_reply:
            self._awaited.append((kind, own))
        flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0)
        return self._encode(kind, flags, body, fds)

    def send_reply(self, request: Request, payload: Payload, fds: Sequence[int] = ()) -> Outgoing:
        """Encode a request's own reply, or its refusal (responder only)."""
        if request.kind.reply is None:
            raise LocalProtocolError(f"{request.kind.name} has no reply of its own")
        if payload != request.kind.refusal:
            self._check_outgoing(request.kind, request.kind.reply, payload, request.kind.reply_fds, len(fds))
        return self._respond(request, payload, fds)

    def send_ack(self, request: Request, value: Payload) -> Outgoing:
        """Encode an acknowledgement: zero for success (responder only)."""
        return self._respond(request, value, ())

    def close(self) -> None:
        """Close every descriptor that came in and was not handed out."""
        close_all(self._fds)
        self._fds = ()
        while self._ready:
            event = self._ready.popleft()
            if isinstance(event, Message):
                event.close()
        self._closed = True

    def _respond(self, request: Request, payload: Payload, fds: Sequence[int]) -> Outgoing:
        if self._role is not Role.RESPONDER:
            raise LocalProtocolError("a requester sends no replies")
        return self._encode(request.kind, VERSION | FLAG_REPLY, payload, fds)

    @staticmethod
    def _check_outgoing(kind: RequestType, due: type[Payload], payload: Payload, rule: FdRule, count: int) -> None:
        if not isinstance(payload, due):
            raise LocalProtocolError(f"{kind.name} carries {due.__name__}, not {type(payload).__name__}")
        least, greatest = rule.expected(payload)
        if not least <= count <= greatest:
            raise LocalProtocolError(f"{kind.name} with {count} descriptors where {rule.text} is due")

    @staticmethod
    def _encode(kind: RequestType, flags: int, payload: Payload, fds: Sequence[int]) -> Outgoing:
        try:
            body = payload.encode()
        except (struct.error, InvalidPayload) as error:
            raise LocalProtocolError(f"{kind.name}: {error}") from error
        return Outgoing(HEADER.pack(kind.code, flags, len(body)) + body, tuple(fds))

    def _advance(self) -> None:
        """A header or payload is complete."""
        if self._header is None:
            self._header = self._check_header(*HEADER.unpack(self._buffer))
            self._buffer.clear()
            if self._header.size:
                return
        self._complete(self._header)

    def _check_header(self, code: int, flags: int, size: int) -> _Header:
        if flags & FLAG_VERSION_MASK != VERSION:
            self._reject(f"version {flags & FLAG_VERSION_MASK} of the protocol, 1 is known")
        if size > MAX_PAYLOAD:
            self._reject(f"a payload of {size} bytes, at most {MAX_PAYLOAD} are possible")
        check = self._check_request if self._role is Role.RESPONDER else self._check_reply
        header = check(code, flags & ~FLAG_VERSION_MASK, size)
        least, greatest = header.payload.sizes()
        if not least <= size <= greatest:
            due = f"{least}" if least == greatest else f"{least} to {greatest}"
            self._reject(f"{header.kind.name} with a payload of {size} bytes, {due} are due")
        if len(self._fds) > header.rule.greatest:
            self._reject_fds(header)
        return header

    def _check_request(self, code: int, flags: int, size: int) -> _Header:
        kind = self._table.get(code)
        if kind is None:
            self._reject(f"unknown request {code}")
        if flags & ~FLAG_NEED_REPLY:
            self._reject(f"{kind.name} with flags {flags | VERSION:#x}, which are reserved or not for requests")
        return _Header(kind, kind.payload, kind.fds, bool(flags & FLAG_NEED_REPLY), size)

    def _check_reply(self, code: int, flags: int, size: int) -> _Header:
        if not self._awaited:
            self._reject(f"a reply with code {code}, and no request awaits one")
        kind, own = self._awaited[0]
        if code != kind.code:
            self._reject(f"a reply with code {code} where {kind.name} ({kind.code}) awaits one")
        if flags != FLAG_REPLY:
            self._reject(f"reply to {kind.name} with flags {flags | VERSION:#x}, 0x5 are due")
        self._awaited.popleft()
        payload = kind.reply if own and kind.reply is not None else U64
        if own and size == 0 and kind.refusal == Empty():
            payload = Empty
        return _Header(kind, payload, kind.reply_fds if own else FdRule.NONE, False, size)

    def _complete(self, header: _Header) -> None:
        try:
            payload = header.payload.decode(bytes(self._buffer))
        except InvalidPayload as error:
            self._reject(f"{header.kind.name}: {error}")
        least, greatest = header.rule.expected(payload)
        if not least <= len(self._fds) <= greatest:
            self._reject_fds(header)
        fds, self._fds = self._fds, ()
        self._buffer.clear()
        self._header = None
        if self._role is Role.RESPONDER:
            self._ready.append(Request(header.kind, payload, fds, header.need_reply))
        else:
            self._ready.append(Reply(header.kind, payload, fds))

    def _reject_fds(self, header: _Header) -> NoReturn:
        self._reject(f"{header.kind.name} with {len(self._fds)} descriptors where {header.rule.text} is due")

    def _reject(self, reason: str, fds: Sequence[OwnedFd] = ()) -> NoReturn:
        """The one place where what the peer sent is thrown away."""
        close_all(fds)
        close_all(self._fds)
        self._fds = ()
        self._buffer.clear()
        self._header = None
        self._failed = RemoteProtocolError(reason)
        raise self._failed
