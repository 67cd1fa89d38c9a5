"""A control socket with clients that misbehave; H12 of the hostile-input list."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from structlog.testing import LogCapture

from viommud.config import parse
from viommud.control.errors import MONITOR, SERVICE, STEER
from viommud.control.server import EVERYTHING, MONITOR_ONLY, ControlServer
from viommud.control.subject import Subject
from viommud.control.wire import MESSAGE_MAX
from viommud.daemon import make_engine
from viommud.device_setup import plan


@pytest.fixture
def subject() -> Iterator[Subject]:
    """A daemon's state with an engine that waits for a front-end."""
    setup = plan(parse(""))
    with make_engine(setup) as engine:
        yield Subject(setup, "here", engine=engine)


class Harness:
    """A server on a socket of the test."""

    def __init__(self, path: Path, server: ControlServer, capture: LogCapture) -> None:
        self.path = path
        self.server = server
        self.capture = capture

    async def connect(self) -> trio.SocketStream:
        """A client."""
        return await trio.open_unix_socket(self.path)

    def events(self, name: str) -> list[Any]:
        """Lines of an event."""
        return [entry for entry in self.capture.entries if entry["event"] == name]


@asynccontextmanager
async def serving(
    path: Path, subject: Subject, interfaces: tuple[str, ...] = EVERYTHING, **options: Any
) -> AsyncIterator[Harness]:
    """A server that runs while the block does."""
    capture = LogCapture()
    structlog.configure(processors=[structlog.processors.add_log_level, capture])
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with listener:
            await listener.bind(str(path))
            listener.listen(200)
            async with trio.open_nursery() as nursery:
                server = ControlServer(subject, interfaces, structlog.get_logger(), **options)
                nursery.start_soon(server.run, listener)
                yield Harness(path, server, capture)
                nursery.cancel_scope.cancel()
    finally:
        structlog.reset_defaults()


async def receive(stream: trio.SocketStream, buffer: bytearray | None = None) -> Any:
    """One reply."""
    data = bytearray() if buffer is None else buffer
    while b"\0" not in data:
        more = await stream.receive_some()
        assert more, "the connection was closed"
        data += more
    message, _, rest = bytes(data).partition(b"\0")
    data[:] = rest
    return json.loads(message)


async def ask(stream: trio.SocketStream, method: str, **call: Any) -> Any:
    """One call and its reply."""
    await stream.send_all(json.dumps({"method": method, **call}).encode() + b"\0")
    return await receive(stream)


async def ended(stream: trio.SocketStream) -> bool:
    """Does the server close the connection?"""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    return True


async def test_calls_in_a_row(tmp_path: Path, subject: Subject) -> None:
    """Sent at once, answered in order; a oneway call is not answered, and errors end nothing."""
    async with serving(tmp_path / "s", subject) as harness, await harness.connect() as client:
        calls = [
            {"method": f"{MONITOR}.GetStatus"},
            {"method": f"{STEER}.SetLogLevel", "parameters": {"level": "debug"}, "oneway": True},
            {"method": f"{MONITOR}.Nothing"},
            {"method": f"{MONITOR}.GetStatus", "upgrade": True},
            {"method": f"{MONITOR}.GetStatus"},
        ]
        await client.send_all(b"".join(json.dumps(call).encode() + b"\0" for call in calls))
        buffer = bytearray()
        replies = [await receive(client, buffer) for _ in range(4)]
        assert replies[0]["parameters"]["log_level"] == "info"
        assert replies[1]["error"] == f"{SERVICE}.MethodNotFound"
        assert replies[2]["error"] == f"{SERVICE}.MethodNotImplemented"
        assert replies[3]["parameters"]["log_level"] == "debug"
        await ask(client, f"{STEER}.SetLogLevel", parameters={"level": "info"})
        (line, _) = harness.events("steered")
        assert line["method"] == f"{STEER}.SetLogLevel"
        assert {"pid", "uid", "gid"} <= set(line)


@pytest.mark.parametrize(
    "data",
    [b"x" * (MESSAGE_MAX + 2), b"\xff\xfe\0", b"[" * 50000 + b"\0", b"GET / HTTP/1.0\r\n\r\n\0"],
    ids=["oversize", "utf-8", "deep", "http"],
)
async def test_what_is_not_varlink_ends_the_connection(tmp_path: Path, subject: Subject, data: bytes) -> None:
    """That one, with a line and a count; others go on."""
    async with serving(tmp_path / "s", subject) as harness, await harness.connect() as other:
        async with await harness.connect() as client:
            with contextlib.suppress(trio.BrokenResourceError):  # closed while it was still sending
                await client.send_all(data)
            assert await ended(client)
        assert "parameters" in await ask(other, f"{MONITOR}.GetStatus")
        assert subject.counts.control_broken == 1
        assert len(harness.events("control-protocol-error")) == 1


