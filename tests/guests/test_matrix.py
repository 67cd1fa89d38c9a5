"""Every platform of docs/matrix.md, booted and looked at; and that the file says what came of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from vm import backend, platform
from vm.platform import Platform
from vm.programs import compiler

from guests import matrix
from viommud.topology import rom
from viommud.topology.rom.code import BIOS_X86, UEFI_ARM64


def undated(line: str) -> str:
    """A line of the matrix without the version of Linux: a newer kernel in Debian makes no document wrong."""
    return re.sub(r"\| \d+\.\d+ \|", "| N |", line)


@pytest.mark.parametrize("row", matrix.ROWS, ids=[row.name for row in matrix.ROWS])
def test_platform(tmp_path: Path, row: matrix.Row) -> None:
    """The driver binds, only what is listed is behind the IOMMU, VFIO maps; or the kernel has no driver."""
    outcome = matrix.prove(row, tmp_path)
    written = [undated(line) for line in matrix.DOCUMENT.read_text().splitlines()]
    assert undated(outcome.line) in written, "docs/matrix.md is not current: run scripts/matrix --write"


def test_the_document_has_these_rows() -> None:
    """One line for each row, in this order, within the text that scripts/matrix puts around it."""
    lines = matrix.DOCUMENT.read_text().splitlines()
    rows = [undated(line) for line in lines if line.startswith(("| arm64", "| amd64"))]
    assert rows == [undated(matrix.Outcome(row, "0.0").line) for row in matrix.ROWS]
    assert (
        matrix.DOCUMENT.read_text()
        == matrix.HEAD + "".join(f"{line}\n" for line in lines if line.startswith(("| arm64", "| amd64"))) + matrix.FOOT
    )


@pytest.mark.parametrize("name", ["arm64-uefi", "microvm-mmio"])
def test_the_table_of_an_option_rom_is_there_after_a_reboot(tmp_path: Path, name: str) -> None:
    """The firmware runs the ROM at every start, and the second system finds table and endpoints as the first did."""
    (row,) = (row for row in matrix.ROWS if row.name == name)
    config = row.platform.config(matrix.ENDPOINTS, row.granule)
    path = tmp_path / "platform.toml"
    path.write_text(config)
    with (
        backend.start(tmp_path, config=config) as daemon,
        platform.start(tmp_path, row.platform, path, daemon.socket_path, matrix.DEVICES, row.modules) as guest,
    ):
        for last in (False, True):
            tables = guest.check("ls /sys/firmware/acpi/tables").output.split()
            assert [table for table in tables if table.startswith("VIOT")] == ["VIOT"]
            guest.load(row.modules)
            guest.check("bind vfio-pci 0000:00:02.0")
            guest.check("vfio_map -n 10 -r 1 0000:00:02.0")
            if not last:
                guest.reboot()


def test_linux_takes_no_viot_from_its_ram_disk(tmp_path: Path) -> None:
    """Why the option ROM is needed: the table is in front of the RAM disk, and the kernel leaves it there."""
    place = Platform("arm64", "virt", "00:01.0", "initrd override", uefi=True)
    config = place.config(matrix.ENDPOINTS, "4K")
    path = tmp_path / "platform.toml"
    path.write_text(config)
    with (
        backend.start(tmp_path, config=config) as daemon,
        platform.start(tmp_path, place, path, daemon.socket_path, matrix.DEVICES) as guest,
    ):
        tables = guest.check("ls /sys/firmware/acpi/tables").output.split()
        assert "APIC" in tables
        assert "VIOT" not in tables
        guest.load(["virtio-iommu"])
        assert guest.check("ls /sys/kernel/iommu_groups").output.split() == []


@pytest.mark.parametrize(
    ("source", "architecture", "options", "code"),
    [("uefi_arm64.S", "arm64", (), UEFI_ARM64), ("bios_x86.S", "amd64", ("-m32",), BIOS_X86)],
)
def test_the_roms_code_is_what_its_source_assembles_to(
    tmp_path: Path, source: str, architecture: str, options: tuple[str, ...], code: bytes
) -> None:
    """The machine code in the package and the assembler source beside it are the same program."""
    gcc = compiler("arm64" if architecture == "arm64" else "amd64")
    built, raw = tmp_path / "built.o", tmp_path / "built.bin"
    written = Path(rom.__file__).parent / source
    subprocess.run([gcc, *options, "-c", "-o", str(built), str(written)], check=True)
    objcopy = gcc.removesuffix("gcc") + "objcopy"
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", str(built), str(raw)], check=True)
    assert raw.read_bytes() == code
