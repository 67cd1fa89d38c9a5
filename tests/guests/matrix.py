"""Every platform on which a guest can be told what is behind the IOMMU, and the proof that it finds it.

Run as a program, it prints the matrix; docs/matrix.md is a copy of what it prints.

    python -m guests.matrix [--write] [ROW ...]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vm import assets, backend, platform
from vm.archive import ArchiveError
from vm.guest import MODULES, Guest
from vm.modules import ModuleError, Modules
from vm.platform import Platform
from vm.programs import BuildError
from vm.qemu import QemuError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"

ENDPOINTS = ("00:02.0", "00:03.0")
UNLISTED = "00:04.0"
DEVICES: Mapping[str, str] = MappingProxyType({"00:02.0": "edu", "00:03.0": "pci-testdev", UNLISTED: "edu"})
WINDOWS = {
    "arm64": "0x0000000008000000 0x00000000080fffff msi",
    "amd64": "0x00000000fee00000 0x00000000feefffff msi",
}
"""Where messages of interrupts go, as the guest must show it for every group."""
PAGES = 200

_PCI = "00:01.0"
_FULL = " ".join(f"0000:{where}" for where in ENDPOINTS)
_GROUPS = "/sys/kernel/iommu_groups"
_TROUBLE = re.compile(r"error|fail|unhandled|warning|bug:|\bfault|call trace|deferred", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One platform."""

    platform: Platform
    name: str
    guest: str
    """For the reader: Debian's kernel."""
    transport: str
    told_by: str
    granule: str = "4K"
    has_driver: bool = True
    """False: Debian builds this kernel without the driver, which the row proves instead."""

    @property
    def modules(self) -> tuple[str, ...]:
        """What the guest loads, in this order."""
        if not self.has_driver:
            return ("vfio-pci",)
        return (*(("virtio_mmio",) if self.transport == "virtio-mmio" else ()), *MODULES)


def _pci(kernel: str, machine: platform.Machine, description: platform.Description, *, uefi: bool = False) -> Platform:
    return Platform(kernel, machine, _PCI, description, uefi)


