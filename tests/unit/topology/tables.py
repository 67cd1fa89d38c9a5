"""Readers of the ACPI tables and of the topologies in configuration space, written from their layouts alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


def body(image: bytes, signature: bytes) -> bytes:
    """A table's bytes behind the 36 of its header, which is checked."""
    assert image[0:4] == signature
    assert int.from_bytes(image[4:8], "little") == len(image)
    assert sum(image) % 256 == 0
    return image[36:]


def number(data: bytes, at: int, size: int) -> int:
    """A little-endian number."""
    assert at + size <= len(data)
    return int.from_bytes(data[at : at + size], "little")


@dataclass
class ViotNode:
    """A node of the final VIOT, by its offset in the table."""

    offset: int
    kind: int
    fields: dict[str, int]


VIOT_FIELDS = {
    1: (
        24,
        {
            "endpoint_start": (4, 4),
            "segment_start": (8, 2),
            "segment_end": (10, 2),
            "bdf_start": (12, 2),
            "bdf_end": (14, 2),
            "output_node": (16, 2),
        },
    ),
    2: (24, {"endpoint": (4, 4), "base_address": (8, 8), "output_node": (16, 2)}),
    3: (16, {"segment": (4, 2), "bdf": (6, 2)}),
    4: (16, {"base_address": (8, 8)}),
}


def viot(image: bytes) -> list[ViotNode]:
    """The nodes of a VIOT; everything that must be zero is."""
    body(image, b"VIOT")
    count, offset = number(image, 36, 2), number(image, 38, 2)
    assert offset == 48
    assert image[40:48] == bytes(8)
    nodes = []
    for _ in range(count):
        kind, length = image[offset], number(image, offset + 2, 2)
        size, fields = VIOT_FIELDS[kind]
        assert length == size
        used = {1, *range(4)} - {1}
        values = {}
        for name, (at, width) in fields.items():
            values[name] = number(image, offset + at, width)
            used |= set(range(at, at + width))
        assert not any(image[offset + at] for at in range(size) if at not in used)
        nodes.append(ViotNode(offset, kind, values))
        offset += length
    assert offset == len(image)
    return nodes


def linux_endpoint(nodes: list[ViotNode], segment: int, bdf: int) -> tuple[int, int] | None:
    """Endpoint ID and offset of the IOMMU's node that a Linux guest finds for a function."""
    for node in nodes:
        if node.kind == 1:
            f = node.fields
            if f["segment_start"] <= segment <= f["segment_end"] and f["bdf_start"] <= bdf <= f["bdf_end"]:
                above = (segment - f["segment_start"]) << 16
                return above + bdf - f["bdf_start"] + f["endpoint_start"], f["output_node"]
    return None


@dataclass
class IortNode:
    """A node of an IORT, by its offset in the table."""

    offset: int
    kind: int
    revision: int
    data: bytes
    """Node-specific bytes, up to the mappings."""
    mappings: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(first input, last input, first output, offset of the output node, flags)"""


def iort(image: bytes) -> list[IortNode]:
    """The nodes of an IORT."""
    body(image, b"IORT")
    count, offset = number(image, 36, 4), number(image, 40, 4)
    assert image[44:48] == bytes(4)
    nodes = []
    for _ in range(count):
        kind, length, revision = image[offset], number(image, offset + 1, 2), image[offset + 3]
        mapping_count, mapping_offset = number(image, offset + 8, 4), number(image, offset + 12, 4)
        assert offset + length <= len(image)
        end = mapping_offset if mapping_count else length
        node = IortNode(offset, kind, revision, image[offset + 16 : offset + end])
        for index in range(mapping_count):
            at = offset + mapping_offset + 20 * index
            assert at + 20 <= offset + length
            first, less_one, output, target, flags = struct.unpack_from("<5I", image, at)
            node.mappings.append((first, first + less_one, output, target, flags))
        nodes.append(node)
        offset += length
    assert offset == len(image)
    known = {node.offset for node in nodes}
    assert all(mapping[3] in known for node in nodes for mapping in node.mappings)
    return nodes


def translate(node: IortNode, rid: int) -> tuple[int, int] | None:
    """(ID, offset of the output node) of a requester ID."""
    found = [(output + rid - first, target) for first, last, output, target, _ in node.mappings if first <= rid <= last]
    assert len(found) <= 1
    return found[0] if found else None


def list_2019(space: bytes) -> Iterator[dict[str, Any]]:
    """Items of the linked list in a whole configuration space, as its driver walks them."""
    at = number(space, 36, 2)
    while at:
        kind, following = number(space, at, 2), number(space, at + 2, 2)
        if kind == 0:
            yield {
                "endpoint": number(space, at + 4, 4),
                "segment": number(space, at + 8, 2),
                "first": number(space, at + 10, 2),
                "last": number(space, at + 12, 2),
            }
            assert number(space, at + 14, 2) == 0
        else:
            assert kind == 1
            yield {"endpoint": number(space, at + 4, 4), "address": number(space, at + 8, 8)}
        at = following


def array_2020(space: bytes) -> Iterator[dict[str, Any]]:
    """Items of the array in a whole configuration space."""
    offset, count, length = (number(space, at, 4) for at in (36, 40, 44))
    for index in range(count):
        at = offset + index * length
        kind = number(space, at, 2)
        if kind == 1:
            yield {
                "segment": number(space, at + 2, 2),
                "first": number(space, at + 4, 2),
                "last": number(space, at + 6, 2),
                "endpoint": number(space, at + 8, 4),
            }
            assert length >= 12
        else:
            assert kind == 2
            assert length >= 16
            yield {"endpoint": number(space, at + 4, 4), "address": number(space, at + 8, 8)}


def records_2020(space: bytes) -> Iterator[dict[str, Any]]:
    """Records of a whole configuration space."""
    count, at = number(space, 36, 2), number(space, 38, 2)
    assert at % 8 == 0
    for _ in range(count):
        kind, length = space[at], number(space, at + 2, 2)
        assert length == 16
        if kind == 1:
            yield {
                "endpoint": number(space, at + 4, 4),
                "segment": number(space, at + 8, 2),
                "first": number(space, at + 10, 2),
                "last": number(space, at + 12, 2),
            }
        else:
            assert kind == 2
            yield {"endpoint": number(space, at + 4, 4), "address": number(space, at + 8, 8)}
        at += length


def newc(archive: bytes) -> dict[str, bytes]:
    """Files of a cpio archive in the format newc, as a Linux kernel looks for them."""
    files: dict[str, bytes] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        content = at + 110 + name_size + 3 & ~3
        if name == "TRAILER!!!":
            assert len(archive) % 512 == 0
            assert not any(archive[content:])
            return files
        files[name] = archive[content : content + size]
        at = content + size + 3 & ~3
