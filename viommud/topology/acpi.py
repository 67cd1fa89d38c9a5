"""The header that every ACPI table begins with (ACPI specification, System Description Table Header)."""

from __future__ import annotations

import struct

from viommud.topology.errors import TopologyError

HEADER = struct.Struct("<4sIBB6s8sI4sI")
"""signature, length, revision, checksum, OEM ID, OEM table ID, OEM revision, creator ID, creator revision"""

_CHECKSUM = 9
_OEM = (b"VIOMMU", b"VIOMMUD ", 1, b"VMMU", 1)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A whole table: header, body, and the checksum that makes the sum of all bytes zero."""
    image = bytearray(HEADER.pack(signature, HEADER.size + len(body), revision, 0, *_OEM) + body)
    image[_CHECKSUM] = -sum(image) & 0xFF
    return bytes(image)


def check_table(image: bytes, signature: bytes, what: str) -> bytes:
    """The bytes that the table's own length covers.

    :param what: names the table in the error.
    :raises TopologyError: it is no such table, is cut off, or its checksum is wrong.
    """
    if len(image) < HEADER.size or image[:4] != signature:
        raise TopologyError(f"{what}: no ACPI table with the signature {signature.decode()}: it begins {image[:4]!r}")
    length: int = HEADER.unpack_from(image)[1]
    if not HEADER.size <= length <= len(image):
        raise TopologyError(f"{what}: the table says it has {length} bytes, and the file has {len(image)}")
    if sum(image[:length]) & 0xFF:
        raise TopologyError(f"{what}: the checksum is wrong")
    return image[:length]
