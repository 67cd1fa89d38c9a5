#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the engine benchmark, print a table, and write the figures as JSON.

Every figure is the median of several runs of bench_engine or, for the reference, of bench_engine_gtree: the same
ring, worker and requests with the mappings kept as QEMU keeps them. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SIZES = (1_000, 64_000, 1_000_000)
PATTERNS = ("sequential", "random")
LATENCIES = ("asleep", "eventfd_floor", "spinning", "spin_floor")


def run(program: Path, *arguments: str) -> dict[str, float]:
    """Run a benchmark program and return the one JSON object that it prints."""
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, check=True, timeout=300)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure_mappings(build: Path, rounds: int) -> tuple[dict[str, dict[str, dict[str, float]]], float]:
    """Measure ns per request for each number of live mappings, and the most bytes a mapping cost among a million."""
    mappings: dict[str, dict[str, dict[str, float]]] = {}
    most_bytes = 0.0
    print(f"{'live mappings':>13}  {'addresses':<10}  {'viommud':>9}  {'reference':>9}   ns per request")
    for size in SIZES:
        mappings[str(size)] = {}
        for pattern in PATTERNS:
            ours, reference = [], []
            for _ in range(rounds):
                figures = run(build / "bench_engine", "mappings", str(size), pattern)
                ours.append(figures["ns"])
                reference.append(run(build / "bench_engine_gtree", "mappings", str(size), pattern)["ns"])
                if size == max(SIZES):
                    most_bytes = max(most_bytes, figures["bytes_per_mapping"])
            row = {
                "viommud_ns": round(statistics.median(ours), 1),
                "reference_ns": round(statistics.median(reference), 1),
            }
            mappings[str(size)][pattern] = row
            print(f"{size:>13}  {pattern:<10}  {row['viommud_ns']:>9}  {row['reference_ns']:>9}", flush=True)
    return mappings, most_bytes


def measure_latency(build: Path, rounds: int) -> dict[str, float]:
    """Measure microseconds from the kick until the answer is seen, and the floors beside them."""
    figures = [run(build / "bench_engine", "latency") for _ in range(rounds)]
    return {name: round(statistics.median(figure[name] for figure in figures), 3) for name in LATENCIES}


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="scripts/bench engine", description="Measure the C engine alone.")
    parser.add_argument("--build", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each measurement (default 3)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be at least 1")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no directory {arguments.json.parent}")

    mappings, bytes_per_mapping = measure_mappings(arguments.build, arguments.rounds)
    latency = measure_latency(arguments.build, arguments.rounds)
    largest = mappings[str(max(SIZES))]["random"]
    smallest = mappings[str(min(SIZES))]["random"]
    print(f"bytes per mapping, of a million: {bytes_per_mapping}")
    print(
        f"a million random mappings: {largest['reference_ns'] / largest['viommud_ns']:.1f} times the reference's "
        f"speed, {largest['viommud_ns'] / smallest['viommud_ns']:.1f} times the cost of a thousand"
    )
    for subject, floor in (("asleep", "eventfd_floor"), ("spinning", "spin_floor")):
        ratio = latency[subject] / latency[floor]
        print(f"kick to used, {subject}: {latency[subject]} us, {ratio:.2f} times the floor of {latency[floor]} us")
    if arguments.json:
        report = {"mappings": mappings, "bytes_per_mapping": bytes_per_mapping, "latency_us": latency}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
