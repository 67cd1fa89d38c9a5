"""ACPI tables for a kernel to take from its initial RAM disk, before it unpacks anything else from there.

Sources: Documentation/admin-guide/acpi/initrd_table_override.rst and Documentation/driver-api/early-userspace/
buffer-format.rst of Linux: an uncompressed archive in the format "newc", in front of the compressed one.
"""

from __future__ import annotations

_MAGIC = b"070701"
_FILE_MODE = 0o100644
_BLOCK = 512
"""What comes behind an archive begins on a multiple of this."""
FOLDER = "kernel/firmware/acpi/"


def table_override(name: str, table: bytes) -> bytes:
    """An archive with one ACPI table."""
    archive = _entry(1, FOLDER + name, _FILE_MODE, table) + _entry(0, "TRAILER!!!", 0, b"")
    return archive + bytes(-len(archive) % _BLOCK)


def _entry(inode: int, name: str, mode: int, content: bytes) -> bytes:
    """Header of 13 numbers, name and content, each filled up to 4 bytes."""
    encoded = name.encode() + b"\0"
    links, user, group, time, device = 1, 0, 0, 0, 0
    numbers = (
        *(inode, mode, user, group, links, time, len(content)),
        *(device, device, device, device, len(encoded), 0),
    )
    head = _MAGIC + b"".join(b"%08X" % number for number in numbers) + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
