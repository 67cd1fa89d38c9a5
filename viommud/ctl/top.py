"""`viommuctl top`: what a VM's IOMMU is doing, second by second."""

from __future__ import annotations

import select
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from viommud.ctl.client import MONITOR, Client
from viommud.ctl.text import nanoseconds, paint, seconds, size, table

ROWS = 8
"""Endpoints and domains shown."""
EVENTS = 5


@dataclass(frozen=True, slots=True)
class Look:
    """Everything at one moment."""

    at: float
    status: dict[str, Any]
    counters: dict[str, Any]
    times: dict[str, Any]
    limits: list[dict[str, Any]]
    endpoints: list[dict[str, Any]]
    domains: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    refused: list[dict[str, Any]]


def look(client: Client) -> Look:
    """Ask the daemon."""
    counters = client.call(f"{MONITOR}.GetCounters")
    return Look(
        time.monotonic(),
        client.call(f"{MONITOR}.GetStatus"),
        counters["counters"],
        counters["times"],
        client.call(f"{MONITOR}.GetLimits")["limits"],
        client.call(f"{MONITOR}.ListEndpoints", limit=ROWS)["endpoints"],
        client.call(f"{MONITOR}.ListDomains", limit=ROWS)["domains"],
        client.call(f"{MONITOR}.ListFaults")["faults"],
        client.call(f"{MONITOR}.ListRefused")["refused"],
    )


def percentile(times: dict[str, Any], before: dict[str, Any] | None, part: float) -> int | None:
    """Of the requests timed between two looks; of all, where none was in between."""
    earlier = {entry["below_ns"]: entry["count"] for entry in before["buckets"]} if before else {}
    added = [(entry["below_ns"], entry["count"] - earlier.get(entry["below_ns"], 0)) for entry in times["buckets"]]
    total = sum(count for _, count in added)
    if total <= 0:
        whole: int | None = times["p50_ns"] if part == 0.5 else times["p99_ns"]
        return whole
    seen = 0
    for below, count in added:
        seen += count
        if seen >= part * total:
            return int(below)
    return None


def _sums(counters: dict[str, Any]) -> dict[str, int]:
    return {name: sum(by_status.values()) for name, by_status in counters["requests"].items()}


def render(now: Look, before: Look | None, *, colours: bool) -> list[str]:
    """Lines of the screen."""
    passed = now.at - before.at if before else now.status["seconds"] or 1.0
    counters, old = now.counters, before.counters if before else None

    def rate(name: str) -> float:
        return float(counters[name] - (old[name] if old else 0)) / passed

    session = now.status["session"]
    state = "paused" if now.status["paused"] else "serving" if session else "waiting for a front-end"
    if now.status["needs_reset"]:
        state += ", a ring is broken"
    memory = f", guest memory {size(session['memory_bytes'])}" if session else ""
    busy, spin = rate("busy_ns") / 1e7, rate("spin_ns") / 1e7
    lines = [
        paint(
            f"viommud {now.status['version']}  pid {now.status['pid']}  up {seconds(now.status['seconds'])}  {state}",
            "bold",
            colours,
        )
        + memory,
        f"worker {busy:5.1f}% busy {spin:5.1f}% polling   kicks/s {rate('kicks'):.0f}   "
        f"interrupts/s {rate('notifications'):.0f}   batches/s {rate('batches'):.0f}",
    ]
    sums, old_sums = _sums(counters), _sums(old) if old else {}
    requests = {name: (sums[name] - old_sums.get(name, 0)) / passed for name in sums}
    batches = counters["batches"] - (old["batches"] if old else 0)
    per_batch = sum(sums.values()) - sum(old_sums.values())
    lines.append(
        "requests/s  "
        + ("  ".join(f"{name} {value:.0f}" for name, value in requests.items()) or "none")
        + f"   per batch {per_batch / batches if batches else 0:.1f}"
    )
    earlier = before.times if before else None
    lines.append(
        f"service time  p50 {nanoseconds(percentile(now.times, earlier, 0.5))}  "
        f"p99 {nanoseconds(percentile(now.times, earlier, 0.99))}"
    )
    refused = {
        f"{name} {status}": count
        for name, by_status in counters["requests"].items()
        for status, count in by_status.items()
        if status != "ok"
    }
    if refused:
        text = "  ".join(f"{name} {count}" for name, count in refused.items())
        lines.append(paint(f"refused so far  {text}", "yellow", colours))
    lines.append("")
    lines += _limits(now.limits, colours)
    lines.append("")
    lines += table(
        ["ENDPOINT", "DOMAIN", "BYPASS", "FAULTS"],
        [
            (entry["name"], entry["domain"], "yes" if entry["bypass"] else "", entry["faults"])
            for entry in now.endpoints
        ],
        right=(1, 3),
    )
    lines.append("")
    lines += table(
        ["DOMAIN", "ENDPOINTS", "MAPPINGS", "KIND"],
        [
            (entry["id"], entry["endpoints"], entry["mappings"], "bypass" if entry["bypass"] else "")
            for entry in now.domains
        ],
        right=(0, 1, 2),
    )
    tail = sorted([*now.faults, *now.refused], key=lambda event: str(event["time"]))[-EVENTS:]
    if tail:
        lines += ["", "last faults and refused requests", *(f"  {event_line(event)}" for event in tail)]
    return lines


def _limits(limits: list[dict[str, Any]], colours: bool) -> list[str]:
    lines = []
    for limit in limits:
        if limit["used"] is None:
            continue
        part = limit["used"] / limit["max"]
        bar = "#" * round(part * 20)
        colour = "red" if part > 0.9 else "yellow" if part > 0.7 else "green"
        lines.append(f"{limit['name']:10} [{paint(f'{bar:20}', colour, colours)}] {limit['used']} of {limit['max']}")
    return lines


def event_line(event: dict[str, Any]) -> str:
    """One event in one line."""
    fields = {key: value for key, value in event.items() if key not in ("time", "kind") and value is not None}
    words = [str(fields.pop(key)) for key in ("request", "status", "reason") if key in fields]
    first, last = fields.pop("first", None), fields.pop("last", None)
    if first is not None:
        words.append(first if last is None else f"{first}-{last}")
    words += [f"{key} {value}" for key, value in fields.items()]
    return f"{event['time'][11:23]} {event['kind']:8} {' '.join(words)}"


@contextmanager
def _screen() -> Iterator[None]:
    """The terminal's other screen, and keys as they are typed."""
    import termios
    import tty

    keys = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        if keys is not None:
            tty.setcbreak(sys.stdin)
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        if keys is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, keys)


def run(client: Client, *, interval: float, once: bool, colours: bool) -> None:
    """Show it until q is pressed; or once."""
    before: Look | None = None
    if once:
        print("\n".join(render(look(client), None, colours=colours)))
        return
    with _screen():
        while True:
            now = look(client)
            rows = shutil.get_terminal_size().lines
            lines = render(now, before, colours=colours)[: rows - 1]
            sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
            sys.stdout.flush()
            before = now
            if sys.stdin.isatty():
                if select.select([sys.stdin], [], [], interval)[0] and sys.stdin.read(1) in ("q", "Q"):
                    return
            else:
                time.sleep(interval)
