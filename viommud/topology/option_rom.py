"""Option ROMs that give a guest an ACPI table, for the machines of QEMU without -acpitable.

The firmware runs the code in the ROM, the code adds the table to those of the machine, and the guest's operating system
finds it among them: nothing in the guest changes.

- arm64 `virt` with UEFI: a PCI option ROM with a UEFI driver, for romfile= of the IOMMU's device.
- x86 `microvm`: an option ROM for the BIOS, for QEMU's -option-rom.

Sources: PCI Firmware Specification, expansion ROM header and PCI data structure; UEFI specification, PCI option ROMs
and UEFI images; Microsoft's PE/COFF format.
"""

from __future__ import annotations

import struct

from viommud.topology.errors import TopologyError
from viommud.topology.model import Topology
from viommud.topology.place import PciPlace
from viommud.topology.rom.code import BIOS_X86, BIOS_X86_TABLE, UEFI_ARM64
from viommud.topology.running import VIRTIO_IOMMU

SIGNATURE = b"\x55\xaa"
_UNIT = 512
"""Sizes in a ROM are counted in these bytes."""
_MAX_BIOS = 64 * 1024
"""A BIOS has 128 KiB for all option ROMs; half of them are enough for 2,600 ranges."""
_MIN_PCI = 4096
"""edk2 takes the mask of a smaller ROM for that of none (PciBusDxe, GetOpRomInfo)."""

_EFI_ROM = struct.Struct("<2sHIHHH8xHH2x")
"""signature, size, EFI signature, subsystem, machine, compression, offset of the image, of the PCI data structure"""
_PCIR = struct.Struct("<4sHH2xHB3sHHBBH")
"""signature, vendor, device, length, revision, class, image length, its revision, code type, last image, reserved"""
_EFI_SIGNATURE = 0x0EF1
_CODE_UEFI, _LAST_IMAGE = 3, 0x80
_SUBSYSTEM_DRIVER = 11
_MACHINE_ARM64 = 0xAA64
_EFI_IMAGE = 64
"""Where the image begins in the ROM."""

_DOS = struct.Struct("<2s58xI")
"""signature, offset of the PE header"""
_COFF = struct.Struct("<4sHHIIIHH")
"""signature, machine, sections, time, symbols' offset and number, size of the optional header, flags"""
_OPTIONAL = struct.Struct("<H2xIIIIIQIIHHHHHHIIIIHHQQQQII128x")
"""magic, sizes of code, data, zeros, entry, base of code, image base, alignments, six versions, reserved, sizes of
image and headers, checksum, subsystem, flags, stack and heap, loader flags, number of directories; no directories"""
_SECTION = struct.Struct("<8sIIIIIIHHI")
"""name, size in memory, address, size in file, offset in file, four without use here, flags"""
_PE32_PLUS = 0x20B
_PAGE = 4096
_HEADERS = 0x400
"""Bytes before the only section in the file."""
_EXECUTABLE = 0x0022
"""IMAGE_FILE_EXECUTABLE_IMAGE, IMAGE_FILE_LARGE_ADDRESS_AWARE"""
_CODE_SECTION = 0x6000_0020
"""IMAGE_SCN_CNT_CODE, IMAGE_SCN_MEM_EXECUTE, IMAGE_SCN_MEM_READ"""

_UEFI_TABLE = _EFI_IMAGE + _HEADERS + len(UEFI_ARM64)
"""Where the table is in a ROM for UEFI."""


def render(topology: Topology, table: bytes) -> bytes:
    """The ROM for the topology's machine.

    :param table: a whole ACPI table.
    :raises TopologyError: the machine takes none, or the table is too large for it.
    """
    if topology.machine == "q35":
        raise TopologyError("topology.machine: q35 takes the table itself: leave --option-rom out and use -acpitable")
    if topology.machine == "microvm":
        return _bios(table)
    if not isinstance(topology.iommu, PciPlace):
        raise TopologyError(
            f"topology.iommu: {topology.iommu} is no PCI function, and on virt a ROM belongs to a PCI function"
        )
    return _uefi(table)


def table_in(image: bytes) -> bytes:
    """The table in a ROM that :func:`render` made, and what is behind it; anything else comes back as it is."""
    if image[:2] != SIGNATURE:
        return image
    uefi = image[4:8] == _EFI_SIGNATURE.to_bytes(4, "little")
    return image[_UEFI_TABLE if uefi else BIOS_X86_TABLE :]


def _bios(table: bytes) -> bytes:
    rom = bytearray(BIOS_X86.ljust(BIOS_X86_TABLE, b"\0") + table)
    rom += bytes(-len(rom) % _UNIT)
    if len(rom) > _MAX_BIOS:
        raise TopologyError(
            f"an option ROM for a BIOS has room for a table of {_MAX_BIOS - BIOS_X86_TABLE} bytes,"
            f" and this one has {len(table)}",
            hint="list neighbouring endpoints as one range",
        )
    rom[2] = len(rom) // _UNIT
    rom[6] = -sum(rom) & 0xFF
    return bytes(rom)


def _uefi(table: bytes) -> bytes:
    image = _driver(UEFI_ARM64 + table)
    units = -(-(_EFI_IMAGE + len(image)) // _UNIT)
    header = _EFI_ROM.pack(
        SIGNATURE, units, _EFI_SIGNATURE, _SUBSYSTEM_DRIVER, _MACHINE_ARM64, 0, _EFI_IMAGE, _EFI_ROM.size
    )
    vendor, device = VIRTIO_IOMMU
    data = _PCIR.pack(
        *(b"PCIR", vendor, device, _PCIR.size, 0, bytes(3), units, 0, _CODE_UEFI, _LAST_IMAGE, 0),
    )
    rom = (header + data).ljust(_EFI_IMAGE, b"\0") + image
    return rom.ljust(max(units * _UNIT, _MIN_PCI), b"\0")


def _driver(code: bytes) -> bytes:
    """A UEFI driver of one section, which begins with its entry and does not care where it is loaded."""
    raw = code + bytes(-len(code) % _UNIT)
    in_memory = -(-len(code) // _PAGE) * _PAGE
    sizes = (len(raw), 0, 0)
    versions = (0,) * 6
    optional = _OPTIONAL.pack(
        *(_PE32_PLUS, *sizes, _PAGE, _PAGE, 0, _PAGE, _UNIT, *versions, 0),
        *(_PAGE + in_memory, _HEADERS, 0, _SUBSYSTEM_DRIVER, 0, 0, 0, 0, 0, 0, 16),
    )
    headers = _DOS.pack(b"MZ", _DOS.size)
    headers += _COFF.pack(b"PE\0\0", _MACHINE_ARM64, 1, 0, 0, 0, len(optional), _EXECUTABLE) + optional
    headers += _SECTION.pack(b".text", len(code), _PAGE, len(raw), _HEADERS, 0, 0, 0, 0, _CODE_SECTION)
    return headers.ljust(_HEADERS, b"\0") + raw
