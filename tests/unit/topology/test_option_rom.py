"""Option ROMs with an ACPI table: their headers read back field by field."""

from __future__ import annotations

import struct

import pytest

from unit.topology.making import topology
from viommud.topology import option_rom, viot
from viommud.topology.errors import TopologyError
from viommud.topology.rom.code import UEFI_ARM64

TABLE = viot.render(topology([(0x10, 0x10)]))


def test_the_rom_for_a_bios() -> None:
    """Signature, size, a jump, and a sum of zero over the size that it says; the table is in it once."""
    image = option_rom.render(topology([(0x10, 0x10)], machine="microvm", iommu="mmio:0xfeb00000"), TABLE)
    assert image[:2] == b"\x55\xaa"
    assert image[2] * 512 == len(image)
    assert image[3] == 0xEB
    assert sum(image) % 256 == 0
    assert image.count(TABLE) == 1
    assert option_rom.table_in(image).startswith(TABLE)


def test_the_rom_for_uefi() -> None:
    """The PCI data structure, and in the image one section with the entry, the code and the table."""
    image = option_rom.render(topology([(0x10, 0x10)]), TABLE)
    assert image[:2] == b"\x55\xaa"
    size, signature, subsystem, machine, compression = struct.unpack_from("<HIHHH", image, 2)
    assert (signature, subsystem, machine, compression) == (0x0EF1, 11, 0xAA64, 0)
    start, pcir = struct.unpack_from("<HH", image, 22)
    assert pcir % 4 == 0
    assert image[pcir : pcir + 4] == b"PCIR"
    assert struct.unpack_from("<HH", image, pcir + 4) == (0x1AF4, 0x1057)
    assert struct.unpack_from("<H", image, pcir + 16) == (size,)
    assert (image[pcir + 20], image[pcir + 21]) == (3, 0x80)
    driver = image[start : size * 512]
    (new_header,) = struct.unpack_from("<I", driver, 60)
    assert driver[:2] == b"MZ"
    assert struct.unpack_from("<4sHH", driver, new_header) == (b"PE\0\0", 0xAA64, 1)
    optional = new_header + 24
    (optional_size,) = struct.unpack_from("<H", driver, new_header + 20)
    assert struct.unpack_from("<H", driver, optional) == (0x20B,)
    (entry,) = struct.unpack_from("<I", driver, optional + 16)
    in_memory, headers = struct.unpack_from("<II", driver, optional + 56)
    assert struct.unpack_from("<H", driver, optional + 68) == (11,)
    name, virtual, address, raw, offset = struct.unpack_from("<8sIIII", driver, optional + optional_size)
    assert name.rstrip(b"\0") == b".text"
    assert entry == address
    assert virtual <= in_memory - address
    assert headers == offset
    assert raw <= len(driver) - offset
    assert driver[offset : offset + virtual] == UEFI_ARM64 + TABLE
    assert option_rom.table_in(image).startswith(TABLE)


@pytest.mark.parametrize("ranges", [1, 20, 2000])
def test_sizes_of_the_rom_for_uefi(ranges: int) -> None:
    """As large as it must be; never so small that edk2 overlooks it."""
    table = viot.render(topology([(2 * number, 2 * number) for number in range(8, 8 + ranges)]))
    image = option_rom.render(topology([(0x10, 0x10)]), table)
    assert len(image) >= 4096
    assert len(image) <= max(4096, len(table) + 3072)
    assert table in image


@pytest.mark.parametrize(
    ("machine", "iommu", "table", "sentence"),
    [
        ("q35", "00:01.0", TABLE, "use -acpitable"),
        ("virt", "mmio:0x0a003e00", TABLE, "is no PCI function"),
        ("microvm", "00:01.0", bytes(65536), "has room for a table of 64512 bytes, and this one has 65536"),
    ],
)
def test_what_cannot_be(machine: str, iommu: str, table: bytes, sentence: str) -> None:
    """A machine that has no use for a ROM, and a table that a BIOS has no room for, are refused."""
    with pytest.raises(TopologyError) as caught:
        option_rom.render(topology(machine=machine, iommu=iommu), table)
    assert sentence in str(caught.value)


def test_a_table_is_no_rom() -> None:
    """What is not a ROM comes back as it is."""
    assert option_rom.table_in(TABLE) == TABLE
