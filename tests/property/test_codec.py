"""The codec under any input."""

from __future__ import annotations

import os
from collections.abc import Sequence

from frontend import wire
from hypothesis import given
from hypothesis import strategies as st

from viommud.vhost_user.codec import NEED_DATA, Connection, Event, Message, Request, Role
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.fds import OwnedFd
from viommud.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, RequestType
from viommud.vhost_user.payloads import (
    MAX_CONFIG,
    MAX_TABLE_REGIONS,
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Opaque,
    Payload,
    SharedMemoryConfig,
    SharedMemoryMap,
    SingleRegion,
    Uuid,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)

u8 = st.integers(0, 0xFF)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, (1 << 64) - 1)
regions = st.builds(MemoryRegion, u64, u64, u64, u64)

PAYLOADS: dict[type[Payload], st.SearchStrategy[Payload]] = {
    Empty: st.just(Empty()),
    U64: st.builds(U64, u64),
    VringState: st.builds(VringState, u32, u32),
    VringAddr: st.builds(VringAddr, u32, st.integers(0, 1), u64, u64, u64, u64),
    VringFd: st.builds(VringFd, u8, st.booleans()),
    MemoryTable: st.builds(MemoryTable, st.lists(regions, max_size=MAX_TABLE_REGIONS).map(tuple)),
    SingleRegion: st.builds(SingleRegion, regions),
    LogArea: st.builds(LogArea, u64, u64),
    VringArea: st.builds(VringArea, u64, u64, u64),
    Inflight: st.builds(Inflight, u64, u64, u16, u16, st.booleans()),
    Config: st.builds(Config, u32, st.integers(0, 1), st.binary(max_size=MAX_CONFIG)),
    Iotlb: st.builds(Iotlb, u64, u64, u64, u8, u8),
    DeviceState: st.builds(DeviceState, u32, u32),
    Uuid: st.builds(Uuid, st.binary(min_size=16, max_size=16)),
    SharedMemoryConfig: st.builds(SharedMemoryConfig, st.lists(u64, min_size=256, max_size=256).map(tuple)),
    SharedMemoryMap: st.builds(SharedMemoryMap, u8, u64, u64, u64, u64),
    Opaque: st.builds(Opaque, st.binary(max_size=4096)),
}


@st.composite
def messages(draw: st.DrawFn) -> tuple[RequestType, Payload, int, bool]:
    """Any correct request of either table: row, payload, number of descriptors, NEED_REPLY."""
    table = draw(st.sampled_from([FRONTEND_REQUESTS, BACKEND_REQUESTS]))
    row = draw(st.sampled_from([table[code] for code in sorted(table)]))
    payload = draw(PAYLOADS[row.payload])
    return row, payload, draw(st.integers(*row.fds.expected(payload))), draw(st.booleans())


def new_fds(count: int) -> list[OwnedFd]:
    """Descriptors as they arrive from a socket."""
    return [OwnedFd(os.eventfd(0)) for _ in range(count)]


def feed(connection: Connection, data: bytes, fds: Sequence[OwnedFd], cuts: Sequence[int]) -> None:
    """Feed as a transport does, in pieces of the given sizes, over and over; descriptors with the first byte."""
    position = 0
    while data:
        size = min(cuts[position % len(cuts)], connection.bytes_wanted)
        connection.receive_data(data[:size], fds)
        data, fds, position = data[size:], (), position + 1


def summary(event: Event) -> object:
    """What two runs over the same bytes must agree on."""
    if isinstance(event, Request):
        return event.kind.name, event.payload, event.need_reply, len(event.fds)
    return event


@given(st.lists(messages(), min_size=1, max_size=5), st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_round_trip(sent: list[tuple[RequestType, Payload, int, bool]], cuts: list[int]) -> None:
    """Whatever is encoded is decoded to the same, one message after the other, in any pieces."""
    for row, payload, count, need_reply in sent:
        table = FRONTEND_REQUESTS if FRONTEND_REQUESTS.get(row.code) is row else BACKEND_REQUESTS
        out = Connection(table, Role.REQUESTER).send_request(row, payload, range(count), need_reply=need_reply)
        receiver = Connection(table, Role.RESPONDER)
        feed(receiver, out.data, new_fds(count), cuts)
        event = receiver.next_event()
        assert isinstance(event, Request)
        with event:
            assert (row, payload, count, need_reply) == (event.kind, event.payload, len(event.fds), event.need_reply)
        assert receiver.next_event() is NEED_DATA
        assert receiver.between_messages


def run(data: bytes, counts: Sequence[int], cuts: Sequence[int]) -> tuple[list[object], str | None]:
    """Feed bytes of a stream; every header's first byte brings the next number of descriptors."""
    connection = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
    events: list[object] = []
    remaining, position, message = data, 0, 0
    try:
        while remaining:
            fds: list[OwnedFd] = []
            if connection.between_messages:
                fds = new_fds(counts[message % len(counts)])
                message += 1
            size = min(cuts[position % len(cuts)], connection.bytes_wanted)
            connection.receive_data(remaining[:size], fds)
            remaining, position = remaining[size:], position + 1
            while (event := connection.next_event()) is not NEED_DATA:
                events.append(summary(event))
                if isinstance(event, Message):
                    event.close()
        connection.receive_eof()
    except RemoteProtocolError as error:
        assert connection.bytes_wanted == 0
        return events, str(error)
    finally:
        connection.close()
    return events, None


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Bytes that are often nearly vhost-user: correct messages with damage, plausible headers, noise."""
    data = b""
    for _ in range(draw(st.integers(1, 4))):
        row = FRONTEND_REQUESTS[draw(st.integers(1, 44))]
        body = draw(st.one_of(PAYLOADS[row.payload].map(lambda payload: payload.encode()), st.binary(max_size=300)))
        code = draw(st.one_of(st.just(row.code), u32))
        flags = draw(st.one_of(st.sampled_from([1, 9]), u32))
        size = draw(st.one_of(st.just(len(body)), st.integers(0, 5000), u32))
        data += wire.header(code, size, flags) + body
    cut = draw(st.integers(0, len(data)))
    return draw(st.sampled_from([data, data[:cut], data[:cut] + draw(st.binary(max_size=20))]))


@given(streams(), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(1, 64), min_size=1))
def test_any_bytes_raise_one_error_only(data: bytes, counts: list[int], cuts: list[int]) -> None:
    """Nothing but RemoteProtocolError, no descriptor left, and the same result whole and in any pieces."""
    before = len(os.listdir("/proc/self/fd"))
    whole = run(data, counts, [1 << 20])
    assert whole == run(data, counts, cuts)
    assert whole == run(data, counts, [1])
    assert before == len(os.listdir("/proc/self/fd"))
