"""Logs: readable on a terminal, with fields in systemd's journal, JSON otherwise; always to standard error.

A logger that cannot write loses the line.  It never stops the program: a terminal that was closed, a pipe that nobody
reads or a full disk behind a redirection is no reason to take the IOMMU away from a running guest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from viommud.log_sink import DescriptorSink, JournalSink, is_journal, journal_entry

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Sink(Protocol):
    dropped: int

    def write(self, line: Any, /) -> object:
        """Take a line; lose it rather than wait."""


class _StreamSink:
    """A stream that the caller answers for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.dropped = 0

    def write(self, line: str) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            self.dropped += 1


class _Writer:
    """The last link: a rendered line goes to a sink."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink

    def msg(self, line: str | bytes) -> None:
        self._sink.write(line + "\n" if isinstance(line, str) else line)

    debug = info = warning = error = critical = exception = msg


class _State:
    """What can change while the program runs; there is one log."""

    level = "info"
    sink: _Sink | None = None


def level() -> str:
    """The least important level that is logged."""
    return _State.level


def set_level(name: str) -> None:
    """Log lines of this level (one of LEVELS) and more important ones from now on."""
    _State.level = name


def lines_dropped() -> int:
    """Lines that could not be written."""
    return 0 if _State.sink is None else _State.sink.dropped


def configure(level: str, style: str, stream: TextIO | None = None) -> FilteringBoundLogger:
    """Set up logging for the whole process and return its logger.

    :param level: one of LEVELS; set_level() changes it.
    :param style: "console", "json", "journal", or "auto": console if the stream is a terminal, journal if it leads
        there, JSON otherwise.
    :param stream: None: standard error, which is never waited for.
    """
    target = sys.stderr if stream is None else stream
    if style == "auto" and stream is None and is_journal(2, os.environ.get("JOURNAL_STREAM", "")):
        style = "journal"
    console = style == "console" or (style == "auto" and target.isatty())
    sink: _Sink
    if style == "journal":
        sink = JournalSink()
    elif stream is None:
        with contextlib.suppress(OSError):
            target.flush()
        sink = DescriptorSink(target.fileno(), _lost_on_console if console else _lost_in_json)
    else:
        sink = _StreamSink(stream)
    _State.level, _State.sink = level, sink
    structlog.configure(
        processors=[_only_wanted, *processors(console, journal=style == "journal", colors=target.isatty())],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *_: _Writer(sink),
        cache_logger_on_first_use=True,
    )
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def processors(console: bool, *, journal: bool = False, colors: bool = False) -> list[Processor]:
    """What a line goes through on its way to the writer."""
    common: list[Processor] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level]
    if journal:  # which has times of its own
        return [*common, structlog.processors.format_exc_info, _journal_entry]
    common.append(structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console))
    if console:
        return [*common, structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24, sort_keys=False)]
    return [*common, structlog.processors.format_exc_info, _first_things_first, structlog.processors.JSONRenderer()]


def _only_wanted(_logger: Any, method: str, line: EventDict) -> EventDict:
    """Every level passes through here, so that it can be changed under a logger that is in use."""
    if LEVELS.get(method, logging.ERROR) < LEVELS[_State.level]:
        raise structlog.DropEvent
    return line


def _journal_entry(_logger: Any, _method: str, line: EventDict) -> bytes:
    return journal_entry(line, lambda value: json.dumps(value, default=str))


def _lost_in_json(count: int) -> str:
    return json.dumps({"level": "warning", "event": "log-lines-lost", "count": count}) + "\n"


def _lost_on_console(count: int) -> str:
    return f"[warning  ] log-lines-lost           count={count}\n"


def _first_things_first(_logger: Any, _method: str, line: EventDict) -> EventDict:
    """When, how bad and what before everything else, for those who read JSON with their eyes."""
    return {key: line.pop(key) for key in ("timestamp", "level", "event") if key in line} | dict(line)


class RateLimiter:
    """A few lines of a kind at once, then one every now and then that says how many were left out.

    Kinds come from a set the program fixes, never from a peer: the limiter remembers every one it has seen.
    """

    def __init__(self, *, burst: int = 5, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._interval = interval
        self._clock = clock
        self._kinds: dict[str, _Bucket] = {}

    def admit(self, kind: str) -> dict[str, Any] | None:
        """None: leave this line out.  Otherwise what to add to it: how many were left out since the last."""
        now = self._clock()
        bucket = self._kinds.setdefault(kind, _Bucket(self._burst, now))
        bucket.refill(now, self._burst, self._interval)
        if bucket.tokens < 1:
            bucket.left_out += 1
            return None
        bucket.tokens -= 1
        left_out, bucket.left_out = bucket.left_out, 0
        return {"left_out": left_out} if left_out else {}

    @property
    def pending(self) -> bool:
        """Has a line been left out that no later line has told of?"""
        return any(bucket.left_out for bucket in self._kinds.values())

    def overdue(self, *, everything: bool = False) -> list[tuple[str, int]]:
        """Kinds that have fallen silent, and how many of their lines were left out; each is told once."""
        now = self._clock()
        found = []
        for kind, bucket in self._kinds.items():
            bucket.refill(now, self._burst, self._interval)
            if bucket.left_out and (everything or bucket.tokens >= 1):
                found.append((kind, bucket.left_out))
                bucket.left_out = 0
                bucket.tokens = max(0.0, bucket.tokens - 1)
        return found


class _Bucket:
    __slots__ = ("_at", "left_out", "tokens")

    def __init__(self, tokens: float, now: float) -> None:
        self.tokens = tokens
        self.left_out = 0
        self._at = now

    def refill(self, now: float, burst: int, interval: float) -> None:
        self.tokens = min(burst, self.tokens + (now - self._at) / interval)
        self._at = now
