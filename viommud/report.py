"""What the worker tells, as log lines: a few of each kind, however much a guest makes happen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from viommud.endpoint_id import show
from viommud.engine import REQUEST_NAMES, STATUS_NAMES, Broken, Record, RecordKind, Stats
from viommud.events import FAULT_REASONS, QUEUES, EventLog, from_record
from viommud.instruments import Action
from viommud.log import RateLimiter
from viommud.settings import Feature, Settings

ENDPOINTS_REMEMBERED = 64
"""Endpoints named in the summary of a session; more are counted only."""
DRAIN_ROUNDS = 8
"""Pages of records taken in one go: a guest that never stops must not keep the control plane for itself."""

BROKEN_REASONS: Mapping[Broken, str] = MappingProxyType(
    {
        Broken.AVAIL: "the available index is more than a ring ahead",
        Broken.HEAD: "a descriptor index is not in the ring",
        Broken.LOOP: "a descriptor chain is longer than the ring",
        Broken.ORDER: "a writable descriptor stands before a readable one",
        Broken.INDIRECT: "an indirect table has a bad size or place",
        Broken.ADDRESS: "a buffer lies outside guest memory",
        Broken.LENGTH: "a descriptor chain is longer than 4 GiB",
        Broken.MEMORY: "the file behind guest memory has shrunk",
    }
)

_REQUEST_FIELDS = {
    "attach": ("endpoint", "domain"),
    "detach": ("endpoint", "domain"),
    "map": ("domain", "range"),
    "unmap": ("domain", "range"),
    "probe": ("endpoint",),
}


class Source(Protocol):
    """What a reporter needs of an engine."""

    settings: Settings

    def take_records(self, limit: int = ...) -> tuple[list[Record], int]:
        """Records that wait, and how many were lost."""

    def stats(self) -> Stats:
        """Counters."""


class Reporter:
    """Turns one session's records into log lines, and keeps what its summary tells."""

    def __init__(
        self,
        engine: Source,
        log: FilteringBoundLogger,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_broken_ring: Callable[[], None] = lambda: None,
        events: EventLog | None = None,
    ) -> None:
        self._engine = engine
        self._log = log
        self._limiter = RateLimiter(clock=clock)
        self._on_broken_ring = on_broken_ring
        self._events = EventLog() if events is None else events
        self.records_lost = 0
        self.endpoints_seen: set[int] = set()
        """Endpoints that were attached at some time, at most ENDPOINTS_REMEMBERED."""

    @property
    def pending(self) -> bool:
        """Is there a count of left-out lines that tell() may have to tell?"""
        return self._limiter.pending

    def drain(self) -> None:
        """Take the records that wait, as many as the engine's ring holds, and log what deserves a line."""
        for _ in range(DRAIN_ROUNDS):
            records, lost = self._engine.take_records()
            for record in records:
                self._events.add(from_record(record))
                self._report(record)
            if lost:
                self._events.note("lost", count=lost)
                self.records_lost += lost
                self._line("warning", "records-lost", lost=lost)
            if not records:
                return

    def tell_left_out(self, *, everything: bool = False) -> None:
        """Tell of lines that were left out and that no later line of their kind has told of."""
        for kind, count in self._limiter.overdue(everything=everything):
            self._log.info("more-of-the-same", like=kind, left_out=count)

    def _line(self, level: str, event: str, kind: str | None = None, **fields: object) -> None:
        extra = self._limiter.admit(kind or event)
        if extra is not None:
            getattr(self._log, level)(event, **fields, **extra)

    def _report(self, record: Record) -> None:
        match record.kind:
            case RecordKind.REFUSED:
                self._refused(record)
            case RecordKind.BROKEN:
                self._on_broken_ring()
                self._line(
                    "error",
                    "ring-broken",
                    ring=QUEUES[record.type],
                    reason=BROKEN_REASONS[Broken(record.code)],
                    hint="nothing is served on it until the guest resets the device",
                )
            case RecordKind.FAULT:
                self._line(
                    "warning",
                    "fault-reported",
                    endpoint=show(record.endpoint),
                    reason=FAULT_REASONS[record.code],
                    address=f"{record.first:#x}",
                )
            case RecordKind.ATTACHED:
                if len(self.endpoints_seen) < ENDPOINTS_REMEMBERED:
                    self.endpoints_seen.add(record.endpoint)
            case RecordKind.INJECTED:
                request = REQUEST_NAMES[record.type]
                action = Action(record.value).name.lower()
                self._line("warning", "injected", f"injected {request} {action}", request=request, action=action)
            case RecordKind.DETACHED:
                pass

    def _refused(self, record: Record) -> None:
        request, status = REQUEST_NAMES[record.type], STATUS_NAMES[record.code]
        values: dict[str, object] = {
            "endpoint": show(record.endpoint),
            "domain": record.domain,
            "range": f"{record.first:#x}-{record.last:#x}",
        }
        wanted = _REQUEST_FIELDS.get(request, ()) if status != "unanswered" else ()
        fields = {name: values[name] for name in wanted}
        if status == "nomem" and (limit := self._limit_reached(request)):
            fields["limit"] = limit
        kind = f"request-refused {request} {status}"
        self._line("warning", "request-refused", kind, request=request, status=status, **fields)

    def _limit_reached(self, request: str) -> str | None:
        """The limit that refused a request just now, as far as the counters tell; None: the host lacks memory."""
        stats, settings = self._engine.stats(), self._engine.settings
        if not stats.limit_hits:
            return None
        if request == "attach":
            return "limits.domains" if stats.domains >= settings.max_domains else "limits.endpoints"
        return "limits.mappings" if stats.mappings >= settings.max_mappings else "limits.mappings-per-domain"


def feature_names(features: int) -> list[str]:
    """Names of feature bits, those unknown here as numbers."""
    names = [feature.name or "" for feature in Feature if features & feature]
    rest = features & ~sum(Feature)
    return names + [f"bit {bit}" for bit in range(rest.bit_length()) if rest >> bit & 1]
