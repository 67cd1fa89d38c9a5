"""What happened lately, for those who look: the last refused requests and faults, and streams of what happens next.

Everything here is bounded: a guest decides how much happens, and a reader how fast it reads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Literal, get_args

import msgspec
import trio

from viommud.engine import REQUEST_NAMES, STATUS_NAMES, Broken, Record, RecordKind
from viommud.instruments import Action

KEPT = 256
"""Refused requests kept, and as many faults."""
STREAM_BUFFER = 1024
"""Events that wait for one reader; what comes when it is full is dropped, and counted."""

QUEUES = ("request", "event")
FAULT_REASONS = ("unknown", "domain", "mapping")

EventKind = Literal["refused", "fault", "attached", "detached", "broken", "injected", "session", "lost"]
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened; a field is there where it means something."""

    time: str
    """UTC, ISO 8601."""
    kind: EventKind
    request: str | None = None
    status: str | None = None
    endpoint: int | None = None
    domain: int | None = None
    first: str | None = None
    """First IOVA of a range, or the address of a fault, in hexadecimal."""
    last: str | None = None
    reason: str | None = None
    flags: int | None = None
    queue: str | None = None
    count: int | None = None


_FIELDS = {
    "attach": ("endpoint", "domain"),
    "detach": ("endpoint", "domain"),
    "map": ("domain", "first", "last"),
    "unmap": ("domain", "first", "last"),
    "probe": ("endpoint",),
}


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03}Z"


def from_record(record: Record) -> Event:
    """A record of the engine as an event."""
    now = _now()
    values = {
        "endpoint": record.endpoint,
        "domain": record.domain,
        "first": f"{record.first:#x}",
        "last": f"{record.last:#x}",
    }
    match record.kind:
        case RecordKind.BROKEN:
            reason = Broken(record.code).name.lower()
            return Event(now, "broken", queue=QUEUES[record.type], reason=reason)
        case RecordKind.FAULT:
            reason = FAULT_REASONS[record.code]
            return Event(
                now, "fault", endpoint=record.endpoint, reason=reason, flags=record.value, first=f"{record.first:#x}"
            )
        case RecordKind.ATTACHED:
            return Event(now, "attached", endpoint=record.endpoint, domain=record.domain)
        case RecordKind.DETACHED:
            return Event(now, "detached", endpoint=record.endpoint, domain=record.domain)
        case _:
            request, status = REQUEST_NAMES[record.type], STATUS_NAMES[record.code]
            # What is not answered was not understood either, unless it was made so.
            named = _FIELDS.get(request, ()) if status != "unanswered" or record.kind is RecordKind.INJECTED else ()
            kept = {name: values[name] for name in named}
            if record.kind is RecordKind.INJECTED:
                kept["reason"] = Action(record.value).name.lower()
            kind: EventKind = "injected" if record.kind is RecordKind.INJECTED else "refused"
            return msgspec.convert({"time": now, "kind": kind, "request": request, "status": status, **kept}, Event)


class Stream:
    """One reader's view of what happens from now on."""

    def __init__(self, kinds: Collection[EventKind], closed: Callable[[Stream], None]) -> None:
        self.kinds = frozenset(kinds)
        self._waiting: deque[Event] = deque()
        self._dropped = 0
        self._lot = trio.lowlevel.ParkingLot()
        self._closed = closed

    def add(self, event: Event) -> None:
        """Something happened."""
        if event.kind not in self.kinds:
            return
        if len(self._waiting) >= STREAM_BUFFER:
            self._dropped += 1
        else:
            self._waiting.append(event)
        self._lot.unpark_all()

    async def take(self) -> tuple[list[Event], int]:
        """Wait for events: all that came, and how many were dropped after them."""
        while not self._waiting:
            await self._lot.park()
        events, dropped = list(self._waiting), self._dropped
        self._waiting.clear()
        self._dropped = 0
        return events, dropped

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed(self)


class EventLog:
    """What happened lately."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Event]] = {kind: deque(maxlen=KEPT) for kind in ("refused", "fault", "injected")}
        self._streams: list[Stream] = []

    def add(self, event: Event) -> None:
        """Something happened."""
        if event.kind in self._kept:
            self._kept[event.kind].append(event)
        for stream in self._streams:
            stream.add(event)

    def note(self, kind: EventKind, **fields: str | int) -> None:
        """Something happened now."""
        self.add(msgspec.convert({"time": _now(), "kind": kind, **fields}, Event))

    def last(self, kind: Literal["refused", "fault", "injected"]) -> Iterable[Event]:
        """The last of a kind, oldest first."""
        return tuple(self._kept[kind])

    def clear(self) -> None:
        """Another guest begins: nothing of the one before is shown."""
        for kept in self._kept.values():
            kept.clear()

    def stream(self, kinds: Collection[EventKind] = EVENT_KINDS) -> Stream:
        """Everything of these kinds from now on; to be used as a context manager."""
        stream = Stream(kinds, self._streams.remove)
        self._streams.append(stream)
        return stream
