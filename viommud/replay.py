"""`viommud replay`: play a recording to an engine of its own, and compare what it answers."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from viommud.engine import REQUEST_NAMES, STATUS_NAMES, Engine
from viommud.errors import UsageError
from viommud.recording import Header, read_chunks, read_header, unpack

DIFFERENCES_SHOWN = 10
EXIT_DIFFERENT = 1


def add_command(commands: Any) -> None:
    """viommud replay."""
    parser = commands.add_parser(
        "replay",
        help="play recorded requests to an engine, and compare the answers",
        description="Play what `viommuctl record` recorded to an engine without a guest, and compare the answers.",
        epilog="Exit status: 0; 1 when an answer was another; 2 for a file that is no recording.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the recording")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Play it; returns the exit status.

    :raises UsageError: the file cannot be read, or is no recording.
    """
    try:
        with options.file.open("rb") as file:
            header = read_header(file, options.file)
            with _engine(header, options.file) as engine:
                result = _play(engine, file, options.file)
    except OSError as error:
        raise UsageError(f"{options.file}: {error.strerror}") from error
    result["complete"] = header.complete
    if options.json:
        print(json.dumps(result))
    else:
        _tell(result)
    return EXIT_DIFFERENT if result["different"] else 0


def _engine(header: Header, path: Path) -> Engine:
    try:
        engine = Engine(header.made_settings())
        for entry in header.endpoints:
            engine.add_endpoints(entry.first, entry.last, entry.regions())
    except ValueError as error:
        raise UsageError(f"{path}: the header of the recording makes no sense: {error}") from error
    return engine


def _play(engine: Engine, file: Any, path: Path) -> dict[str, Any]:
    requests: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    count = different = lost = busy_ns = 0
    for chunk in read_chunks(file, path):
        began = time.perf_counter_ns()
        try:
            statuses = engine.instruments.play(chunk)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        busy_ns += time.perf_counter_ns() - began
        for entry, status in zip(unpack(chunk), statuses, strict=True):
            lost += entry.lost
            if not entry.is_request:
                continue
            count += 1
            name = REQUEST_NAMES[entry.kind]
            requests[f"{name} {STATUS_NAMES[status]}"] += 1
            if status != entry.status:
                different += 1
                if len(shown) < DIFFERENCES_SHOWN:
                    was, now = STATUS_NAMES[entry.status], STATUS_NAMES[status]
                    shown.append({"request": count, "type": name, "was": was, "now": now})
    return {
        "requests": count,
        "different": different,
        "lost": lost,
        "answers": dict(requests),
        "differences": shown,
        "ns_per_request": round(busy_ns / count, 1) if count else None,
        "mappings": engine.stats().mappings,
    }


def _tell(result: dict[str, Any]) -> None:
    print(f"{result['requests']} requests, {result['ns_per_request']} ns each")
    for name, count in result["answers"].items():
        print(f"  {name}: {count}")
    if not result["complete"]:
        print("The recording begins in the middle of a guest's life: what was before it is missing here.")
    if result["lost"]:
        print(f"{result['lost']} entries are missing: they came faster than they were read.")
    for entry in result["differences"]:
        print(f"request {entry['request']}, {entry['type']}: was {entry['was']}, is {entry['now']}")
    print(f"{result['different']} answers differ")
