"""The varlink protocol without a socket: bytes in, calls out; replies in, bytes out (https://varlink.org).

A message is a JSON object and a zero byte.  Whatever a client sends, the one exception that comes of it is WireError,
and what waits for the end of a message is never more than MESSAGE_MAX bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec

MESSAGE_MAX = 64 << 10
"""Bytes of one call, without the zero byte."""


class WireError(Exception):
    """The client does not speak varlink; the connection cannot go on."""


class Call(msgspec.Struct, frozen=True):
    """What a client asks.  Unknown members of the object are ignored, as the protocol has it."""

    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    more: bool = False
    oneway: bool = False
    upgrade: bool = False


_decode_call = msgspec.json.Decoder(Call).decode
_encode = msgspec.json.Encoder().encode


class Framer:
    """Cuts a stream of bytes into calls."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0
        """Bytes of the buffer in which there is no zero."""

    @property
    def incomplete(self) -> bool:
        """Has a message begun that has not ended?  Only after next_call() gave None."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """What was read."""
        self._buffer += data

    def next_call(self) -> Call | None:
        """The next call that is whole; None: there is none yet.

        :raises WireError: there never will be.
        """
        end = self._buffer.find(0, self._searched)
        if end < 0:
            self._searched = len(self._buffer)
        if max(end, self._searched) > MESSAGE_MAX:
            raise WireError(f"a message is longer than {MESSAGE_MAX} bytes")
        if end < 0:
            return None
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            return _decode_call(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(f"not a call: {error}") from error


def reply(parameters: Any, *, continues: bool = False) -> bytes:
    """A reply as bytes."""
    return _encode({"parameters": parameters, "continues": True} if continues else {"parameters": parameters}) + b"\0"


def failure(error: str, parameters: Any) -> bytes:
    """An error as bytes."""
    return _encode({"error": error, "parameters": parameters}) + b"\0"
