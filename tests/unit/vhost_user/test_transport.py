"""Real sockets: exact reads, descriptors, time limits, and a whole connection."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

import pytest
import structlog
import trio
import trio.testing
from frontend import wire
from frontend.client import Client, ConnectionEndedError
from frontend.guest import Guest, memfd
from frontend.memory import GuestMemory, Ram

from unit.vhost_user.fake_device import FakeDevice
from viommud.vhost_user.codec import Request
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.fds import OwnedFd
from viommud.vhost_user.serve import serve
from viommud.vhost_user.session import Session
from viommud.vhost_user.transport import BackendChannel, PeerGoneError, Transport

LOG = structlog.wrap_logger(
    structlog.testing.CapturingLogger(), processors=[], wrapper_class=structlog.make_filtering_bound_logger("critical")
)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Transport, Client]]:
    """A back-end's transport, and the client at the other end."""
    client, theirs = Client.pair()
    theirs.setblocking(False)
    with client, Transport.responder(trio.socket.from_stdlib_socket(theirs), message_timeout=0.2) as transport:
        yield transport, client


async def next_request(transport: Transport) -> Request:
    """The next message, which must be a request."""
    request = await transport.receive()
    assert isinstance(request, Request)
    return request


async def test_glued_messages_keep_their_descriptors(ends: tuple[Transport, Client]) -> None:
    """Three messages in one stream, the middle one with a descriptor: a read that crosses a message would give it to
    the first."""
    transport, client = ends
    event = os.eventfd(0)
    client.send(wire.SET_OWNER)
    client.send(wire.SET_VRING_CALL, wire.u64(1), [event])
    client.send(wire.SET_VRING_NUM, wire.vring_state(0, 8))
    os.close(event)
    for name, count in (("SET_OWNER", 0), ("SET_VRING_CALL", 1), ("SET_VRING_NUM", 0)):
        with await next_request(transport) as request:
            assert (name, count) == (request.kind.name, len(request.fds))
            for fd in request.fds:
                assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


async def test_one_byte_at_a_time(ends: tuple[Transport, Client]) -> None:
    """The descriptor comes with the first byte."""
    transport, client = ends
    event = os.eventfd(0)
    data = wire.message(wire.SET_VRING_KICK, wire.u64(0))
    client.send_raw(data[:1], [event])
    os.close(event)
    async with trio.open_nursery() as nursery:

        async def dribble() -> None:
            for byte in data[1:]:
                await trio.testing.wait_all_tasks_blocked()
                client.send_raw(bytes([byte]))

        nursery.start_soon(dribble)
        with await next_request(transport) as request:
            assert len(request.fds) == 1


@pytest.mark.parametrize("count", [2, 33, 253])
async def test_too_many_descriptors(ends: tuple[Transport, Client], count: int) -> None:
    """All that a message can carry arrive, and are closed.  Ancestor: DPDK CVE-2019-14818."""
    transport, client = ends
    event = os.eventfd(0)
    before = len(os.listdir("/proc/self/fd"))
    client.send(wire.SET_VRING_KICK, wire.u64(0), [event] * count)
    with pytest.raises(RemoteProtocolError, match=f"{count} descriptors"):
        await transport.receive()
    assert before == len(os.listdir("/proc/self/fd"))
    os.close(event)


