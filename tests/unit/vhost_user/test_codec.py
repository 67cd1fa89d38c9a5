"""The codec fed with what a peer may send: whole, piece by piece, and broken."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import pytest
from frontend import wire

from viommud.vhost_user.codec import NEED_DATA, Closed, Connection, Reply, Request, Role
from viommud.vhost_user.errors import LocalProtocolError, RemoteProtocolError
from viommud.vhost_user.fds import OwnedFd
from viommud.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, FrontendRequest
from viommud.vhost_user.payloads import U64, Config, Empty, VringFd, VringState


@pytest.fixture
def connection() -> Iterator[Connection]:
    """The back-end's main connection."""
    connection = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
    yield connection
    connection.close()


def new_fds(count: int) -> list[OwnedFd]:
    """Descriptors as they arrive from a socket."""
    return [OwnedFd(os.eventfd(0)) for _ in range(count)]


def is_open(fd: int) -> bool:
    """Does the number refer to anything?"""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def feed(connection: Connection, data: bytes, fds: Sequence[OwnedFd] = (), *, step: int = 1 << 20) -> None:
    """Feed in pieces of at most `step` bytes and never more than wanted, as the transport reads; descriptors first."""
    while data:
        size = min(step, connection.bytes_wanted)
        connection.receive_data(data[:size], fds)
        data, fds = data[size:], ()


def only_request(connection: Connection) -> Request:
    """The one request that is ready."""
    event = connection.next_event()
    assert isinstance(event, Request)
    assert connection.next_event() is NEED_DATA
    return event


def broken(connection: Connection, data: bytes, fds: Sequence[OwnedFd] = (), *, eof: bool = False) -> str:
    """Feed what the peer may not send; the reason, after checking that nothing is left of it."""
    numbers = [fd.fileno() for fd in fds]
    if eof:
        feed(connection, data, fds)
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_eof() if eof else feed(connection, data, fds)
    assert not any(is_open(number) for number in numbers)
    with pytest.raises(RemoteProtocolError):
        connection.next_event()
    assert connection.bytes_wanted == 0
    return str(caught.value)


@pytest.mark.parametrize("step", [1, 2, 5, 11, 12, 13, 1000])
def test_messages_arrive_in_any_pieces(connection: Connection, step: int) -> None:
    """Three messages one after the other, split at every multiple of a step."""
    data = wire.message(wire.GET_FEATURES)
    data += wire.message(wire.SET_VRING_NUM, wire.vring_state(1, 256), wire.VERSION | wire.NEED_REPLY)
    data += wire.message(wire.SET_CONFIG, wire.config(0, bytes(range(40))))
    feed(connection, data, step=step)
    first, second, third = (connection.next_event() for _ in range(3))
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert isinstance(third, Request)
    assert (first.kind.code, first.payload, first.need_reply) == (FrontendRequest.GET_FEATURES, Empty(), False)
    assert (second.payload, second.need_reply) == (VringState(1, 256), True)
    assert third.payload == Config(0, 0, bytes(range(40)))
    assert connection.next_event() is NEED_DATA


@pytest.mark.parametrize("cut", range(1, 12))
def test_header_split_at_every_byte(connection: Connection, cut: int) -> None:
    """A header in two pieces; never more is wanted than the header has left."""
    data = wire.message(wire.SET_OWNER)
    connection.receive_data(data[:cut])
    assert 12 - cut == connection.bytes_wanted
    assert connection.next_event() is NEED_DATA
    connection.receive_data(data[cut:])
    assert only_request(connection).kind.name == "SET_OWNER"


def test_more_than_wanted_is_our_own_error(connection: Connection) -> None:
    """Reading beyond a message would mix up descriptors, so a transport that does is wrong."""
    with pytest.raises(LocalProtocolError):
        connection.receive_data(wire.message(wire.SET_OWNER) * 2)


# Framing


