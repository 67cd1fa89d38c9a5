"""The exchange of VERSION over real sockets: nothing read beyond it, and a client is always answered."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from viommud.vfio_user.agreement import Limits
from viommud.vfio_user.handshake import shake_hands
from viommud.vfio_user.messages import HEADER, VfioUserError

CLIENT = b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"write_multiple":true}}\0'
SERVER = b'{"capabilities":{"max_msg_fds":8,"max_dma_maps":77,"write_multiple":true}}\0'
VERSION_00 = struct.pack("=HH", 0, 0)

Answer = Callable[[socket.socket], None]


def message(payload: bytes, *, message_id: int = 0x1234, command: int = 1, flags: int = 0, error: int = 0) -> bytes:
    """A whole message."""
    return HEADER.pack(message_id, command, HEADER.size + len(payload), flags, error) + payload


def receive(sock: socket.socket) -> tuple[tuple[int, int, int, int, int], bytes]:
    """A message's header and payload; the test's end blocks, in a thread."""
    header = HEADER.unpack(read(sock, HEADER.size))
    return header, read(sock, header[2] - HEADER.size)


def read(sock: socket.socket, size: int) -> bytes:
    """Exactly size bytes."""
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, "closed too early"
        data += part
    return data


@asynccontextmanager
async def a_server(path: Path, answer: Answer | None) -> AsyncIterator[None]:
    """Something that listens, takes one connection and answers as told; None: takes none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(60)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(60)
                assert answer is not None
                answer(connection)

        async with trio.open_nursery() as nursery:
            if answer is not None:
                nursery.start_soon(trio.to_thread.run_sync, serve)
            yield


@asynccontextmanager
async def a_client(
    first: bytes, fds: tuple[int, ...] = ()
) -> AsyncIterator[tuple[socket.socket, trio.socket.SocketType]]:
    """Both ends of a client's connection, on which it has said something."""
    ours, theirs = socket.socketpair()
    with ours, trio.socket.from_stdlib_socket(theirs) as theirs_async:
        ours.settimeout(60)
        socket.send_fds(ours, [first], list(fds))
        yield ours, theirs_async


def good_server(connection: socket.socket) -> None:
    """Answers as libvfio-user does."""
    header, payload = receive(connection)
    assert header == (0, 1, HEADER.size + len(payload), 0, 0)
    assert payload[:4] == VERSION_00
    assert json.loads(payload[4:-1])["capabilities"]["max_msg_fds"] == 16
    connection.sendall(message(VERSION_00 + SERVER, message_id=0, flags=1))
    connection.recv(1)  # until the other end is closed


async def test_both_hear_of_each_other(tmp_path: Path) -> None:
    """The client is answered under its own ID with what was agreed on, and what it says next is left unread."""
    first = message(VERSION_00 + CLIENT) + b"next"
    async with a_server(tmp_path / "s", good_server), a_client(first) as (ours, theirs):
        server, limits = await shake_hands(theirs, str(tmp_path / "s"), 4096)
        with server:
            assert limits == Limits(max_fds=8, max_dma_maps=77, max_transfer=1 << 20)
            header, payload = await trio.to_thread.run_sync(receive, ours)
            assert header == (0x1234, 1, HEADER.size + len(payload), 1, 0)
            assert json.loads(payload[4:-1])["capabilities"] == {
                "max_msg_fds": 8,
                "max_data_xfer_size": 1 << 20,
                "max_dma_maps": 1024,
                "pgsizes": 4096,
                "write_multiple": True,
            }
            assert await theirs.recv(100) == b"next"


async def test_a_server_that_starts_later(tmp_path: Path) -> None:
    """A server that does not listen yet is waited for."""
    async with a_client(message(VERSION_00 + CLIENT)) as (_, theirs), trio.open_nursery() as nursery:

        async def start_later() -> None:
            await trio.sleep(0.2)
            async with a_server(tmp_path / "s", good_server):
                await done.wait()

        done = trio.Event()
        nursery.start_soon(start_later)
        server, _ = await shake_hands(theirs, str(tmp_path / "s"), 4096)
        server.close()
        done.set()


async def refused(ours: socket.socket, attempt: Awaitable[object]) -> tuple[str, int]:
    """What the log says and what errno the client gets."""
    with pytest.raises(VfioUserError) as caught:
        await attempt
    header, payload = await trio.to_thread.run_sync(receive, ours)
    assert payload == b""
    assert header[:4] == (0x1234, 1, HEADER.size, 0x21)
    return str(caught.value), header[4]