async def test_descriptors_lost_for_want_of_numbers(ends: tuple[Transport, Client]) -> None:
    """A process at its limit gets some of them and MSG_CTRUNC: those are closed, and the reason is told."""
    transport, client = ends
    event = os.eventfd(0)
    client.send(wire.SET_MEM_TABLE, wire.memory_table(*[wire.region(0, 1, 0)] * 8), [event] * 8)
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        # Numbers are given out from below: take every one under the highest, so that three are left under the limit.
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        while (fd := os.dup(event)) <= highest:
            stack.callback(os.close, fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 3, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with pytest.raises(RemoteProtocolError, match="lost on the way"):
            await transport.receive()
    assert before == len(os.listdir("/proc/self/fd"))
    os.close(event)


async def test_end_between_messages(ends: tuple[Transport, Client]) -> None:
    """None, and nothing else."""
    transport, client = ends
    client.send(wire.SET_OWNER)
    client.close()
    assert (await next_request(transport)).kind.name == "SET_OWNER"
    assert await transport.receive() is None


@pytest.mark.parametrize("cut", [1, 11, 12, 19])
async def test_end_in_the_middle(ends: tuple[Transport, Client], cut: int) -> None:
    """Says where."""
    transport, client = ends
    client.send_raw(wire.message(wire.SET_FEATURES, wire.u64(1))[:cut])
    client.close()
    with pytest.raises(RemoteProtocolError, match="in the middle of a"):
        await transport.receive()


async def test_a_message_that_never_ends(autojump_clock: trio.testing.MockClock) -> None:
    """One byte and then silence; but silence between messages is not limited."""
    client, theirs = Client.pair()
    theirs.setblocking(False)
    with client, Transport.responder(trio.socket.from_stdlib_socket(theirs), message_timeout=10) as transport:
        with trio.move_on_after(40) as scope:
            await transport.receive()
        assert scope.cancelled_caught
        client.send_raw(b"\x01")
        with pytest.raises(RemoteProtocolError, match="not finished within 10 s"):
            await transport.receive()


async def test_a_peer_that_reads_nothing(ends: tuple[Transport, Client]) -> None:
    """Answers fill the socket's buffer; then the connection is given up."""
    transport, client = ends
    client.send(wire.GET_FEATURES)
    request = await next_request(transport)
    out = transport.connection.send_ack(request, request.kind.payload.decode(b""))

    async def answer_for_ever() -> None:
        while True:
            await transport.send(out)

    with pytest.raises(RemoteProtocolError, match="took no answer"):
        await answer_for_ever()


async def test_a_peer_that_is_gone(ends: tuple[Transport, Client]) -> None:
    """Not a protocol error: it may leave while an answer is on its way."""
    transport, client = ends
    client.send(wire.GET_FEATURES)
    request = await next_request(transport)
    client.close()
    with pytest.raises(PeerGoneError):
        await transport.send(transport.connection.send_ack(request, request.kind.payload.decode(b"")))


# The back-end channel


async def channel_pair(reply_ack: bool) -> tuple[BackendChannel, Client]:
    """A back-end channel and the front-end's end of it."""
    client, theirs = Client.pair()
    return BackendChannel.adopt(OwnedFd(theirs.detach()), reply_ack=reply_ack, message_timeout=0.2), client


@pytest.mark.parametrize("value", [0, 1])
async def test_config_change_is_acknowledged(value: int) -> None:
    """Request 2 with NEED_REPLY; the answer says whether the front-end could do it."""
    channel, client = await channel_pair(reply_ack=True)
    client.send(2, wire.u64(value), flags=5)
    assert await channel.config_changed() is (value == 0)
    answer = client.receive()
    assert (answer.code, answer.flags, answer.payload) == (2, 9, b"")
    channel.close()
    client.close()


async def test_config_change_without_reply_ack() -> None:
    """Nothing is waited for."""
    channel, client = await channel_pair(reply_ack=False)
    assert await channel.config_changed()
    assert client.receive().flags == 1
    channel.close()
    client.close()


async def test_a_front_end_that_never_acknowledges() -> None:
    """The wait is limited."""
    channel, client = await channel_pair(reply_ack=True)
    with pytest.raises(RemoteProtocolError, match="no acknowledgement of CONFIG_CHANGE_MSG"):
        await channel.config_changed()
    channel.close()
    client.close()


@pytest.mark.parametrize("answer", [wire.message(2, wire.u64(0), 1), wire.message(3, wire.u64(0), 5), b"\0" * 12])
async def test_a_broken_acknowledgement(answer: bytes) -> None:
    """Only a protocol error."""
    channel, client = await channel_pair(reply_ack=True)
    client.send_raw(answer)
    with pytest.raises(RemoteProtocolError):
        await channel.config_changed()
    channel.close()
    client.close()


# A whole connection


async def with_backend(device: FakeDevice, play: Callable[[Client], None]) -> BaseException | None:
    """Serve one connection while a front-end plays in a thread; what serving ended with."""
    client, theirs = Client.pair()
    theirs.setblocking(False)
    ended: list[BaseException | None] = []

    async def backend() -> None:
        try:
            await serve(trio.socket.from_stdlib_socket(theirs), device, LOG, message_timeout=5)
        except RemoteProtocolError as error:
            ended.append(error)
        else:
            ended.append(None)

    def front_end() -> None:
        with client:
            play(client)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend)
        await trio.to_thread.run_sync(front_end)
    assert not device.running
    assert not device.memory
    assert all(mapping.closed for mapping in device.mappings)
    return ended[0]


