"""Logs: two styles, and a bound on what a peer can make of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import LogCapture

from viommud.engine import REQUEST_NAMES, STATUS_NAMES, Broken, Record, RecordKind, Stats
from viommud.log import RateLimiter, configure
from viommud.report import BROKEN_REASONS, ENDPOINTS_REMEMBERED, Reporter, feature_names
from viommud.settings import Settings


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Logging is set up for the whole process: put it back."""
    yield
    structlog.reset_defaults()


def test_json_where_nobody_reads_it() -> None:
    """One object a line, with time, level and event first."""
    stream = io.StringIO()
    log = configure("info", "auto", stream)
    log.warning("something", number=3)
    log.debug("nothing")
    line = json.loads(stream.getvalue())
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["level"], line["event"], line["number"]) == ("warning", "something", 3)
    assert line["timestamp"].endswith("Z")


def test_text_on_a_terminal() -> None:
    """Readable, and JSON only when asked for."""
    stream = Terminal()
    configure("debug", "auto", stream).debug("something", number=3)
    assert "something" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())
    stream = Terminal()
    configure("debug", "json", stream).debug("something", number=3)
    assert json.loads(stream.getvalue())["number"] == 3


def test_console_into_a_file_has_no_colours() -> None:
    """Escape sequences are for terminals."""
    stream = io.StringIO()
    configure("info", "console", stream).info("something", number=3)
    assert "\x1b" not in stream.getvalue()


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    """A full disk, a closed pipe, a closed stream."""

    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    configure("info", "json", Full()).info("lost")
    closed = io.StringIO()
    log = configure("info", "json", closed)
    closed.close()
    log.info("lost")


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from("ab")), max_size=200))
def test_every_line_is_written_or_counted(events: list[tuple[float, str]]) -> None:
    """Whatever comes when: lines written plus lines told of as left out are all lines."""
    clock = Clock()
    limiter = RateLimiter(burst=3, interval=10, clock=clock)
    written = told = 0
    for wait, kind in events:
        clock.now += wait
        for _, count in limiter.overdue():
            told += count
        extra = limiter.admit(kind)
        if extra is not None:
            written += 1
            told += extra.get("left_out", 0)
    told += sum(count for _, count in limiter.overdue(everything=True))
    assert written + told == len(events)
    assert not limiter.pending


def test_a_flood_is_bounded_by_time() -> None:
    """A burst at once, then one line an interval."""
    clock = Clock()
    limiter = RateLimiter(burst=5, interval=10, clock=clock)
    written = 0
    for _ in range(100_000):
        clock.now += 0.001
        written += limiter.admit("flood") is not None
    assert 5 <= written <= 5 + 100 / 10 + 1
    assert limiter.pending


def test_silence_after_a_flood_is_told_once() -> None:
    """When nothing more comes, the count comes alone."""
    clock = Clock()
    limiter = RateLimiter(burst=1, interval=10, clock=clock)
    for _ in range(8):
        limiter.admit("flood")
    assert limiter.overdue() == []
    clock.now += 11
    assert limiter.overdue() == [("flood", 7)]
    assert limiter.overdue() == []


class Source:
    """Stands where the engine does: records to take."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.waiting: list[Record] = []
        self.lost = 0

    def take_records(self, limit: int = 256) -> tuple[list[Record], int]:
        """As the engine's."""
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        lost, self.lost = self.lost, 0
        return taken, lost

    def stats(self) -> Stats:
        """Not asked for here."""
        raise NotImplementedError


def record(kind: RecordKind, **fields: int) -> Record:
    """A record with what matters."""
    return Record(
        kind, **({"type": 0, "code": 0, "endpoint": 0, "domain": 0, "value": 0, "first": 0, "last": 0} | fields)
    )


@pytest.fixture
def lines() -> LogCapture:
    """What is logged."""
    return LogCapture()


def report(source: Source, lines: LogCapture) -> Reporter:
    """Drain a source once."""
    log = structlog.wrap_logger(None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger(0))
    reporter = Reporter(source, log, clock=Clock())
    reporter.drain()
    return reporter


def test_every_kind_of_refusal_has_its_own_allowance(lines: LogCapture) -> None:
    """A flood of one does not hide another; what it says fits the request."""
    source = Source()
    source.waiting = [record(RecordKind.REFUSED, type=3, code=4, domain=7, first=0x1000, last=0x1FFF)] * 100
    source.waiting += [record(RecordKind.REFUSED, type=1, code=6, endpoint=0x10, domain=7)]
    source.waiting += [record(RecordKind.REFUSED, type=0, code=9)]
    reporter = report(source, lines)
    maps = [line for line in lines.entries if line["request"] == "map"]
    assert 0 < len(maps) < 10
    assert maps[0]["range"] == "0x1000-0x1fff"
    attach, unknown = lines.entries[-2:]
    assert (attach["request"], attach["status"], attach["endpoint"]) == ("attach", "noent", "00:02.0")
    assert (unknown["request"], unknown["status"]) == ("unknown", "unanswered")
    reporter.tell_left_out(everything=True)
    assert lines.entries[-1]["left_out"] == 100 - len(maps)


def test_every_refusal_can_be_told(lines: LogCapture) -> None:
    """No combination of type and status lacks a name."""
    source = Source()
    source.waiting = [
        record(RecordKind.REFUSED, type=kind, code=status)
        for kind in range(len(REQUEST_NAMES))
        for status in range(1, len(STATUS_NAMES))
        if STATUS_NAMES[status] != "nomem"
    ]
    count = len(source.waiting)
    report(source, lines)
    assert len(lines.entries) == count


def test_every_broken_ring_can_be_told(lines: LogCapture) -> None:
    """No reason lacks a sentence; each ring has its name."""
    assert set(BROKEN_REASONS) == set(Broken)
    source = Source()
    source.waiting = [record(RecordKind.BROKEN, type=ring, code=Broken.LOOP) for ring in (0, 1)]
    report(source, lines)
    assert [line["ring"] for line in lines.entries] == ["request", "event"]


def test_lost_records_are_told(lines: LogCapture) -> None:
    """What the engine could not keep is counted, not forgotten."""
    source = Source()
    source.lost = 12
    assert report(source, lines).records_lost == 12
    assert lines.entries == [{"event": "records-lost", "lost": 12, "log_level": "warning"}]


def test_attached_endpoints_are_kept_for_the_summary_and_not_logged(lines: LogCapture) -> None:
    """A bounded number of them."""
    source = Source()
    source.waiting = [record(RecordKind.ATTACHED, endpoint=n) for n in range(1000)] + [record(RecordKind.DETACHED)]
    reporter = report(source, lines)
    assert len(reporter.endpoints_seen) == ENDPOINTS_REMEMBERED
    assert lines.entries == []


def test_a_guest_that_never_stops_does_not_keep_the_control_plane(lines: LogCapture) -> None:
    """One drain takes a bounded number of records."""

    class Endless(Source):
        def take_records(self, limit: int = 256) -> tuple[list[Record], int]:
            return [record(RecordKind.DETACHED)] * limit, 0

    report(Endless(), lines)


def test_feature_names() -> None:
    """Known ones by name, others by number."""
    assert feature_names(1 << 2 | 1 << 32 | 1 << 40) == ["MAP_UNMAP", "VERSION_1", "bit 40"]