async def test_a_flood_of_mistakes_is_logged_a_few_times(tmp_path: Path, subject: Subject) -> None:
    """And counted every time."""
    async with serving(tmp_path / "s", subject) as harness:
        for _ in range(100):
            async with await harness.connect() as client:
                await client.send_all(b"x\0")
                assert await ended(client)
        assert subject.counts.control_broken == 100
        assert len(harness.events("control-protocol-error")) < 10


async def test_a_call_must_end_in_time(tmp_path: Path, subject: Subject) -> None:
    """Once it has begun; a client that says nothing may wait as long as it likes."""
    async with serving(tmp_path / "s", subject, message_seconds=0.1) as harness, await harness.connect() as idle:
        async with await harness.connect() as client:
            await client.send_all(b'{"method')
            assert await ended(client)
        assert "parameters" in await ask(idle, f"{MONITOR}.GetStatus")


async def test_connections_are_bounded(tmp_path: Path, subject: Subject) -> None:
    """One thousand: those over the limit are closed at once, those within are served, and later ones again."""
    async with serving(tmp_path / "s", subject) as harness:
        first = [await harness.connect() for _ in range(harness.server.connections_max)]
        for client in first:
            assert "parameters" in await ask(client, f"{MONITOR}.GetStatus")
        for _ in range(1000 - len(first)):
            async with await harness.connect() as client:
                assert await ended(client)
        assert subject.counts.control_refused == 1000 - len(first)
        assert len(harness.events("control-connection-refused")) < 10
        for client in first:
            await client.aclose()
        while True:
            async with await harness.connect() as client:
                try:
                    assert "parameters" in await ask(client, f"{MONITOR}.GetStatus")
                    break
                except (AssertionError, trio.BrokenResourceError):
                    continue


async def test_a_stream_tells_what_happens_and_ends_with_its_client(tmp_path: Path, subject: Subject) -> None:
    """Watch: an empty reply when it stands, then events of the kinds asked for."""
    async with serving(tmp_path / "s", subject, MONITOR_ONLY) as harness:
        async with await harness.connect() as client:
            call = {"method": f"{MONITOR}.Watch", "more": True, "parameters": {"kinds": ["lost"]}}
            await client.send_all(json.dumps(call).encode() + b"\0")
            buffer = bytearray()
            assert await receive(client, buffer) == {"parameters": {"events": [], "dropped": 0}, "continues": True}
            subject.events.note("session", reason="began")
            subject.events.note("lost", count=3)
            reply = await receive(client, buffer)
            assert reply["continues"]
            (event,) = reply["parameters"]["events"]
            assert (event["kind"], event["count"]) == ("lost", 3)
            assert len(subject.events._streams) == 1
        while subject.events._streams:  # noqa: ASYNC110 - the server has no event for it
            await trio.sleep(0.001)


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path, subject: Subject) -> None:
    """A stream whose reader sleeps: bounded memory, then the connection goes, with a count."""
    async with serving(tmp_path / "s", subject, send_seconds=0.2) as harness, await harness.connect() as client:
        await client.send_all(json.dumps({"method": f"{MONITOR}.Watch", "more": True}).encode() + b"\0")
        with trio.fail_after(30):
            while not subject.counts.control_slow:
                for count in range(500):
                    subject.events.note("lost", count=count, reason="x" * 100)
                await trio.sleep(0.001)
        assert not subject.events._streams
        assert len(harness.events("control-client-too-slow")) == 1


async def test_a_mistake_of_ours_ends_one_connection(tmp_path: Path, subject: Subject) -> None:
    """The IOMMU of a running guest is not worth a control call."""
    async with serving(tmp_path / "s", subject) as harness:
        subject.setup = None  # type: ignore[assignment]
        engine = subject.require_engine()
        subject.engine = None
        async with await harness.connect() as client:
            await client.send_all(b'{"method":"org.viommud.Steer.Record","more":true}\0')
            assert "NotNow" in (await receive(client))["error"]
            subject.engine = engine
            await client.send_all(b'{"method":"org.viommud.Steer.Record","more":true}\0')
            assert await ended(client)
        assert len(harness.events("control-failed")) == 1
        async with await harness.connect() as client:
            assert "parameters" in await ask(client, f"{MONITOR}.GetCounters")
        assert not subject.recording
