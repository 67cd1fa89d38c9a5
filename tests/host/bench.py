"""What stage 2 costs, measured in the lab: see `scripts/bench stage2`.

python -m host.bench FILE       write the figures in JSON
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.machine import EDU, NVME
from lab.prepared import BENCH
from vm.guest import Done

from host.machine import HostGuest, Shape, bind, load, pinned_pages, start

FUNCTION = "00:02.0"
PAGES, ROUNDS = 1000, 7
PINNED_MEMORY_MIB = 512


def ioctls() -> dict[str, dict[str, float]]:
    """MAP and UNMAP through the engine, beside the ioctls alone; nanoseconds by case."""
    address = EDU[0]
    bind(address, "vfio-pci")
    device = Path("/sys/bus/pci/devices") / address
    (character,) = device.glob("vfio-dev/vfio*")
    group = os.readlink(device / "iommu_group").rpartition("/")[2]
    cases: dict[str, dict[str, float]] = {}
    for words in (
        ["iommufd", f"/dev/vfio/devices/{character.name}"],
        ["type1", f"/dev/vfio/{group}", address],
    ):
        said = subprocess.run([str(BENCH), *words], capture_output=True, text=True, check=True).stdout
        for line in said.splitlines():
            _, _, name, *numbers = line.split()
            cases[name] = {key: int(value) for key, value in (number.split("=") for number in numbers)}
    return cases


def _medians(done: Done) -> dict[str, float]:
    rounds = done.results()
    return {name: statistics.median(found[name] for found in rounds) for name in ("map_us", "unmap_us")}


def from_guest(shape: Shape, directory: Path) -> dict[str, float]:
    """VFIO's MAP and UNMAP in a guest, one page each; microseconds."""
    with start(directory, shape) as guest:
        load(guest)
        guest.check(f"bind vfio-pci 0000:{FUNCTION}")
        return _medians(guest.check(f"vfio_map -n {PAGES} -r {ROUNDS} 0000:{FUNCTION}", seconds=600))


def pinned(directory: Path) -> dict[str, int]:
    """Pages pinned with QEMU alone, and with viommud and three domains that map a part of memory each."""
    devices = {"00:02.0": EDU[0], "00:03.0": EDU[1], "00:04.0": NVME}
    pages = {}
    for name, shape in (
        ("qemu", Shape(devices, iommu="none", memory_mib=PINNED_MEMORY_MIB)),
        ("viommud", Shape(devices, memory_mib=PINNED_MEMORY_MIB)),
    ):
        place = directory / f"pinned-{name}"
        place.mkdir()
        with start(place, shape) as guest:
            if name == "viommud":
                _three_domains(guest, list(devices))
            pages[name] = pinned_pages()
    return pages


def _three_domains(guest: HostGuest, functions: list[str]) -> None:
    load(guest)
    for function in functions:
        guest.check(f"bind vfio-pci 0000:{function}")
        command = f"vfio_map -n 2000 -r 1 -k 0000:{function}"  # it waits for a line with its mappings
        guest.check(f"(sleep 100000 | {command}) > /tmp/{function}.out &")
        guest.check(f"until grep -q RESULT /tmp/{function}.out; do sleep 0.1; done", seconds=600)


def main(target: Path) -> None:
    """Measure everything and write it down."""
    cases = ioctls()
    for case in cases.values():
        case["ratio"] = round(case["viommud_ns"] / case["bare_ns"], 3)
    print(json.dumps(cases, indent=2), flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = {}
        for kind, shape in {
            "viommud": Shape({FUNCTION: EDU[0]}),
            "qemu": Shape({FUNCTION: EDU[0]}, iommu="qemu"),
        }.items():
            (directory / kind).mkdir()
            found[kind] = from_guest(shape, directory / kind)
            print(kind, found[kind], flush=True)
        pages = pinned(directory)
    result = {
        "cpus": len(os.sched_getaffinity(0)),
        "cases": cases,
        "guest": found,
        "guest_map_ratio": round(found["viommud"]["map_us"] / found["qemu"]["map_us"], 3),
        "guest_unmap_ratio": round(found["viommud"]["unmap_us"] / found["qemu"]["unmap_us"], 3),
        "pinned_pages": pages,
        "pinned_ratio": round(pages["viommud"] / pages["qemu"], 4),
    }
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