async def test_no_server(tmp_path: Path) -> None:
    """Nobody listens: the client is told before it gives up by itself."""
    async with a_client(message(VERSION_00 + CLIENT)) as (ours, theirs):
        said, number = await refused(ours, shake_hands(theirs, str(tmp_path / "s"), 4096, seconds=0.7))
        assert "does not listen" in said
        assert number == errno.ETIMEDOUT


async def test_a_server_that_cannot_be_reached(tmp_path: Path) -> None:
    """A path below something that is no directory: the reason is passed on at once."""
    (tmp_path / "file").touch()
    async with a_client(message(VERSION_00 + CLIENT)) as (ours, theirs):
        said, number = await refused(ours, shake_hands(theirs, str(tmp_path / "file" / "s"), 4096))
        assert "Not a directory" in said
        assert number == errno.ENOTDIR


async def test_a_silent_server(tmp_path: Path) -> None:
    """It takes the connection and says nothing."""
    async with a_server(tmp_path / "s", None), a_client(message(VERSION_00 + CLIENT)) as (ours, theirs):
        said, number = await refused(ours, shake_hands(theirs, str(tmp_path / "s"), 4096, seconds=0.7))
        assert "does not answer VERSION" in said
        assert number == errno.ETIMEDOUT


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        message(VERSION_00 + SERVER, flags=1)[:30],
        message(VERSION_00 + SERVER),
        message(struct.pack("=HH", 0, 1) + SERVER, flags=1),
        message(struct.pack("=HH", 7, 0) + SERVER, flags=1),
        message(VERSION_00 + b"nonsense\0", flags=1),
        message(VERSION_00 + b'{"capabilities":{"max_dma_maps":0}}\0', flags=1),
        message(b"", flags=0x21, error=errno.EBUSY),
        message(VERSION_00 + SERVER, flags=1, command=4),
        HEADER.pack(0, 1, 0xFFFFFFFF, 1, 0) + bytes(100),
    ],
)
async def test_servers_that_answer_wrongly(tmp_path: Path, reply: bytes) -> None:
    """Half an answer, another version, no JSON, an error, another message: the client hears of it, once."""

    def wrong_server(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(reply)

    async with a_server(tmp_path / "s", wrong_server), a_client(message(VERSION_00 + CLIENT)) as (ours, theirs):
        _, number = await refused(ours, shake_hands(theirs, str(tmp_path / "s"), 4096))
        assert number == errno.EPROTO


async def test_a_server_that_sends_descriptors(tmp_path: Path) -> None:
    """They are closed (the tests' own check sees to that), and it is refused."""

    def giving_server(connection: socket.socket) -> None:
        receive(connection)
        with open(os.devnull) as null:
            socket.send_fds(connection, [message(VERSION_00 + SERVER, flags=1)], [null.fileno()] * 20)

    async with a_server(tmp_path / "s", giving_server), a_client(message(VERSION_00 + CLIENT)) as (ours, theirs):
        said, _ = await refused(ours, shake_hands(theirs, str(tmp_path / "s"), 4096))
        assert "descriptors" in said


@pytest.mark.parametrize(
    "first",
    [
        message(struct.pack("=HH", 1, 0) + CLIENT),
        message(VERSION_00 + b"{"),
        message(VERSION_00 + b'{"capabilities":{"max_data_xfer_size":1}}\0'),
    ],
)
async def test_clients_that_cannot_be_served(tmp_path: Path, first: bytes) -> None:
    """A client's VERSION that cannot be agreed on is answered with an error; no server is bothered."""
    async with a_client(first) as (ours, theirs):
        _, number = await refused(ours, shake_hands(theirs, str(tmp_path / "none"), 4096))
        assert number == errno.EPROTO


@pytest.mark.parametrize("first", [message(VERSION_00 + CLIENT, command=2), HEADER.pack(1, 1, 3, 0, 0), b"\xff" * 16])
async def test_clients_that_do_not_begin_with_version(tmp_path: Path, first: bytes) -> None:
    """Whatever does not begin with VERSION is not answered."""
    async with a_client(first) as (_, theirs):
        with pytest.raises(VfioUserError):
            await shake_hands(theirs, str(tmp_path / "none"), 4096)


async def test_a_client_that_says_nothing(tmp_path: Path) -> None:
    """It keeps nobody waiting for ever."""
    async with a_client(b"half") as (_, theirs):
        with pytest.raises(VfioUserError, match="did not send VERSION"):
            await shake_hands(theirs, str(tmp_path / "none"), 4096, seconds=0.1)
