"""Text for a terminal: tables, numbers with units, colours where they are seen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

RESET = "\x1b[0m"
COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "grey": 90, "bold": 1}


def colours_wanted(stream: object = None) -> bool:
    """Is the output seen by somebody who wants colours (no-color.org)?"""
    target = sys.stdout if stream is None else stream
    return not os.environ.get("NO_COLOR") and bool(getattr(target, "isatty", bool)())


def paint(text: str, colour: str, on: bool) -> str:
    """Text in a colour."""
    return f"\x1b[{COLOURS[colour]}m{text}{RESET}" if on and colour else text


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> list[str]:
    """Lines of a table; `right` are columns of numbers."""
    body = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *body]) for column in range(len(head))]
    to_right = set(right)

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column in to_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return [line(list(head)), *map(line, body)]


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1024 or unit == "PiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes everything")


def nanoseconds(count: int | None) -> str:
    """A time with a unit."""
    if count is None:
        return "-"
    for unit, per in (("ns", 1), ("us", 1_000), ("ms", 1_000_000)):
        if count < per * 1000:
            return f"{count / per:.3g} {unit}"
    return f"{count / 1e9:.3g} s"


def seconds(count: float) -> str:
    """A duration in the two units that say most."""
    whole = int(count)
    for unit, per, smaller, smaller_per in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= per:
            return f"{whole // per}{unit} {whole % per // smaller_per}{smaller}"
    return f"{count:.1f}s"
