"""A domain's address space, drawn: windows with mappings as bars, the holes between them folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from viommud.ctl.text import paint, size

FOLD = 4
"""A hole is drawn to scale while it is no longer than this many times what lies before it."""
CELLS = {"rw": "█", "r": "▓", "w": "▒", "-": "░", "mmio": "◆", "reserved": "/", "hole": " "}
COLOURS = {"rw": "green", "r": "cyan", "w": "yellow", "-": "grey", "mmio": "magenta", "reserved": "red", "hole": ""}
SVG_COLOURS = {"rw": "#2e9e4f", "r": "#2a9fd6", "w": "#d6a02a", "-": "#999999", "mmio": "#a04fc0"}


@dataclass(frozen=True, slots=True)
class Span:
    """Addresses of one kind, both ends inside."""

    first: int
    last: int
    kind: str

    @property
    def length(self) -> int:
        """Bytes."""
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Window:
    """Spans that are drawn to one scale."""

    spans: tuple[Span, ...]

    @property
    def first(self) -> int:
        """First address."""
        return self.spans[0].first

    @property
    def last(self) -> int:
        """Last address."""
        return self.spans[-1].last


def kind_of(read: bool, write: bool, mmio: bool) -> str:
    """How a mapping is drawn."""
    return "mmio" if mmio else {(True, True): "rw", (True, False): "r", (False, True): "w"}.get((read, write), "-")


def merge(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans in order; neighbours of one kind become one, so that a million pages are drawn as fast as one."""
    before: Span | None = None
    for span in spans:
        if before is not None and span.kind == before.kind and span.first == before.last + 1:
            before = Span(before.first, span.last, span.kind)
        else:
            if before is not None:
                yield before
            before = span
    if before is not None:
        yield before


def windows(spans: Sequence[Span]) -> list[Window]:
    """Spans gathered into windows: where a hole is long beside what lies around it, a new one begins."""
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.first):
        if found:
            here = found[-1]
            hole = span.first - here[-1].last - 1
            around = here[-1].last - here[0].first + 1 + span.length
            if hole <= FOLD * around:
                here.append(span)
                continue
        found.append([span])
    return [Window(tuple(here)) for here in found]


def cells(window: Window, width: int) -> list[str]:
    """The kind that fills most of each of `width` equal parts of a window."""
    length = window.last - window.first + 1
    width = min(width, length)
    kinds = []
    position = 0
    for cell in range(width):
        start = window.first + length * cell // width
        end = window.first + length * (cell + 1) // width - 1
        share: dict[str, int] = {}
        while position < len(window.spans) and window.spans[position].last < start:
            position += 1
        look = position
        while look < len(window.spans) and window.spans[look].first <= end:
            span = window.spans[look]
            share[span.kind] = share.get(span.kind, 0) + min(end, span.last) - max(start, span.first) + 1
            look += 1
        # However small, what is there is seen: only an empty cell is a hole.
        kinds.append(max(share, key=lambda kind: share[kind]) if share else "hole")
    return kinds


def draw(spans: Sequence[Span], *, width: int, colours: bool) -> list[str]:
    """Lines for a terminal."""
    lines = []
    drawn = windows(spans)
    bar = max(8, width - 44)
    for number, window in enumerate(drawn):
        if number:
            lines.append(f"{'':18} ┆ {size(window.first - drawn[number - 1].last - 1)} unmapped")
        text = "".join(paint(CELLS[kind], COLOURS[kind], colours) for kind in cells(window, bar))
        lines.append(f"{window.first:#018x} │{text}│ {window.last:#x}  {size(window.last - window.first + 1)}")
    names = {span.kind for span in spans}
    legend = [f"{paint(CELLS[kind], COLOURS[kind], colours)} {kind}" for kind in CELLS if kind in names]
    return [*lines, "", "  ".join(legend)] if lines else ["nothing is mapped"]


def svg(spans: Sequence[Span], title: str) -> str:
    """A picture for a bug report, in SVG."""
    drawn = windows(spans)
    width, left, row = 900, 170, 46
    height = 60 + row * max(len(drawn), 1) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 190}" height="{height}" '
        'font-family="monospace" font-size="12">',
        '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" fill="#fbe3e3"/>'
        '<line x1="0" y1="0" x2="0" y2="6" stroke="#c33" stroke-width="2"/></pattern></defs>',
        f'<text x="10" y="24" font-size="15">{escape(title)}</text>',
    ]
    for number, window in enumerate(drawn):
        top = 44 + row * number
        scale = width / (window.last - window.first + 1)
        if number:
            hole = size(window.first - drawn[number - 1].last - 1)
            out.append(f'<text x="{left}" y="{top - 6}" fill="#777">┆ {hole} unmapped</text>')
        out.append(f'<text x="10" y="{top + 18}">{window.first:#x}</text>')
        out.append(
            f'<rect x="{left}" y="{top}" width="{width}" height="26" fill="white" stroke="#bbb" stroke-width="1"/>'
        )
        for span in window.spans:
            fill = SVG_COLOURS.get(span.kind, "url(#hatch)")
            out.append(
                f'<rect x="{left + (span.first - window.first) * scale:.2f}" y="{top}" '
                f'width="{max(span.length * scale, 0.5):.2f}" height="26" fill="{fill}">'
                f"<title>{span.first:#x}-{span.last:#x} {span.kind}</title></rect>"
            )
        out.append(f'<text x="{left + width + 10}" y="{top + 18}">{window.last:#x}</text>')
    if not drawn:
        out.append('<text x="10" y="60">nothing is mapped</text>')
    for number, kind in enumerate(sorted({span.kind for span in spans})):
        x = left + 110 * number
        fill = SVG_COLOURS.get(kind, "url(#hatch)")
        out.append(f'<rect x="{x}" y="{height - 24}" width="14" height="14" fill="{fill}"/>')
        out.append(f'<text x="{x + 20}" y="{height - 12}">{kind}</text>')
    return "\n".join([*out, "</svg>", ""])
