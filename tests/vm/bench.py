"""scripts/bench guest: what a MAP and an UNMAP cost a Linux guest, behind viommud and behind QEMU's own device.

Both are run in turn, boot by boot, with the same kernel on the same machine, and only the ratios mean anything:

    vfio    pages mapped and unmapped through VFIO, by the guest's own driver
    raw     the request queue played by a program: one request at a time, and batches of 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from integration.daemon import Daemon

from vm import guest
from vm.archive import ArchiveError
from vm.guest import IOMMU, Shape
from vm.programs import BuildError
from vm.qemu import QemuError

ENDPOINT = "00:02.0"
DEVICE = {ENDPOINT: "edu"}
ENDPOINT_ID = 0x10
IMPLEMENTATIONS: Sequence[Literal["qemu", "viommud"]] = ("qemu", "viommud")
PROGRAMS = {
    "vfio": f"vfio_map -n 2000 -r 3 0000:{ENDPOINT}",
    "raw": f"raw_queue -n 4992 -r 3 0000:{IOMMU} {ENDPOINT_ID:#x}",
}
Samples = dict[str, dict[str, list[float]]]
"""By figure, by implementation: one number for each round of each boot."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench guest", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--boots", type=int, default=3, metavar="N", help="boots of each (%(default)s)")
    options = parser.parse_args(arguments)
    if options.boots < 1:
        parser.error(f"--boots {options.boots}: at least 1")
    samples: Samples = {}
    try:
        for boot in range(options.boots):
            for implementation in IMPLEMENTATIONS:
                for name in PROGRAMS:
                    print(f"bench: boot {boot + 1} of {options.boots}: {name}, {implementation}", file=sys.stderr)
                    _collect(samples, implementation, name, _measure(implementation, name))
    except (QemuError, ArchiveError, BuildError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    report = _report(samples)
    _show(samples, report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _measure(implementation: str, name: str) -> list[dict[str, float]]:
    """One boot, one program: the numbers of its rounds."""
    program = PROGRAMS[name].split()[0]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="viommud-bench-")))
        mine = implementation == "viommud"
        shape = Shape(iommu="vhost-user" if mine else "qemu", devices=DEVICE, programs=(program,))
        daemon = stack.enter_context(Daemon(directory, config=shape.config())) if mine else None
        linux = stack.enter_context(guest.start(directory, shape, daemon.socket_path if daemon else None))
        if name == "vfio":
            linux.load()
            linux.check(f"bind vfio-pci 0000:{ENDPOINT}")
        results = linux.check(PROGRAMS[name]).results()
        if any(result.get("bad") for result in results):
            raise QemuError(f"{implementation} refused requests of {name}: {results}")
        linux.power_off()
        return results


def _collect(samples: Samples, implementation: str, name: str, results: Iterable[dict[str, float]]) -> None:
    for result in results:
        for key, value in result.items():
            if key.endswith("_us"):
                samples.setdefault(f"{name}.{key}", {}).setdefault(implementation, []).append(value)


def _report(samples: Samples) -> dict[str, dict[str, object]]:
    """The medians and their ratios."""

    def both(*figures: str) -> dict[str, float]:
        return {
            implementation: round(
                statistics.median(value for figure in figures for value in samples[figure][implementation]), 3
            )
            for implementation in IMPLEMENTATIONS
        }

    def ratio(costs: dict[str, float]) -> float:
        return round(costs["viommud"] / costs["qemu"], 3)

    mapping, unmapping = both("vfio.map_us"), both("vfio.unmap_us")
    single = both("raw.single_map_us", "raw.single_unmap_us")
    batch = both("raw.batch_map_us", "raw.batch_unmap_us")
    return {
        "vfio": {
            "map_us": mapping,
            "unmap_us": unmapping,
            "map_ratio": ratio(mapping),
            "unmap_ratio": ratio(unmapping),
        },
        "raw": {
            "single_us": single,
            "single_ratio": ratio(single),
            "batch_us": batch,
            "batch_ratio": ratio(batch),
        },
    }


def _show(samples: Samples, report: dict[str, dict[str, object]]) -> None:
    print(f"{'microseconds a request':<26}{'QEMU':>20}{'viommud':>22}")
    for figure, costs in samples.items():
        spread = [
            f"{statistics.median(costs[which]):8.2f} ({min(costs[which]):.2f}-{max(costs[which]):.2f})"
            for which in IMPLEMENTATIONS
        ]
        print(f"{figure:<26}{spread[0]:>22}{spread[1]:>22}")
    for part in report.values():
        for key, value in part.items():
            if key.endswith("_ratio"):
                print(f"{key.removesuffix('_ratio')}: viommud takes {value} of what QEMU's own device takes")


if __name__ == "__main__":
    sys.exit(main())