@pytest.mark.parametrize("cut", range(1, 12))
def test_end_in_the_middle_of_a_header(connection: Connection, cut: int) -> None:
    """A cut header is an error, not an end."""
    reason = broken(connection, wire.message(wire.SET_OWNER)[:cut], eof=True)
    assert "in the middle of a header" in reason


@pytest.mark.parametrize("cut", range(12, 20))
def test_end_in_the_middle_of_a_payload(connection: Connection, cut: int) -> None:
    """A cut payload is an error that names the message."""
    reason = broken(connection, wire.message(wire.SET_FEATURES, wire.u64(0))[:cut], eof=True)
    assert "SET_FEATURES payload" in reason


def test_end_between_messages(connection: Connection) -> None:
    """The peer may close after a whole message."""
    feed(connection, wire.message(wire.SET_OWNER))
    connection.receive_eof()
    assert isinstance(connection.next_event(), Request)
    assert isinstance(connection.next_event(), Closed)
    with pytest.raises(LocalProtocolError):
        connection.receive_data(b"x")


@pytest.mark.parametrize("size", [4097, 1 << 20, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_oversized_payload(connection: Connection, size: int) -> None:
    """Refused from the header alone, before a byte of it is stored.  Ancestor: DPDK 585283f9a7."""
    assert f"{size} bytes" in broken(connection, wire.header(wire.SET_CONFIG, size))


@pytest.mark.parametrize("code", sorted(FRONTEND_REQUESTS))
def test_payload_size_outside_the_row(connection: Connection, code: int) -> None:
    """A payload one byte short, none where one is due, one byte too long."""
    least, greatest = FRONTEND_REQUESTS[code].payload.sizes()
    for size in {0, least - 1, greatest + 1} - set(range(least, greatest + 1)) - {-1}:
        fresh = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
        assert "bytes" in broken(fresh, wire.header(code, size))


@pytest.mark.parametrize("version", [0, 2, 3])
def test_other_versions(connection: Connection, version: int) -> None:
    """There is only version 1."""
    assert f"version {version}" in broken(connection, wire.header(wire.GET_FEATURES, 0, version))


@pytest.mark.parametrize("flag", [1 << bit for bit in range(2, 32) if bit != 3])
def test_reserved_flags_and_reply_flag(connection: Connection, flag: int) -> None:
    """Bits 4 to 31 are reserved and bit 2 belongs to replies."""
    assert "flags" in broken(connection, wire.header(wire.GET_FEATURES, 0, wire.VERSION | flag))


@pytest.mark.parametrize("code", [0, 45, 100, 0x10001, 0x7FFF_FFFF, 0x8000_0000, 0x8000_0001, 0xFFFF_FFFF])
def test_unknown_codes(connection: Connection, code: int) -> None:
    """Ancestor: DPDK cdc37ca3d0, a request code taken as signed."""
    data = struct.pack("=III", code, wire.VERSION, 0)
    assert f"unknown request {code}" in broken(connection, data, new_fds(1))


def test_an_error_is_final(connection: Connection) -> None:
    """After an error nothing is parsed any more, and the error is given again."""
    broken(connection, wire.header(0, 0))
    with OwnedFd(os.eventfd(0)) as late:
        number = late.fileno()
        with pytest.raises(LocalProtocolError):
            connection.receive_data(wire.message(wire.SET_OWNER), [late])
        assert not is_open(number)


# Descriptors


def test_descriptor_goes_to_its_message(connection: Connection) -> None:
    """The message owns it until it is taken."""
    (fd,) = new_fds(1)
    number = fd.fileno()
    feed(connection, wire.message(wire.SET_VRING_KICK, wire.u64(1)), [fd])
    request = only_request(connection)
    assert request.payload == VringFd(1, no_fd=False)
    assert [number] == [owned.fileno() for owned in request.fds]
    with request:
        pass
    assert not is_open(number)


@pytest.mark.parametrize("code", sorted(FRONTEND_REQUESTS))
def test_one_descriptor_too_many(code: int) -> None:
    """For every row.  Ancestor: DPDK CVE-2019-14818, more descriptors than expected were leaked."""
    row = FRONTEND_REQUESTS[code]
    connection = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
    reason = broken(connection, wire.header(code, row.payload.sizes()[1]), new_fds(row.fds.greatest + 1))
    assert f"{row.name} with {row.fds.greatest + 1} descriptors" in reason


@pytest.mark.parametrize("code", [wire.SET_LOG_FD, wire.SET_BACKEND_REQ_FD, wire.ADD_MEM_REG, wire.SET_INFLIGHT_FD])
def test_missing_descriptor(connection: Connection, code: int) -> None:
    """One is due and none comes."""
    size = FRONTEND_REQUESTS[code].payload.sizes()[1]
    assert "0 descriptors where one is due" in broken(connection, wire.message(code, bytes(size)))


@pytest.mark.parametrize("code", [wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR])
def test_no_fd_bit_must_agree(code: int) -> None:
    """Bit 8 with a descriptor, and no bit 8 without."""
    for payload, fds in ((wire.u64(wire.NO_FD), new_fds(1)), (wire.u64(0), [])):
        connection = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
        assert "unless the payload says none" in broken(connection, wire.message(code, payload), fds)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_a_descriptor_for_each_region(count: int) -> None:
    """Two regions with another number of descriptors."""
    connection = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
    data = wire.message(wire.SET_MEM_TABLE, wire.memory_table(wire.region(0, 1, 0), wire.region(8, 1, 8)))
    assert "one for each region" in broken(connection, data, new_fds(count))


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 19])
def test_descriptors_after_the_first_byte(connection: Connection, cut: int) -> None:
    """Front-ends send them with the first byte; accepting them anywhere would let a peer pile them up."""
    data = wire.message(wire.SET_VRING_KICK, wire.u64(0))
    connection.receive_data(data[: min(cut, 12)])
    if cut > 12:
        connection.receive_data(data[12:cut])
    assert "later than a message's first byte" in broken(connection, data[cut : cut + 1], new_fds(1))


