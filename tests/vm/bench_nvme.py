"""scripts/bench nvme: what the way through viommud costs a Linux guest whose disk is another process.

The same controller, kernel and programs, in turn, boot by boot; on a shared machine only the ratios mean anything:

    straight     QEMU talks to the disk's process itself; no IOMMU
    bypass       through viommud; the guest's driver puts the disk into a bypass domain (iommu.passthrough=1)
    translated   through viommud; the guest maps and unmaps for each transfer, the disk has files of memory (shared)
    strict       the same, and all of the disk's DMA are messages that viommud serves
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from devices.process import Device

from vm import backend, confined, guest
from vm.archive import ArchiveError
from vm.confined import Confined, Mode
from vm.guest import Shape
from vm.programs import BuildError
from vm.qemu import QemuError

DISK = "00:02.0"
WAYS: dict[str, Mode | None] = {"straight": None, "bypass": "shared", "translated": "shared", "strict": "strict"}
FIGURES = ("randread_4k", "randwrite_4k", "seqread_128k", "seqwrite_128k", "register_read", "register_write")
MEMORY_MIB = 512
AREA_MIB = 4
ROUNDS = 15
READ, WRITE = 0x00, 0x10
"""Registers of the controller: CAP; and INTMC, where zeros change nothing."""
Samples = dict[str, dict[str, list[tuple[float, float]]]]
"""By figure, by way: the median and the minimum of each boot's rounds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench nvme", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--boots", type=int, default=3, metavar="N", help="boots of each way (%(default)s)")
    parser.add_argument("--ops", type=int, default=100, metavar="N", help="random accesses in a round (%(default)s)")
    parser.add_argument("--spin-us", type=int, default=0, metavar="US", help="the relay's spin-us (%(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), metavar="WAY,...", help="%(default)s; straight is always run")
    options = parser.parse_args(arguments)
    for name, least in (("boots", 1), ("ops", 1), ("spin_us", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least}")
    wanted = options.ways.split(",")
    unknown = [way for way in wanted if way not in WAYS]
    if unknown:
        parser.error(f"--ways {options.ways}: no such way: {unknown[0]}; there are {', '.join(WAYS)}")
    ways = [way for way in WAYS if way in {*wanted, "straight"}]
    samples: Samples = {figure: {way: [] for way in ways} for figure in FIGURES}
    try:
        for boot in range(options.boots):
            # Whoever comes first or last in a turn has no lasting advantage of it.
            for way in ways if boot % 2 == 0 else reversed(ways):
                print(f"bench: boot {boot + 1} of {options.boots}: {way}", file=sys.stderr)
                for figure, value in _measure(way, options.ops, options.spin_us).items():
                    samples[figure][way].append(value)
    except (QemuError, ArchiveError, BuildError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    report = _report(samples)
    _show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _measure(way: str, ops: int, spin_us: int) -> dict[str, tuple[float, float]]:
    """One boot: microseconds for each figure, median and minimum of its rounds."""
    mode = WAYS[way]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="viommud-bench-")))
        disk = stack.enter_context(Device("nvme", directory / "server"))
        if mode is None:
            linux = stack.enter_context(guest.start(directory, _shape(directory / "server", way)))
        else:
            listen = directory / "client"
            shape = _shape(listen, way)
            endpoint = Confined(DISK, directory / "server", listen, mode, f", spin-us = {spin_us}")
            config = confined.config(shape, [endpoint], f'[device]\nmsi = "{shape.architecture}"\nbypass = false\n')
            daemon = stack.enter_context(backend.start(directory, config=config))
            linux = stack.enter_context(guest.start(directory, shape, daemon.socket_path))
            linux.load(["virtio-iommu"])
            _check_domain(linux, "identity" if way == "bypass" else "DMA")
        # Many short rounds: some of them fall into moments in which nobody else wants the processors.
        found = _times(linux.check(f"block_io --area {AREA_MIB} --ops {ops} --rounds {ROUNDS} bench").output)
        linux.check(f"echo 0000:{DISK} > /sys/bus/pci/drivers/nvme/unbind")
        rounds = linux.check(f"mmio_time -n 500 -r {ROUNDS} 0000:{DISK} {READ:#x} {WRITE:#x}").results()
        for what in ("read", "write"):
            times = [line[f"{what}_us"] for line in rounds]
            found[f"register_{what}"] = statistics.median(times), min(times)
        linux.power_off()
        told = disk.stop()
        if told["writes"] <= ops or (told["dma_write_messages"] > ops) != (mode == "strict"):
            raise QemuError(f"{way}: the disk moved data in another way: {told}")
        return found


def _shape(socket: Path, way: str) -> Shape:
    return Shape(
        iommu="none" if way == "straight" else "vhost-user",
        memory_mib=MEMORY_MIB,
        devices={},
        modules=("virtio-iommu",),
        programs=("block_io", "mmio_time"),
        arguments=confined.client(DISK, socket),
        command_line=f"iommu.passthrough={int(way == 'bypass')}",
        endpoints=() if way == "straight" else (DISK,),
    )


def _check_domain(linux: guest.Guest, wanted: str) -> None:
    """Wait for the disk, then look at the kind of domain that its driver got."""
    linux.check("block_io --area 1 read")
    kind = linux.check(f"cat /sys/bus/pci/devices/0000:{DISK}/iommu_group/type").output.strip()
    if kind != wanted:
        raise linux.error(f"the disk is in a domain of type {kind}, not {wanted}")


def _times(output: str) -> dict[str, tuple[float, float]]:
    """Of block_io bench: RESULT figure us=... min=..."""
    found = {}
    for line in output.splitlines():
        mark, figure, *pairs = [*line.split(), ""]
        if mark == "RESULT" and figure in FIGURES:
            values = dict(pair.split("=") for pair in pairs if pair)
            found[figure] = float(values["us"]), float(values["min"])
    return found


def _report(samples: Samples) -> dict[str, dict[str, float]]:
    """For each figure the median of each way's boots, the shortest round, and what both are of straight's."""
    report: dict[str, dict[str, float]] = {}
    for figure, by_way in samples.items():
        part = report[figure] = {}
        for way, boots in by_way.items():
            part[f"{way}_us"] = round(statistics.median(median for median, _ in boots), 2)
            part[f"{way}_min_us"] = round(min(shortest for _, shortest in boots), 2)
        for way in list(by_way)[1:]:
            part[f"{way}_ratio"] = round(part[f"{way}_us"] / part["straight_us"], 3)
            part[f"{way}_min_ratio"] = round(part[f"{way}_min_us"] / part["straight_min_us"], 3)
    return report


def _show(report: dict[str, dict[str, float]]) -> None:
    ways = [key.removesuffix("_min_us") for key in next(iter(report.values())) if key.endswith("_min_us")]
    print(f"{'us: median (shortest)':<26}" + "".join(f"{way:>20}" for way in ways))
    for figure, part in report.items():
        cells = [f"{part[f'{way}_us']:.1f} ({part[f'{way}_min_us']:.1f})" for way in ways]
        print(f"{figure:<26}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{'of straight':<26}{'':>20}" + "".join(f"{way:>20}" for way in ways[1:]))
    for figure, part in report.items():
        cells = [f"{part[f'{way}_ratio']:.2f} ({part[f'{way}_min_ratio']:.2f})" for way in ways[1:]]
        print(f"{figure:<26}{'':>20}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
