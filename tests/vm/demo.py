"""scripts/demo: a stock Linux guest whose NVMe disks are other processes, confined by viommud, and what was seen.

Two disks and a device that lives in QEMU are behind the IOMMU. One disk behaves. The other one, in the middle of the
guest's I/O, reads and writes where the guest mapped nothing for it. The third device is for the cost of MAP and UNMAP.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from devices.process import Device
from integration.daemon import Daemon, LogLine

from vm import assets, backend, confined, guest
from vm.archive import ArchiveError
from vm.confined import Confined
from vm.guest import IOMMU, Done, Guest, Shape
from vm.programs import BuildError
from vm.qemu import QemuError

MEMORY_MIB = 1024
AREA_MIB = 8
PAGES = 500
ROUNDS = 3
DISK, ROGUE, EDU = "00:02.0", "00:03.0", "00:04.0"
KINDS = {DISK: "NVMe, a process of its own", ROGUE: "NVMe that misbehaves, another one", EDU: "edu, in QEMU"}
STRAY = 0x12345000
"""Where the disk that misbehaves reads; it writes one page after."""
MISDEEDS = ("--rogue-read", hex(STRAY), "--rogue-write", hex(STRAY + 0x1000), "--rogue-at", "20")
_WRONG = ("error", "fail", "unhandled", "warning", "bug:")
_FAULT = re.compile(r"page fault from EP \d+ at (0x[0-9a-f]+)")


class NotSeenError(Exception):
    """Something that had to happen did not."""


def main() -> int:
    """Run it; the exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="viommud-demo-") as name:
        try:
            _demonstrate(Path(name))
        except (NotSeenError, QemuError, ArchiveError, BuildError, RuntimeError) as error:
            print(f"demo: FAILED: {error}", file=sys.stderr)
            return 1
    print(f"\nAll of it was seen, {time.monotonic() - began:.1f} s in all.")
    return 0


def _demonstrate(directory: Path) -> None:
    print("viommud serves a stock Linux guest, and confines its disks to what the guest maps for them")
    endpoints = [
        Confined(where, directory / f"{where}.server", directory / f"{where}.client") for where in (DISK, ROGUE)
    ]
    shape = Shape(
        memory_mib=MEMORY_MIB,
        devices={EDU: "edu"},
        endpoints=tuple(KINDS),
        programs=("block_io", "vfio_map"),
        arguments=[option for each in endpoints for option in confined.client(each.address, each.listen)],
    )
    config = confined.config(shape, endpoints, f'[device]\nmsi = "{shape.architecture}"\nbypass = false\n')
    with ExitStack() as stack:
        disk = stack.enter_context(Device("nvme", endpoints[0].server, "--serial", "honest"))
        rogue = stack.enter_context(Device("nvme", endpoints[1].server, "--serial", "rogue", *MISDEEDS))
        daemon = stack.enter_context(backend.start(directory, config=config))
        began = time.monotonic()
        linux = stack.enter_context(guest.start(directory, shape, daemon.socket_path))
        version = assets.emulator(shape.architecture).version
        _tell("guest", f"Linux {linux.release} on QEMU {version}, booted in {time.monotonic() - began:.1f} s")
        _attach(linux)
        _write_and_read(linux, "honest", DISK)
        _write_and_read(linux, "rogue", ROGUE)
        fault = _faults(linux, rogue)
        _tell("now", f"mapping and unmapping {PAGES} pages through VFIO, {ROUNDS} times")
        costs = linux.check(f"vfio_map -n {PAGES} -r {ROUNDS} 0000:{EDU}").results()
        _expect(len(costs) == ROUNDS, f"{len(costs)} of {ROUNDS} rounds were finished")
        wrong = [line for line in linux.iommu_log() if any(word in line.lower() for word in _WRONG)]
        _expect(not wrong, "the guest's kernel complains:\n" + "\n".join(wrong))
        _expect(linux.power_off() == 0, "QEMU ended with an error")
        _expect(daemon.wait() == 0, f"viommud ended with an error:\n{daemon.log_text}")
        _summarise(daemon, {DISK: disk.stop(), ROGUE: rogue.stop()}, fault, costs)


def _attach(linux: Guest) -> None:
    """The guest's driver takes the IOMMU, and with that nvme its disks, vfio-pci the third device."""
    linux.load()
    driver = linux.run(f"readlink /sys/bus/pci/devices/0000:{IOMMU}/virtio*/driver").output.strip()
    _expect(driver.endswith("/virtio_iommu"), f"the driver of {IOMMU} is {driver or 'none'}, not virtio_iommu")
    linux.check(f"bind vfio-pci 0000:{EDU}")
    for where, kind in KINDS.items():
        group = f"/sys/bus/pci/devices/0000:{where}/iommu_group"
        number = linux.check(f"readlink {group}").output.strip().rpartition("/")[2]
        kernels = linux.check(f"cat {group}/type").output.strip()
        _tell("attached", f"{where} ({kind}): IOMMU group {number}, domain of type {kernels}")


def _write_and_read(linux: Guest, serial: str, where: str) -> None:
    """Data of every block go to the disk and come back."""
    nodes = f"/sys/bus/pci/devices/0000:{where}/nvme/nvme*/nvme*n1"
    find = f"for i in $(seq 600); do set -- {nodes}; [ -e $1 ] && break; usleep 100000; done; echo ${{1##*/}}"
    name = linux.check(find).output.strip()
    _expect(name.startswith("nvme") and "*" not in name, f"{where}: no disk appeared")
    found = linux.check(f"cat /sys/block/{name}/device/serial").output.strip()
    _expect(found == serial, f"{where}: the disk is {found!r}, not {serial!r}")
    result = _values(linux.check(f"block_io --device /dev/{name} --area {AREA_MIB} --ops 200 check"), "check")
    clean = (result["errors"], result["mismatches"]) == ("0", "0")
    _expect(clean and result["written"] == result["read"], f"{name} gave other data back: {result}")
    _tell(name, f"{AREA_MIB} MiB written and read back: checksum {result['written']} and {result['read']}")