def test_truncated_ancillary_data(connection: Connection) -> None:
    """What did arrive is closed.  Ancestor: DPDK 218daf1664."""
    fds = new_fds(3)
    numbers = [fd.fileno() for fd in fds]
    with pytest.raises(RemoteProtocolError, match="lost on the way"):
        connection.receive_data(wire.header(wire.SET_OWNER, 0), fds, truncated=True)
    assert not any(is_open(number) for number in numbers)


def test_close_closes_what_was_not_handed_out(connection: Connection) -> None:
    """Descriptors of a half-received and of a whole message."""
    (first,), (second,) = new_fds(1), new_fds(1)
    numbers = [first.fileno(), second.fileno()]
    data = wire.message(wire.SET_VRING_KICK, wire.u64(0))
    feed(connection, data, [first])
    connection.receive_data(data[:12], [second])
    connection.close()
    assert not any(is_open(number) for number in numbers)


# Sending


def request_of(connection: Connection, data: bytes) -> Request:
    """Feed one message and take it."""
    feed(connection, data)
    return only_request(connection)


def test_replies_have_the_request_code_and_flags_5(connection: Connection) -> None:
    """QEMU refuses anything else (process_message_reply())."""
    request = request_of(connection, wire.message(wire.GET_FEATURES))
    out = connection.send_reply(request, U64(0x1234))
    assert out.data == wire.message(wire.GET_FEATURES, wire.u64(0x1234), 5)
    request = request_of(connection, wire.message(wire.SET_OWNER, flags=9))
    assert connection.send_ack(request, U64(0)).data == wire.message(wire.SET_OWNER, wire.u64(0), 5)


def test_a_refused_get_config_is_answered_with_no_payload(connection: Connection) -> None:
    """Zero length is how GET_CONFIG says no."""
    request = request_of(connection, wire.message(wire.GET_CONFIG, wire.config(0, bytes(4))))
    assert connection.send_reply(request, Empty()).data == wire.message(wire.GET_CONFIG, b"", 5)


