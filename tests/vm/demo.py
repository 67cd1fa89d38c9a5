"""scripts/demo: a stock Linux guest behind viommud, and what was seen."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integration.daemon import LogLine

from vm import assets, backend, guest
from vm.archive import ArchiveError
from vm.guest import DEVICES, IOMMU, Guest, Shape
from vm.programs import BuildError
from vm.qemu import QemuError

PAGES = 2000
ROUNDS = 3
_WRONG = ("error", "fail", "unhandled", "warning", "bug:")


class NotSeenError(Exception):
    """Something that had to happen did not."""


def main() -> int:
    """Run it; the exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="viommud-demo-") as name:
        try:
            _demonstrate(Path(name))
        except (NotSeenError, QemuError, ArchiveError, BuildError) as error:
            print(f"demo: FAILED: {error}", file=sys.stderr)
            return 1
    print(f"\nAll of it was seen in the guest, {time.monotonic() - began:.1f} s in all.")
    return 0


def _demonstrate(directory: Path) -> None:
    shape = Shape()
    print("viommud serves a stock Linux guest")
    with backend.start(directory, config=shape.config()) as daemon:
        began = time.monotonic()
        with guest.start(directory, shape, daemon.socket_path) as linux:
            version = assets.emulator(shape.architecture).version
            _tell("guest", f"Linux {linux.release} on QEMU {version}, booted in {time.monotonic() - began:.1f} s")
            _attach(linux)
            _tell("now", f"mapping and unmapping {PAGES} pages through VFIO, {ROUNDS} times")
            costs = linux.check(f"vfio_map -n {PAGES} -r {ROUNDS} {_full(DEVICES)}").results()
            _expect(len(costs) == ROUNDS, f"{len(costs)} of {ROUNDS} rounds were finished")
            wrong = [line for line in linux.iommu_log() if any(word in line.lower() for word in _WRONG)]
            _expect(not wrong, "the guest's kernel complains:\n" + "\n".join(wrong))
            _expect(linux.power_off() == 0, "QEMU ended with an error")
        _expect(daemon.wait() == 0, f"viommud ended with an error:\n{daemon.log_text}")
    _summarise(daemon.log("session-ended")[-1], costs)


def _attach(linux: Guest) -> None:
    """The guest's driver takes the IOMMU, and attaches each device as vfio-pci takes it."""
    linux.load()
    driver = linux.run(f"readlink /sys/bus/pci/devices/0000:{IOMMU}/virtio*/driver").output.strip()
    _expect(driver.endswith("/virtio_iommu"), f"the driver of {IOMMU} is {driver or 'none'}, not virtio_iommu")
    linux.check(f"bind vfio-pci {_full(DEVICES)}")
    for where, kind in DEVICES.items():
        group = f"/sys/bus/pci/devices/0000:{where}/iommu_group"
        number = linux.check(f"readlink {group}").output.strip().rpartition("/")[2]
        kernels = linux.check(f"cat {group}/type").output.strip()
        _tell("attached", f"{where} ({kind}): IOMMU group {number}, domain of type {kernels}")


def _full(functions: Mapping[str, str]) -> str:
    return " ".join(f"0000:{where}" for where in functions)


def _summarise(session: LogLine, costs: list[dict[str, float]]) -> None:
    requests: dict[str, dict[str, int]] = session["requests"]
    print("\nWhat viommud saw")
    _tell("features", " ".join(session["features"]))
    _tell("endpoints", " ".join(session["endpoints"]))
    _tell("domains", f"{session['peak_domains']} at peak")
    _tell("requests", "; ".join(f"{kind}: {_statuses(counts)}" for kind, counts in requests.items()))
    _tell("mappings", f"{session['peak_mappings']} at peak")
    print("\nWhat it costs, seen by a program in the emulated guest (median of the rounds)")
    for kind in ("map", "unmap"):
        _tell(kind.upper(), f"{statistics.median(cost[f'{kind}_us'] for cost in costs):.1f} us a call")
    _check(session, requests)


def _check(session: LogLine, requests: dict[str, dict[str, int]]) -> None:
    refused = {kind: counts for kind, counts in requests.items() if set(counts) - {"ok"}}
    _expect(not refused, f"requests were refused: {refused}")
    for kind in ("map", "unmap"):
        count = requests.get(kind, {}).get("ok", 0)
        _expect(count >= PAGES * ROUNDS, f"{kind}: {count} requests, and {PAGES * ROUNDS} were expected")
    for kind in ("attach", "probe"):
        count = requests.get(kind, {}).get("ok", 0)
        _expect(count >= len(DEVICES), f"{kind}: {count} requests for {len(DEVICES)} endpoints")
    _expect(set(session["endpoints"]) == set(DEVICES), "these are not the endpoints of the guest")
    _expect(session["peak_mappings"] >= PAGES, f"fewer than {PAGES} mappings were there at once")
    _expect("MAP_UNMAP" in session["features"], "MAP_UNMAP was not negotiated")


def _statuses(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _tell(what: str, text: Any) -> None:
    print(f"  {what:<10}{text}", flush=True)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotSeenError(otherwise)


if __name__ == "__main__":
    sys.exit(main())
