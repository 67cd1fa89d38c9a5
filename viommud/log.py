"""Logs: readable on a terminal, JSON otherwise; always to standard error.

A logger that cannot write loses the line.  It never stops the program: a terminal that was closed, or a full disk
behind a redirection, is no reason to take the IOMMU away from a running guest.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Writer:
    """The last link: a rendered line goes to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = exception = msg


def configure(level: str, style: str, stream: TextIO | None = None) -> FilteringBoundLogger:
    """Set up logging for the whole process and return its logger.

    :param level: one of LEVELS.
    :param style: "console", "json", or "auto": console if the stream is a terminal.
    """
    target = sys.stderr if stream is None else stream
    console = style == "console" or (style == "auto" and target.isatty())
    structlog.configure(
        processors=processors(console=console, colors=console and target.isatty()),
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Writer(target),
        cache_logger_on_first_use=True,
    )
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def processors(*, console: bool, colors: bool = False) -> list[Processor]:
    """What a line goes through on its way to the writer."""
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
    ]
    if console:
        return [*common, structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24, sort_keys=False)]
    return [*common, structlog.processors.format_exc_info, _first_things_first, structlog.processors.JSONRenderer()]


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