@pytest.mark.parametrize("memory_slots", [True, False])
@pytest.mark.parametrize("gpa_addresses", [True, False])
@pytest.mark.parametrize("packed", [True, False])
async def test_the_test_front_end_brings_a_device_up(memory_slots: bool, gpa_addresses: bool, packed: bool) -> None:
    """Every way of describing memory and both ring formats; pause and reset are told apart over the wire."""
    device = FakeDevice()

    def play(client: Client) -> None:
        features = device.offered_features | wire.F_PROTOCOL_FEATURES
        protocol = None if gpa_addresses else (1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15)
        memory = GuestMemory(Ram(), Ram(gpa=1 << 32, size=1 << 20, offset=8192))
        with Guest(
            client,
            memory,
            features=features if packed else features & ~wire.F_RING_PACKED,
            protocol_features=protocol,
            memory_slots=memory_slots,
        ) as guest:
            guest.start()
            assert sorted(device.running) == [0, 1]
            assert [mapped.region.mmap_offset for mapped in device.memory] == [0, 8192]
            device.processed = {0: 0x8005_8005 if packed else 5}
            guest.pause_and_continue()
            assert device.resets == 0
            guest.reset_and_start()
            assert device.resets == 1

    assert await with_backend(device, play) is None


async def test_backend_channel_is_handed_over() -> None:
    """SET_BACKEND_REQ_FD to a usable channel; a second one closes the first; both are closed at the end."""
    device, channels, sessions = FakeDevice(), list[BackendChannel](), list[Session]()
    client, theirs = Client.pair()
    theirs.setblocking(False)

    def play() -> None:
        with client:
            client.negotiate()
            for _ in range(2):
                ours, backend = socket.socketpair()
                with ours, backend:
                    client.do(wire.SET_BACKEND_REQ_FD, fds=[backend.fileno()])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: serve(
                trio.socket.from_stdlib_socket(theirs),
                device,
                LOG,
                on_session=sessions.append,
                on_backend_channel=channels.append,
            )
        )
        await trio.to_thread.run_sync(play)
    assert (len(channels), len(sessions)) == (2, 1)


def recorded_session() -> list[tuple[bytes, list[int]]]:
    """A whole start of a device as messages; the descriptors are to be closed by the caller."""
    ram, events = memfd(1 << 20), [os.eventfd(0) for _ in range(6)]
    features = wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES
    protocol = wire.P_REPLY_ACK | wire.P_CONFIG | wire.P_CONFIGURE_MEM_SLOTS | wire.P_GPA_ADDRESSES
    protocol |= wire.P_INFLIGHT_SHMFD
    ack = wire.VERSION | wire.NEED_REPLY
    session: list[tuple[bytes, list[int]]] = [
        (wire.message(wire.GET_FEATURES), []),
        (wire.message(wire.GET_PROTOCOL_FEATURES), []),
        (
            wire.message(wire.SET_PROTOCOL_FEATURES, wire.u64(wire.P_REPLY_ACK | 1 << 15 | 1 << 9 | 1 << 21 | 1 << 12)),
            [],
        ),
        (wire.message(wire.SET_OWNER), []),
        (wire.message(wire.GET_CONFIG, wire.config(0, bytes(40))), []),
        (wire.message(wire.SET_FEATURES, wire.u64(features), ack), []),
        (wire.message(wire.ADD_MEM_REG, wire.single_region(wire.region(0, 1 << 20, 0)), ack), [ram]),
        (wire.message(wire.GET_INFLIGHT_FD, wire.inflight(0, 0, 2, 256)), []),
    ]
    for index in (0, 1):
        base = index << 16
        session += [
            (wire.message(wire.SET_VRING_NUM, wire.vring_state(index, 256)), []),
            (wire.message(wire.SET_VRING_BASE, wire.vring_state(index, 0)), []),
            (wire.message(wire.SET_VRING_ADDR, wire.vring_addr(index, base, base + 0x8000, base + 0x4000)), []),
            (wire.message(wire.SET_VRING_KICK, wire.u64(index), ack), [events[3 * index]]),
            (wire.message(wire.SET_VRING_CALL, wire.u64(index), ack), [events[3 * index + 1]]),
            (wire.message(wire.SET_VRING_ERR, wire.u64(index), ack), [events[3 * index + 2]]),
        ]
    session += [(wire.message(wire.SET_VRING_ENABLE, wire.vring_state(index, 1), ack), []) for index in (0, 1)]
    session += [(wire.message(wire.GET_VRING_BASE, wire.vring_state(index)), []) for index in (0, 1)]
    return session


