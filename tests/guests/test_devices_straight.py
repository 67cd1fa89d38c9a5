"""The test devices under a Linux guest with nothing but QEMU between: what they do before viommud comes in.

With the IOMMU of QEMU itself the same guest programs also show what translation must look like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from devices.process import Device
from vm.confined import client
from vm.guest import Done, Guest, Shape, start

ADDRESS = "00:02.0"
FULL = f"0000:{ADDRESS}"
MEMORY_MIB = 512


@contextmanager
def booted(
    directory: Path, device: Device, iommu: Literal["qemu", "none"] = "none", command_line: str = ""
) -> Iterator[Guest]:
    """A guest with the device as its only function, and QEMU's IOMMU in front of it or none."""
    shape = Shape(
        iommu=iommu,
        memory_mib=MEMORY_MIB,
        devices={},
        programs=("block_io", "dma_check"),
        arguments=client(ADDRESS, device.socket),
        command_line=command_line,
    )
    with start(directory, shape) as guest:
        yield guest


def values(done: Done, name: str) -> dict[str, str]:
    """The pairs of the line "RESULT name key=value ..." of a program."""
    (line,) = (line for line in done.output.splitlines() if line.startswith(f"RESULT {name} "))
    return dict(pair.split("=", 1) for pair in line.split()[2:])


def intact(guest: Guest, mib: int = 2) -> None:
    """Data written to the disk comes back."""
    result = values(guest.check(f"block_io --area {mib} --ops 200 check"), "check")
    assert result["written"] == result["read"]
    assert (result["mismatches"], result["errors"]) == ("0", "0")


@pytest.mark.parametrize("options", [(), ("--intx",), ("--messages-only",)], ids=["msix", "intx", "messages"])
def test_the_stock_driver_does_block_io(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Checksums match with MSI-X, with INTx, and with a device that moves every byte by message."""
    with Device("nvme", tmp_path / "nvme", *options) as nvme:
        with booted(tmp_path, nvme) as guest:
            intact(guest, 4)
            kind = "GIC-0" if options == ("--intx",) else "MSIX"
            interrupts = guest.check("grep nvme0q1 /proc/interrupts").output
            assert kind in interrupts
            assert guest.power_off() == 0
        summary = nvme.stop()
    assert summary["writes"] > 200
    assert summary["flushes"] > 0
    assert summary["reachable_peak_bytes"] == MEMORY_MIB << 20
    assert (summary["dma_write_messages"] > 0) == (options == ("--messages-only",))


def test_the_disk_survives_rebinding_and_resets(tmp_path: Path) -> None:
    """Driver unbound and bound, controller reset, function level reset, reset of the machine."""
    with Device("nvme", tmp_path / "nvme") as nvme, booted(tmp_path, nvme) as guest:
        intact(guest)
        guest.check(f"cd /sys/bus/pci/drivers/nvme && echo {FULL} > unbind && echo {FULL} > bind")
        intact(guest)
        guest.check("echo 1 > /sys/class/nvme/nvme0/reset_controller")
        intact(guest)
        assert guest.check(f"cat /sys/bus/pci/devices/{FULL}/reset_method").output.strip() == "flr"
        guest.check(f"echo 1 > /sys/bus/pci/devices/{FULL}/reset")
        intact(guest)
        guest.check("block_io --area 1 --seed 77 check")
        before = values(guest.check("block_io --area 1 read"), "read")
        guest.reboot()
        after = values(guest.check("block_io --area 1 read"), "read")
        assert after == before
        intact(guest)


def test_a_device_that_dies_is_an_error_for_the_guest(tmp_path: Path) -> None:
    """The process ends in the middle of a transfer: the guest sees I/O errors and lives on."""
    timeouts = "nvme_core.io_timeout=2 nvme_core.admin_timeout=2"
    with (
        Device("nvme", tmp_path / "nvme", "--die-after", "300") as nvme,
        booted(tmp_path, nvme, command_line=timeouts) as guest,
    ):
        done = guest.run("block_io --area 4 check")
        assert done.status == 1
        assert values(done, "check")["errno"] == "5"
        assert nvme.wait() == 70
        assert guest.check("echo alive").output == "alive\n"


def test_dma_follows_the_mappings_of_qemus_iommu(tmp_path: Path) -> None:
    """Every check of dma_check holds, and each refused access is a fault in the guest's log."""
    with Device("dma_engine", tmp_path / "engine") as engine:
        with booted(tmp_path, engine, "qemu") as guest:
            guest.load()
            done = guest.run(f"dma_check {FULL}")
            assert done.status == 0, done.output
            log = "\n".join(guest.iommu_log())
            # QEMU reports every four bytes and Linux limits the rate of its messages: the first two are certain.
            for address in re.findall("RESULT refused (0x[0-9a-f]+)", done.output)[:2]:
                assert f"at {address} " in log
        assert engine.stop()["refused"] == 6


def test_a_rogue_device_gets_nothing_from_qemus_iommu(tmp_path: Path) -> None:
    """Accesses outside the mappings are refused and faults, while the driver's I/O goes on."""
    options = ("--rogue-read", "0x12345000", "--rogue-write", "0x12346000", "--rogue-at", "50")
    with Device("nvme", tmp_path / "nvme", *options) as nvme, booted(tmp_path, nvme, "qemu") as guest:
        guest.load(["virtio-iommu"])
        intact(guest)
        read, write = nvme.wait_event("rogue_read"), nvme.wait_event("rogue_write")
        assert (read["mapped"], read["by_message"]) == (False, "")
        assert read["errno"] != 0
        assert write["errno"] != 0
        log = "\n".join(guest.iommu_log())
        assert "page fault from EP 16 at 0x12345000" in log
        assert "page fault from EP 16 at 0x12346000" in log
