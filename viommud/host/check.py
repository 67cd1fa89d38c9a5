"""`viommud check`: can this host do what the configuration wants?  For a person to read, or in JSON for a program."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from viommud.endpoint_id import show
from viommud.errors import UsageError
from viommud.host import sysfs, uapi

Verdict = Literal["ok", "note", "warning", "error"]
EXIT_STATUS: dict[Verdict, int] = {"ok": 0, "note": 0, "warning": 3, "error": 4}
"""By the worst finding; 2 is a mistake in the command line or the configuration."""

QEMU_DEVICE = "vhost-user-test-device-pci"
QEMU_NEEDED = "10.2"
_CAP_IPC_LOCK = 14
_ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """As "kernel.iommufd"; what concerns an endpoint begins with its ID."""
    verdict: Verdict
    found: str
    remedy: str | None = None


def add_command(subparsers: Any) -> None:
    """Add the command to what ArgumentParser.add_subparsers() returned."""
    parser = subparsers.add_parser(
        "check",
        help="look whether this host can do what the configuration wants",
        description="look whether this host can do what the configuration wants",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="viommud's configuration")
    parser.add_argument("--qemu", metavar="PROGRAM", help="the QEMU to look at (default: the one in PATH)")
    parser.add_argument("--memory-mib", metavar="N", type=int, default=0, help="guest memory, to hold against limits")
    parser.add_argument("--json", action="store_true", help="print a list of findings in JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; returns the exit status."""
    findings = list(_all(arguments))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            remedy = f"\n         {finding.remedy}" if finding.remedy else ""
            print(f"{finding.verdict:8} {finding.what}: {finding.found}{remedy}")
    return max(EXIT_STATUS[finding.verdict] for finding in findings)


def _all(arguments: argparse.Namespace) -> Iterator[Finding]:
    from viommud import config
    from viommud.device_setup import plan

    setup = plan(config.Config()) if arguments.config is None else config.load(arguments.config, plan)
    hosted = [entry for entry in setup.endpoints if entry.host is not None]
    yield _interface("kernel.iommufd", uapi.IOMMU, "CONFIG_IOMMUFD", needed=bool(hosted))
    yield _interface("kernel.type1", "/dev/vfio/vfio", "CONFIG_VFIO_CONTAINER or CONFIG_IOMMUFD_VFIO_CONTAINER")
    yield _memlock(arguments.memory_mib)
    yield from _entry_limit()
    for entry in hosted:
        assert entry.host is not None
        if entry.host.device is not None:
            yield from _device(show(entry.first), entry.host.device)
    yield from _qemu(arguments.qemu)
    yield Finding(
        "kernel.faults",
        "note",
        "the kernel tells user space of no fault of the host's IOMMU, except with nested translation: a stopped DMA "
        "shows in the kernel's log only, and the guest gets no fault report of it",
    )


def _interface(what: str, path: str, option: str, *, needed: bool = False) -> Finding:
    if not os.path.exists(path):
        return Finding(what, "error" if needed else "note", f"{path} is not there", f"the kernel needs {option}")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(what, "error" if needed else "note", f"{path} may not be opened by this user")
    return Finding(what, "ok", path)


def _may_lock() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def _memlock(memory_mib: int) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _may_lock():
        return Finding("limit.memlock", "ok", "not limited: this user has CAP_IPC_LOCK")
    if soft == resource.RLIM_INFINITY:
        return Finding("limit.memlock", "ok", "unlimited")
    found = f"{soft >> 10} KiB"
    if memory_mib and soft >= memory_mib << 20:
        return Finding("limit.memlock", "ok", f"{found}, enough for {memory_mib} MiB of guest memory")
    return Finding(
        "limit.memlock",
        "warning",
        f"{found}: guest memory that devices reach is pinned and counts; beyond the limit a MAP fails with NOMEM",
        "LimitMEMLOCK=infinity in the unit, or ulimit -l",
    )


def _entry_limit() -> Iterator[Finding]:
    try:
        limit = int(_ENTRY_LIMIT.read_text())
    except (OSError, ValueError):
        return
    yield Finding("limit.dma-entries", "ok", f"{limit} mappings for each type1 container ({_ENTRY_LIMIT})")


def _device(endpoint: str, address: str) -> Iterator[Finding]:
    what = f"{endpoint}.device"
    try:
        path = sysfs.vfio_device(address)
    except UsageError as error:
        yield Finding(what, "error", str(error), error.hint)
        return
    device = sysfs.look(address)
    yield Finding(what, "ok", f"{address} is bound to vfio-pci, {path}")
    blocking = [
        other
        for other in device.others_in_group
        if sysfs.look(other).driver not in (None, "vfio-pci", "pci-stub", "pcieport")
    ]
    if blocking:
        yield Finding(
            f"{endpoint}.group",
            "error",
            f"IOMMU group {device.group} has {', '.join(blocking)} too, with drivers of the host",
            "bind them to vfio-pci as well: the IOMMU cannot tell them apart",
        )
    else:
        yield Finding(f"{endpoint}.group", "ok", f"IOMMU group {device.group}")
    try:
        found = uapi.iova_ranges(str(path))
    except OSError as error:
        yield Finding(
            f"{endpoint}.iova",
            "warning",
            f"what the IOMMU can translate for {address} cannot be found out: {error.strerror}",
            "is the device in use?",
        )
        return
    ranges = ", ".join(f"{first:#x}-{last:#x}" for first, last in found.ranges)
    yield Finding(f"{endpoint}.iova", "ok", f"pages of {found.alignment:#x} bytes; {ranges}")


def _qemu(given: str | None) -> Iterator[Finding]:
    programs = [given] if given else ["qemu-system-aarch64", "qemu-system-x86_64"]
    found = [path for program in programs if (path := shutil.which(program))]
    if not found:
        yield Finding(
            "qemu", "warning", f"{' and '.join(programs)}: not found", f"QEMU {QEMU_NEEDED} or later is needed"
        )
    for path in found:
        yield _look_at(path)


def _look_at(path: str) -> Finding:
    version = subprocess.run([path, "-version"], capture_output=True, text=True)
    devices = subprocess.run([path, "-machine", "none", "-device", "help"], capture_output=True, text=True)
    first = version.stdout.partition("\n")[0]
    if version.returncode != 0 or devices.returncode != 0:
        return Finding("qemu", "error", f"{path} cannot be run: {(version.stderr + devices.stderr).strip()}")
    if f'"{QEMU_DEVICE}"' not in devices.stdout:
        return Finding(
            "qemu", "error", f"{path} ({first}) has no device {QEMU_DEVICE}", f"QEMU {QEMU_NEEDED} or later has it"
        )
    return Finding("qemu", "ok", f"{path}: {first}")