@pytest.mark.parametrize("extra", [0, 1, 13])
async def test_the_front_end_leaves_after_any_message(extra: int) -> None:
    """At every point of a session, also in the middle of the next message: nothing stays mapped, open or running."""
    session = recorded_session()
    for count in range(len(session) + 1):
        device = FakeDevice()

        def play(client: Client, count: int = count) -> None:
            for data, fds in session[:count]:
                client.send_raw(data, fds)
            if extra and count < len(session):
                data, fds = session[count]
                client.send_raw(data[: min(extra, len(data) - 1)], fds)

        error = await with_backend(device, play)
        # A client that leaves with unread answers resets the connection, which may overtake what it sent.
        assert error is None or isinstance(error, RemoteProtocolError)
        assert device.resets >= 1
    for fd in {fd for _, fds in session for fd in fds}:
        os.close(fd)


async def test_a_syntax_error_closes_the_connection() -> None:
    """The front-end sees the end; the server says why."""

    def play(client: Client) -> None:
        client.send_raw(wire.header(99, 0))
        assert client.ended()

    error = await with_backend(FakeDevice(), play)
    assert isinstance(error, RemoteProtocolError)
    assert "unknown request 99" in str(error)


async def test_a_refusal_does_not_close_the_connection() -> None:
    """A non-zero acknowledgement, and on it goes."""

    def play(client: Client) -> None:
        client.negotiate()
        assert client.acknowledged(wire.SET_VRING_NUM, wire.vring_state(7, 1)) != 0
        assert client.ask(wire.GET_QUEUE_NUM).u64 == 2

    assert await with_backend(FakeDevice(), play) is None


async def test_an_unanswerable_request_closes_the_connection() -> None:
    """GET_VRING_BASE of a ring that does not exist."""

    def play(client: Client) -> None:
        client.negotiate()
        with pytest.raises(ConnectionEndedError):
            client.ask(wire.GET_VRING_BASE, wire.vring_state(7))

    error = await with_backend(FakeDevice(), play)
    assert "ring 7 does not exist" in str(error)


async def test_inflight_descriptor_arrives() -> None:
    """A reply with a descriptor, over the socket."""

    def play(client: Client) -> None:
        client.negotiate()
        answer = client.ask(wire.GET_INFLIGHT_FD, wire.inflight(0, 0, 1, 64))
        (fd,) = answer.fds
        assert os.fstat(fd).st_size == struct.unpack_from("=Q", answer.payload)[0]
        os.close(fd)

    assert await with_backend(FakeDevice(), play) is None


async def test_cancelling_a_server_cleans_up() -> None:
    """SIGTERM cancels it, wherever it is."""
    device = FakeDevice()
    client, theirs = Client.pair()
    theirs.setblocking(False)
    with client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, trio.socket.from_stdlib_socket(theirs), device, LOG)
            guest = await trio.to_thread.run_sync(lambda: Guest(client))
            await trio.to_thread.run_sync(guest.start)
            assert device.running
            nursery.cancel_scope.cancel()
        assert not device.running
        assert not device.memory
        assert client.ended()
        guest.close()


def test_frontend_sends_253_descriptors() -> None:
    """The hostile tests rely on the client not dropping any."""
    client, theirs = Client.pair()
    event = os.eventfd(0)
    client.send_raw(b"x", [event] * 253)
    numbers = array.array("i")
    _, ancillary, flags, _ = theirs.recvmsg(1, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
    numbers.frombytes(ancillary[0][2])
    assert (len(numbers), flags & socket.MSG_CTRUNC) == (253, 0)
    for fd in (event, *numbers):
        os.close(fd)
    theirs.close()
    client.close()