def test_wrong_replies_are_our_own_error(connection: Connection) -> None:
    """A reply of another format, to a request without one, with descriptors where none may be, or of the wrong end."""
    get = request_of(connection, wire.message(wire.GET_FEATURES))
    owner = request_of(connection, wire.message(wire.SET_OWNER))
    with pytest.raises(LocalProtocolError):
        connection.send_reply(get, VringState(0, 0))
    with pytest.raises(LocalProtocolError):
        connection.send_reply(get, U64(0), [0])
    with pytest.raises(LocalProtocolError):
        connection.send_reply(get, U64(1 << 64))
    with pytest.raises(LocalProtocolError):
        connection.send_reply(owner, U64(0))
    with pytest.raises(LocalProtocolError):
        connection.send_request(owner.kind)
    requester = Connection(FRONTEND_REQUESTS, Role.REQUESTER)
    with pytest.raises(LocalProtocolError):
        requester.send_ack(owner, U64(0))


# The other end


def test_requester_and_responder_understand_each_other() -> None:
    """Every row: a request made by one end is taken by the other, and so is the reply."""
    for table in (FRONTEND_REQUESTS, BACKEND_REQUESTS):
        for row in table.values():
            asking, answering = Connection(table, Role.REQUESTER), Connection(table, Role.RESPONDER)
            payload = row.payload.decode(bytes(row.payload.sizes()[0]))
            count = row.fds.expected(payload)[0]
            out = asking.send_request(row, payload, [0] * count, need_reply=row.reply is None)
            feed(answering, out.data, new_fds(count))
            with only_request(answering) as request:
                assert (row, payload) == (request.kind, request.payload)
                if row.reply is None or row.reply_needs is not None:
                    back, expected = answering.send_ack(request, U64(7)), U64(7)
                    if row.reply_needs is not None:
                        continue  # only an acknowledgement that nobody asked for here
                else:
                    expected = row.reply.decode(bytes(row.reply.sizes()[0]))  # type: ignore[assignment]
                    back = answering.send_reply(request, expected, [0] * row.reply_fds.least)
                feed(asking, back.data, new_fds(row.reply_fds.least if row.reply else 0))
            reply = asking.next_event()
            assert isinstance(reply, Reply)
            with reply:
                assert (row, expected) == (reply.kind, reply.payload)


def awaiting(*codes: int) -> Connection:
    """A requester that has sent requests."""
    connection = Connection(FRONTEND_REQUESTS, Role.REQUESTER)
    for code in codes:
        connection.send_request(FRONTEND_REQUESTS[code], need_reply=True)
    return connection


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (wire.message(wire.GET_STATUS, wire.u64(0), 5), "awaits one"),
        (wire.message(wire.GET_FEATURES, wire.u64(0), 1), "flags"),
        (wire.message(wire.GET_FEATURES, wire.u64(0), 0xD), "flags"),
        (wire.message(wire.GET_FEATURES, wire.vring_state(0)[:4], 5), "4 bytes"),
        (wire.message(wire.GET_FEATURES, b"", 5), "0 bytes"),
    ],
)
def test_wrong_replies_from_the_peer(reply: bytes, reason: str) -> None:
    """Another code, other flags, another size."""
    assert reason in broken(awaiting(wire.GET_FEATURES), reply)


def test_a_reply_nobody_awaits() -> None:
    """A peer that answers without being asked."""
    assert "no request awaits one" in broken(awaiting(), wire.message(wire.GET_FEATURES, wire.u64(0), 5))


def test_replies_come_in_the_order_of_requests() -> None:
    """Each reply is matched with the oldest request."""
    connection = awaiting(wire.SET_OWNER, wire.GET_FEATURES)
    feed(connection, wire.message(wire.SET_OWNER, wire.u64(1), 5) + wire.message(wire.GET_FEATURES, wire.u64(2), 5))
    for code, value in ((wire.SET_OWNER, 1), (wire.GET_FEATURES, 2)):
        reply = connection.next_event()
        assert isinstance(reply, Reply)
        assert (code, U64(value)) == (reply.kind.code, reply.payload)
