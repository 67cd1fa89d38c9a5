"""viommuctl's drawings and words."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommud.ctl import top
from viommud.ctl.map_view import Span, cells, draw, kind_of, merge, svg, windows
from viommud.ctl.parser import build_parser
from viommud.ctl.text import nanoseconds, seconds, size, table

PAGE = 0x1000


@st.composite
def address_spaces(draw: st.DrawFn) -> list[Span]:
    """Spans apart from each other, in order."""
    at = draw(st.integers(0, 1 << 40))
    spans = []
    for hole, length in draw(st.lists(st.tuples(st.integers(0, 1 << 45), st.integers(1, 1 << 30)), max_size=30)):
        spans.append(Span(at + hole, at + hole + length - 1, draw(st.sampled_from(["rw", "r", "mmio", "reserved"]))))
        at += hole + length
    return spans


@given(address_spaces())
def test_nothing_is_lost_in_windows(spans: list[Span]) -> None:
    """Every span is in exactly one window; windows are in order and apart."""
    found = windows(spans)
    assert [span for window in found for span in window.spans] == spans
    for one, other in itertools.pairwise(found):
        assert one.last < other.first - 1


@given(address_spaces(), st.integers(1, 200))
def test_what_is_mapped_is_seen(spans: list[Span], width: int) -> None:
    """A window's first and last cell are never empty, and there are as many cells as asked for, or bytes."""
    for window in windows(spans):
        row = cells(window, width)
        assert len(row) == min(width, window.last - window.first + 1)
        assert row[0] == window.spans[0].kind or len(window.spans) > 1
        assert row[0] != "hole"
        assert row[-1] != "hole"


@given(address_spaces())
def test_a_picture_is_xml(spans: list[Span]) -> None:
    """With a box for every span."""
    root = ElementTree.fromstring(svg(spans, "domain <1> & more"))
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [f"{span.first:#x}-{span.last:#x} {span.kind}" for span in spans]


def test_a_million_pages_are_one_bar() -> None:
    """Neighbours of one kind are drawn together; others are not."""
    pages = (Span(page * PAGE, page * PAGE + PAGE - 1, "rw") for page in range(1_000_000))
    assert list(merge(pages)) == [Span(0, 1_000_000 * PAGE - 1, "rw")]
    apart = [Span(0, 1, "rw"), Span(2, 3, "r"), Span(5, 6, "r")]
    assert list(merge(apart)) == apart


def test_holes_are_folded() -> None:
    """Two bars with what lies between them told, and a legend."""
    lines = draw([Span(0, 0xFFF, "rw"), Span(1 << 40, (1 << 40) + 0xFFF, "reserved")], width=80, colours=False)
    assert [line for line in lines if "unmapped" in line] == [f"{'':18} ┆ 1024 GiB unmapped"]
    assert lines[-1] == "█ rw  / reserved"
    assert "\x1b" not in "".join(lines)
    assert "\x1b[32m" in "".join(draw([Span(0, 1, "rw")], width=80, colours=True))
    assert draw([], width=80, colours=False) == ["nothing is mapped"]


@pytest.mark.parametrize(
    ("flags", "kind"), [((1, 1, 0), "rw"), ((1, 0, 0), "r"), ((0, 1, 0), "w"), ((0, 0, 0), "-"), ((1, 1, 1), "mmio")]
)
def test_kinds(flags: tuple[int, int, int], kind: str) -> None:
    """What a mapping allows, as it is drawn."""
    assert kind_of(*map(bool, flags)) == kind


def test_numbers() -> None:
    """With the unit that fits."""
    assert [size(n) for n in (0, 1023, 1024, 1 << 40, 3 << 60)] == ["0 B", "1023 B", "1 KiB", "1 TiB", "3072 PiB"]
    assert [nanoseconds(n) for n in (None, 0, 999, 1500, 2_000_000, 3_000_000_000)] == [
        "-",
        "0 ns",
        "999 ns",
        "1.5 us",
        "2 ms",
        "3 s",
    ]
    assert [seconds(n) for n in (1.5, 61, 3_660, 90_000)] == ["1.5s", "1m 1s", "1h 1m", "1d 1h"]
    assert table(["A", "LONG"], [("x", 1), (None, 200)], right=(1,)) == ["A  LONG", "x     1", "    200"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["translate", "00:02.0", "4096x"], "'4096x' is not an address"),
        (["translate", "00:99.0", "0"], "'00:99.0' is not an endpoint"),
        (["translate", "1-2", "0"], "'1-2' is not an endpoint"),
        (["map", "-1"], "'-1' is not the ID of a domain"),
        (["inject", "delay", "5"], "'5' is not a time from 1us to 600s"),
        (["inject", "delay", "601s"], "'601s' is not a time"),
        (["inject", "drop", "--count", "0"], "'0' is not a number from 1 on"),
        (["inject", "status", "bad"], "invalid choice: 'bad'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["--vm", "a", "--socket", "b", "status"], "not allowed with argument"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What, and what is allowed; status 2."""
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_values() -> None:
    """As they are written, and as the daemon wants them."""
    parsed = build_parser().parse_args(["translate", "01:00.1", "4096"])
    assert (parsed.endpoint, parsed.address) == (0x101, "0x1000")
    assert build_parser().parse_args(["translate", "0x10", "0"]).endpoint == 16
    assert build_parser().parse_args(["inject", "delay", "1.5ms"]).delay == 1500


def look(at: float, maps: int, buckets: list[dict[str, int]]) -> top.Look:
    """What a daemon says at a moment."""
    counters: dict[str, Any] = dict.fromkeys(("kicks", "notifications", "batches", "busy_ns", "spin_ns"), 0)
    counters |= {"requests": {"map": {"ok": maps, "inval": 1}}, "batches": maps // 10}
    status = {"version": "1", "pid": 1, "seconds": 5.0, "session": None, "paused": False, "needs_reset": False}
    times = {"p50_ns": 1, "p99_ns": 2, "buckets": buckets}
    limits = [{"name": "mappings", "used": 95, "peak": 95, "max": 100}]
    refused = [
        {"time": "2026-01-01T10:00:00.000Z", "kind": "refused", "request": "map", "status": "inval", "domain": 1}
    ]
    return top.Look(at, status, counters, times, limits, [], [], [], refused)


def test_top_shows_rates_between_two_looks() -> None:
    """Not sums; percentiles of what was timed in between; the last refused request."""
    first = look(10.0, 1000, [{"below_ns": 512, "count": 1000}])
    second = look(12.0, 3000, [{"below_ns": 512, "count": 1000}, {"below_ns": 4096, "count": 100}])
    text = "\n".join(top.render(second, first, colours=False))
    assert "map 1000 " in text
    assert "per batch 10.0" in text
    assert re.search(r"p50 4.1 us +p99 4.1 us", text)
    assert "95 of 100" in text
    assert "10:00:00.000 refused  map inval domain 1" in text
    assert "p50 1 ns" in "\n".join(top.render(look(11.0, 1000, first.times["buckets"]), first, colours=False))