ROWS = (
    Row(
        _pci("arm64-6.1", "virt", "device tree"),
        *("arm64-6.1-dt", "arm64, bookworm", "PCI", "device tree"),
        has_driver=False,
    ),
    Row(_pci("arm64", "virt", "device tree"), "arm64-dt", "arm64, trixie", "PCI", "device tree"),
    Row(
        _pci("arm64-backports", "virt", "device tree"),
        *("arm64-backports-dt", "arm64, trixie-backports", "PCI", "device tree"),
    ),
    Row(
        # The processor that is emulated otherwise has no pages of 16 KiB.
        Platform("arm64-16k", "virt", _PCI, "device tree", cpu="cortex-a76"),
        *("arm64-16k-dt", "arm64 with 16 KiB pages, trixie", "PCI", "device tree"),
        granule="16K",
    ),
    Row(
        Platform("arm64", "virt", "mmio:0x0a003e00", "device tree"),
        *("arm64-mmio", "arm64, trixie", "virtio-mmio", "device tree"),
    ),
    Row(
        _pci("arm64", "virt", "option ROM", uefi=True),
        *("arm64-uefi", "arm64 with UEFI, trixie", "PCI", "VIOT by the IOMMU's option ROM"),
    ),
    Row(
        _pci("arm64-backports", "virt", "option ROM", uefi=True),
        *("arm64-backports-uefi", "arm64 with UEFI, trixie-backports", "PCI", "VIOT by the IOMMU's option ROM"),
    ),
    Row(
        _pci("amd64-6.1", "q35", "ACPI table"),
        *("amd64-6.1", "amd64, bookworm", "PCI", "VIOT by -acpitable"),
        has_driver=False,
    ),
    Row(_pci("amd64", "q35", "ACPI table"), "amd64", "amd64, trixie", "PCI", "VIOT by -acpitable"),
    Row(
        _pci("amd64-backports", "q35", "ACPI table"),
        *("amd64-backports", "amd64, trixie-backports", "PCI", "VIOT by -acpitable"),
    ),
    Row(
        Platform("amd64", "microvm", "mmio:0xfeb02e00", "option ROM"),
        *("microvm-mmio", "amd64, trixie", "virtio-mmio", "VIOT by -option-rom"),
    ),
    Row(
        Platform("amd64-backports", "microvm", "mmio:0xfeb02e00", "option ROM"),
        *("microvm-backports-mmio", "amd64, trixie-backports", "virtio-mmio", "VIOT by -option-rom"),
    ),
    Row(
        _pci("amd64-backports", "microvm", "option ROM"),
        *("microvm-pci", "amd64, trixie-backports", "PCI", "VIOT by -option-rom"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What a row came to."""

    row: Row
    release: str
    """The guest's kernel, as uname -r says."""

    @property
    def line(self) -> str:
        """Of the printed matrix."""
        row = self.row
        linux = re.match(r"\d+\.\d+", self.release)
        assert linux, self.release
        came = "works" if row.has_driver else "this kernel has no driver"
        cells = (row.guest, linux[0], row.platform.machine, row.transport, row.told_by, row.granule, came)
        return f"| {' | '.join(cells)} |"


def prove(row: Row, directory: Path) -> Outcome:
    """Boot the row's guest and see that it is as the row says.

    :raises AssertionError: it is not.
    :raises QemuError: something of QEMU, the guest or viommud failed.
    """
    config = row.platform.config(ENDPOINTS, row.granule)
    path = directory / "platform.toml"
    path.write_text(config)
    with (
        backend.start(directory, config=config) as daemon,
        platform.start(directory, row.platform, path, daemon.socket_path, DEVICES, row.modules) as guest,
    ):
        _check_qmp(directory, path)
        (_prove_driver if row.has_driver else _prove_no_driver)(row, guest)
        release = guest.release
        assert guest.power_off() == 0
        assert daemon.wait() == 0
        session = daemon.logged("session-ended")
        assert session["rings_broken"] == 0
        assert session["faults_sent"] == 0
        if row.has_driver:
            assert session["endpoints"] == list(ENDPOINTS)
            assert session["requests"]["probe"] == {"ok": len(ENDPOINTS)}
            assert {status for counts in session["requests"].values() for status in counts} == {"ok"}
            assert session["requests"]["map"]["ok"] >= PAGES
            assert session["requests"]["unmap"]["ok"] >= PAGES
        else:
            assert session["requests"] == {}
    return Outcome(row, release)


def _prove_driver(row: Row, guest: Guest) -> None:
    guest.load(row.modules)
    bound = guest.check("readlink /sys/bus/virtio/devices/*/driver").output.split()
    assert [link.rpartition("/")[2] for link in bound] == ["virtio_iommu"]
    guest.check(f"bind vfio-pci {_FULL}")
    assert len(guest.check(f"vfio_map -n {PAGES} -r 1 {_FULL}").results()) == 1
    assert _grouped(guest) == sorted(f"0000:{where}" for where in ENDPOINTS)
    windows = guest.check(f"cat {_GROUPS}/*/reserved_regions").output.splitlines()
    assert windows == [WINDOWS[row.platform.architecture]] * len(ENDPOINTS)
    log = guest.iommu_log()
    assert [line for line in log if _TROUBLE.search(line)] == []
    mask = {"4K": "0xfffffffffffff000", "16K": "0xffffffffffffc000"}[row.granule]
    assert any(line.endswith(f"page mask: {mask}") for line in log), log
    # A device that is not listed gets no group, not even when somebody wants to use it.
    assert guest.run(f"bind vfio-pci 0000:{UNLISTED}").status != 0
    assert _grouped(guest) == sorted(f"0000:{where}" for where in ENDPOINTS)


def _prove_no_driver(row: Row, guest: Guest) -> None:
    """The kernel has no driver for the IOMMU, neither built in nor as a module; the guest boots without any group."""
    assert not Modules(assets.kernel(row.platform.kernel)).has("virtio-iommu")
    guest.load(row.modules)
    assert guest.run("[ -d /sys/bus/virtio/drivers/virtio_iommu ]").status != 0
    assert _grouped(guest) == []


def _grouped(guest: Guest) -> list[str]:
    """Every device of the guest that is in an IOMMU group."""
    listing = guest.check(f"for group in {_GROUPS}/*/devices/*; do [ ! -e $group ] || echo ${{group##*/}}; done")
    return sorted(listing.output.split())


def _check_qmp(directory: Path, config: Path) -> None:
    """`topology check` finds in the running QEMU what was plugged in, and says that QEMU does its DMA."""
    done = platform.viommud("topology", "check", "--config", str(config), "--qmp", str(directory / "qmp.sock"))
    found = [line for line in done.stdout.splitlines() if line]
    assert done.returncode == 4, done.stdout + done.stderr
    assert len(found) == len(ENDPOINTS), found
    for where in ENDPOINTS:
        assert any(f"0000:{where} is an endpoint and is {DEVICES[where]} (" in line for line in found), found


HEAD = """# Platforms that were tried

What `scripts/matrix` printed: stock kernels of Debian in stock QEMU, each guest started with the command that
`viommud qemu-args` prints. "Works" means all of this was seen in the guest: the driver binds; two listed functions get
IOMMU groups and no other device does, not even a third function given to the same driver; the window of interrupt
messages is the platform's; 200 pages are mapped and unmapped through VFIO; the kernel's log has no complaint.

| guest | Linux | machine | transport | told by | granule | result |
|---|---|---|---|---|---|---|
"""
FOOT = """
Linux 6.1 of Debian is built without the driver (`# CONFIG_VIRTIO_IOMMU is not set` in all six configurations of
linux-config-6.1 for amd64 and arm64); such a guest boots with the description and does without the IOMMU.
"""


def document(outcomes: list[Outcome]) -> str:
    """The whole matrix."""
    return HEAD + "".join(f"{outcome.line}\n" for outcome in outcomes) + FOOT


def main() -> int:
    """Print the matrix; the exit status is 0 if every row is as it should be."""
    parser = argparse.ArgumentParser(prog="matrix", description="Try every platform and print what came of it.")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name} too, if all is well")
    parser.add_argument("rows", metavar="ROW", nargs="*", help=", ".join(row.name for row in ROWS))
    options = parser.parse_args()
    if unknown := set(options.rows) - {row.name for row in ROWS}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if options.write and options.rows:
        parser.error("--write takes all rows")
    outcomes, failed = [], False
    for row in ROWS:
        if options.rows and row.name not in options.rows:
            continue
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="viommud-matrix-") as directory:
                outcomes.append(prove(row, Path(directory)))
            came = "good"
        except (AssertionError, QemuError, ArchiveError, BuildError, ModuleError) as error:
            failed = True
            where = traceback.extract_tb(error.__traceback__)[-1]
            came = f"FAILED: {where.line}\n{error}".rstrip()
        print(f"matrix: {row.name}: {time.monotonic() - began:.1f} s: {came}", file=sys.stderr, flush=True)
    print(document(outcomes), end="")
    if options.write and not failed:
        DOCUMENT.write_text(document(outcomes))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
