"""varlink without a socket: what is a call, what is not, and that nothing else comes of a client's bytes."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommud.control.wire import MESSAGE_MAX, Call, Framer, WireError, failure, reply


def calls(data: bytes, sizes: int | None = None) -> list[Call]:
    """The calls in some bytes, fed whole or in pieces of a size."""
    framer = Framer()
    found = []
    for at in range(0, len(data), sizes or len(data) or 1):
        framer.feed(data[at : at + (sizes or len(data))])
        while (call := framer.next_call()) is not None:
            found.append(call)
    return found


ONE = b'{"method":"a.b.C","parameters":{"x":[1,2]},"more":true}\0'


@pytest.mark.parametrize("sizes", [None, 1, 7])
def test_calls_come_whole_and_in_pieces(sizes: int | None) -> None:
    """However the bytes are cut, the same calls come out of them."""
    first, second = calls(ONE + b'{"method":"d.E","oneway":true,"new":1}\0' + b'{"meth', sizes)
    assert (first.method, bytes(first.parameters), first.more) == ("a.b.C", b'{"x":[1,2]}', True)
    assert (second.method, bytes(second.parameters), second.oneway) == ("d.E", b"{}", True)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"hello",
        b"[]",
        b"{}",
        b'{"method":1}',
        b'{"method":"a.b","more":1}',
        b'{"method":"\xff\xfe"}',
        b'{"method":"a.b"} x',
        b'{"method":"a.b","parameters":' + b"[" * 30000 + b"]" * 30000 + b"}",
        b"[" * 60000,
    ],
    ids=["empty", "word", "list", "no method", "number", "more", "utf-8", "rest", "deep", "deeper"],
)
def test_what_is_no_call(message: bytes) -> None:
    """One exception, whatever it is; H12: deep nesting, invalid UTF-8."""
    with pytest.raises(WireError):
        calls(message + b"\0")


def test_a_message_has_a_greatest_length() -> None:
    """With its end in sight or not; H12: oversize, no terminator."""
    frame = b'{"method":"a.b","parameters":{"x":"%s"}}'
    longest = frame % (b"x" * (MESSAGE_MAX - len(frame) + 2))
    assert len(longest) == MESSAGE_MAX
    assert len(calls(longest + b"\0", 4096)) == 1
    with pytest.raises(WireError, match="longer than"):
        calls(longest + b" \0")
    framer = Framer()
    for _ in range(MESSAGE_MAX // 1024):
        framer.feed(b"x" * 1024)
        assert framer.next_call() is None
    framer.feed(b"x")
    with pytest.raises(WireError, match="longer than"):
        framer.next_call()


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes(data: bytes, sizes: int) -> None:
    """Nothing but calls and WireError."""
    with contextlib.suppress(WireError):
        calls(data, sizes)


def test_replies() -> None:
    """JSON and a zero byte; errors have a name."""
    assert reply({"a": 1}) == b'{"parameters":{"a":1}}\0'
    assert json.loads(reply({}, continues=True)[:-1]) == {"parameters": {}, "continues": True}
    assert json.loads(failure("a.b.C", {"x": 1})[:-1]) == {"error": "a.b.C", "parameters": {"x": 1}}