def _faults(linux: Guest, rogue: Device) -> str:
    """The accesses were tried and refused; what the guest's log says of the first."""
    for event in ("rogue_read", "rogue_write"):
        refused = rogue.wait_event(event)
        _expect(refused["errno"] != 0 and not refused["mapped"], f"{event} was not refused: {refused}")
    log = linux.dmesg()
    faults = {int(match[1], 16): line for line in log if (match := _FAULT.search(line))}
    wanted = {STRAY, STRAY + 0x1000}
    _expect(set(faults) == wanted, f"faults at {[hex(address) for address in faults]}, and not at {hex(STRAY)} twice")
    return faults[STRAY]


def _values(done: Done, name: str) -> dict[str, str]:
    """The pairs of the line "RESULT name key=value ..."."""
    (line,) = (line for line in done.output.splitlines() if line.startswith(f"RESULT {name} "))
    return dict(pair.split("=", 1) for pair in line.split()[2:])


def _summarise(daemon: Daemon, told: dict[str, dict[str, Any]], fault: str, costs: list[dict[str, float]]) -> None:
    session = daemon.logged("session-ended")
    summaries = {line["endpoint"]: line for line in daemon.log("vfio-user-summary")}
    _expect(set(summaries) == set(told), f"summaries of {sorted(summaries)}")
    requests: dict[str, dict[str, int]] = session["requests"]
    print("\nWhat viommud saw")
    _tell("features", " ".join(session["features"]))
    _tell("endpoints", " ".join(session["endpoints"]))
    _tell("domains", f"{session['peak_domains']} at peak")
    _tell("requests", "; ".join(f"{kind}: {_statuses(counts)}" for kind, counts in requests.items()))
    _tell("mappings", f"{session['peak_mappings']} at peak")
    print("\nWhat the disks could reach (viommud's count of the bytes mapped at one time; mode strict)")
    for where, line in summaries.items():
        _tell(where, f"device reached {_size(line['peak_reachable_bytes'])} of {MEMORY_MIB >> 10} GiB at most")
        _tell("", f"{_count(line, 'dma_maps', 'mappings')} made and {line['dma_unmaps']} taken back, DMA served: "
              f"{_count(line, 'reads')} and {_count(line, 'writes')}; refused: {line['refused']}")  # fmt: skip
    print("\nWhat the guest's kernel said when the second disk read where nothing is mapped")
    print(f"  {fault}")
    print("\nWhat it costs, seen by a program in the emulated guest (median of the rounds)")
    for kind in ("map", "unmap"):
        _tell(kind.upper(), f"{statistics.median(cost[f'{kind}_us'] for cost in costs):.1f} us a call")
    _check(session, requests)
    _check_disks(summaries, told)


def _check(session: LogLine, requests: dict[str, dict[str, int]]) -> None:
    refused = {kind: counts for kind, counts in requests.items() if set(counts) - {"ok"}}
    _expect(not refused, f"requests were refused: {refused}")
    for kind in ("map", "unmap"):
        count = requests.get(kind, {}).get("ok", 0)
        _expect(count >= PAGES * ROUNDS, f"{kind}: {count} requests, and {PAGES * ROUNDS} were expected")
    for kind in ("attach", "probe"):
        count = requests.get(kind, {}).get("ok", 0)
        _expect(count >= len(KINDS), f"{kind}: {count} requests for {len(KINDS)} endpoints")
    _expect(set(session["endpoints"]) == set(KINDS), "these are not the endpoints of the guest")
    _expect(session["peak_mappings"] >= PAGES, f"fewer than {PAGES} mappings were there at once")
    _expect("MAP_UNMAP" in session["features"], "MAP_UNMAP was not negotiated")


def _check_disks(summaries: dict[str, LogLine], told: dict[str, dict[str, Any]]) -> None:
    moved = AREA_MIB << 20
    for where, line in summaries.items():
        _expect(line["memory_bytes"] >= MEMORY_MIB << 20, f"{where}: QEMU shared {line['memory_bytes']} bytes only")
        reached = line["peak_reachable_bytes"]
        _expect(0 < reached < MEMORY_MIB << 16, f"{where}: {reached} bytes were within reach")
        theirs = told[where]["reachable_peak_bytes"]
        _expect(theirs == reached, f"{where}: the device counts {theirs} bytes, viommud {reached}")
        _expect(min(line["read_bytes"], line["write_bytes"]) >= moved, f"{where}: data went another way: {line}")
        _expect(line["refused"] == (2 if where == ROGUE else 0), f"{where}: {line['refused']} accesses were refused")
        _expect(line["server_failures"] == 0, f"{where}: the device was cut off")


def _statuses(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _count(line: LogLine, key: str, name: str = "") -> str:
    return f"{line[key]} {name or key}"


def _size(count: int) -> str:
    return f"{count >> 10} KiB" if count < 4 << 20 else f"{count >> 20} MiB"


def _tell(what: str, text: Any) -> None:
    print(f"  {what:<10}{text}", flush=True)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotSeenError(otherwise)


if __name__ == "__main__":
    sys.exit(main())
