"""Flattened device trees: read into plain nodes, and written packed (Devicetree specification, chapter 5).

A reader of our own because the trees come from outside: libfdt trusts a header's offsets and its binding to Python ends
with a segmentation fault on a damaged tree.  Written with that, the format is small.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from viommud.topology.errors import TopologyError

_MAGIC = 0xD00D_FEED
_HEADER = struct.Struct(">10I")
"""magic, total size, offsets of structure, strings and reservations, version, oldest compatible version, boot CPU,
sizes of strings and structure"""
_VERSION = 17
_COMPATIBLE = 16
_BEGIN_NODE, _END_NODE, _PROPERTY, _NOP, _END = 1, 2, 3, 4, 9
_CELL = struct.Struct(">I")
_PROPERTY_HEAD = struct.Struct(">II")
"""length of the value, offset of the name in the strings"""
_RESERVATION = 16
"""Bytes of one entry of the reservation block; one of zeros ends it."""
_MAX_DEPTH = 64


@dataclass(slots=True)
class Node:
    """A node of a tree."""

    name: str
    parent: Node | None
    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Its names from the root on."""
        return "/" if self.parent is None else f"{self.parent.path.rstrip('/')}/{self.name}"

    @property
    def phandle(self) -> int | None:
        """The number by which other nodes refer to it."""
        cells = self.cells("phandle") or self.cells("linux,phandle")
        return cells[0] if cells else None

    def cells(self, name: str) -> list[int] | None:
        """A property as 32-bit numbers; None if it is absent.

        :raises TopologyError: it is not made of such.
        """
        value = self.properties.get(name)
        if value is None:
            return None
        if len(value) % 4:
            raise TopologyError(f"{self.path}: the property {name} has {len(value)} bytes, which are no 32-bit cells")
        return list(struct.unpack(f">{len(value) // 4}I", value))

    def cell(self, name: str, default: int) -> int:
        """A property of one number."""
        cells = self.cells(name)
        if cells is None:
            return default
        if len(cells) != 1:
            raise TopologyError(f"{self.path}: the property {name} has {len(cells)} cells in place of 1")
        return cells[0]

    def strings(self, name: str) -> list[str]:
        """A property as a list of strings; empty if it is absent."""
        value = self.properties.get(name, b"")
        return [part.decode("ascii", "replace") for part in value.split(b"\0") if part]

    def windows(self) -> list[tuple[int, int]]:
        """Its register windows as (base, bytes) in the CPU's address space; those that have no place there left out.

        :raises TopologyError: reg or a ranges property above it is malformed.
        """
        if self.parent is None or "reg" not in self.properties:
            return []
        address_cells, size_cells = self.parent.cell("#address-cells", 2), self.parent.cell("#size-cells", 1)
        found = []
        for entry in self._entries("reg", address_cells + size_cells):
            base = self.parent._to_cpu(_number(entry[:address_cells]))
            if base is not None:
                found.append((base, _number(entry[address_cells:])))
        return found

    def _to_cpu(self, address: int) -> int | None:
        """An address of this node's children as the CPU has it (Devicetree specification, property ranges)."""
        if self.parent is None:
            return address
        if "ranges" not in self.properties:
            return None
        child, size = self.cell("#address-cells", 2), self.cell("#size-cells", 1)
        parent = self.parent.cell("#address-cells", 2)
        if not self.properties["ranges"]:
            return self.parent._to_cpu(address)
        for entry in self._entries("ranges", child + parent + size):
            start, span = _number(entry[:child]), _number(entry[child + parent :])
            if start <= address < start + span:
                return self.parent._to_cpu(address - start + _number(entry[child : child + parent]))
        return None

    def _entries(self, name: str, length: int) -> list[list[int]]:
        cells = self.cells(name) or []
        if length == 0 or len(cells) % length:
            raise TopologyError(f"{self.path}: the property {name} is not made of entries of {length} cells")
        return [cells[at : at + length] for at in range(0, len(cells), length)]


def _number(cells: Sequence[int]) -> int:
    value = 0
    for cell in cells:
        value = value << 32 | cell
    return value


@dataclass(slots=True)
class Tree:
    """A whole tree."""

    root: Node
    reservations: bytes
    """The memory reservation block, with its end."""
    boot_cpu: int


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it, in the tree's order."""
    yield node
    for child in node.children.values():
        yield from walk(child)


def find_phandle(root: Node, phandle: int) -> Node | None:
    """The node that others refer to by this number."""
    return next((node for node in walk(root) if node.phandle == phandle), None)


def free_phandle(root: Node) -> int:
    """A number that no node has yet."""
    return max((node.phandle or 0 for node in walk(root)), default=0) + 1


class _Broken(Exception):  # noqa: N818 - caught in this module
    """The sentence's second half about a tree that is not as the specification has it."""


def parse(blob: bytes, what: str) -> Tree:
    """The tree in a blob; bytes behind its own length are ignored.

    :param what: names the blob in errors.
    :raises TopologyError: it is no device tree, or a broken one.
    """
    if len(blob) < _HEADER.size or _CELL.unpack_from(blob)[0] != _MAGIC:
        raise TopologyError(f"{what}: not a flattened device tree: it begins {bytes(blob[:4])!r}")
    header = _HEADER.unpack_from(blob)
    _, total, structure, strings, reservations, version, compatible, boot_cpu, strings_size, structure_size = header
    if not _HEADER.size <= total <= len(blob):
        raise TopologyError(f"{what}: the device tree says it has {total} bytes, and the file has {len(blob)}")
    if not compatible <= _VERSION <= version:
        raise TopologyError(f"{what}: the device tree has format version {version}; {_VERSION} is read here")
    image = bytes(blob[:total])
    try:
        root = _nodes(_block(image, structure, structure_size), _block(image, strings, strings_size))
        return Tree(root, _reservations(image, reservations), boot_cpu)
    except _Broken as error:
        raise TopologyError(f"{what}: the device tree is broken: {error}") from error


def _block(image: bytes, offset: int, size: int) -> bytes:
    if offset + size > len(image):
        raise _Broken(f"a block of {size} bytes at {offset:#x} ends beyond it")
    return image[offset : offset + size]


def _reservations(image: bytes, offset: int) -> bytes:
    end = offset
    while any(_block(image, end, _RESERVATION)):
        end += _RESERVATION
    return image[offset : end + _RESERVATION]


def _text(block: bytes, offset: int) -> str:
    end = block.find(b"\0", offset)
    if end < 0:
        raise _Broken(f"the name at {offset:#x} does not end")
    try:
        return block[offset:end].decode("ascii")
    except UnicodeDecodeError as error:
        raise _Broken(f"the name at {offset:#x} is not ASCII") from error


def _nodes(structure: bytes, strings: bytes) -> Node:
    """The root of the nodes in a structure block."""
    open_nodes: list[Node] = []
    root: Node | None = None
    at = 0
    while at + _CELL.size <= len(structure):
        (token,) = _CELL.unpack_from(structure, at)
        at += _CELL.size
        node = open_nodes[-1] if open_nodes else None
        if token == _BEGIN_NODE and (node is not None or root is None):
            name = _text(structure, at)
            at = _aligned(at + len(name) + 1)
            begun = Node(name, node)
            if node is None:
                root = begun
            elif name in node.children or len(open_nodes) == _MAX_DEPTH:
                raise _Broken(f"{begun.path} is there twice, or is more than {_MAX_DEPTH} levels deep")
            else:
                node.children[name] = begun
            open_nodes.append(begun)
        elif token == _END_NODE and node is not None:
            open_nodes.pop()
        elif token == _PROPERTY and node is not None:
            at = _property(node, structure, at, strings)
        elif token == _END and node is None and root is not None:
            return root
        elif token != _NOP:
            raise _Broken(f"the token {token:#x} before {at:#x} of its structure has no place there")
    raise _Broken("its structure does not end")


def _property(node: Node, structure: bytes, at: int, strings: bytes) -> int:
    """Read a property behind its token; returns where the next token is."""
    if at + _PROPERTY_HEAD.size > len(structure):
        raise _Broken(f"a property of {node.path} is cut off")
    length, name_offset = _PROPERTY_HEAD.unpack_from(structure, at)
    at += _PROPERTY_HEAD.size
    name = _text(strings, name_offset)
    if name in node.properties or at + length > len(structure):
        raise _Broken(f"the property {name} of {node.path} is there twice, or is cut off")
    node.properties[name] = structure[at : at + length]
    return _aligned(at + length)


def _aligned(offset: int) -> int:
    return offset + 3 & ~3


def _filled(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def serialise(tree: Tree) -> bytes:
    """The tree as a blob without any padding.

    QEMU pads what it dumps to a mebibyte, and an arm64 kernel that is given the padded blob hangs without a word.
    """
    strings: dict[str, int] = {}
    names = bytearray()
    structure = bytearray()

    def write(node: Node) -> None:
        structure.extend(_CELL.pack(_BEGIN_NODE) + _filled(node.name.encode() + b"\0"))
        for name, value in node.properties.items():
            if name not in strings:
                strings[name] = len(names)
                names.extend(name.encode() + b"\0")
            structure.extend(_CELL.pack(_PROPERTY) + _PROPERTY_HEAD.pack(len(value), strings[name]) + _filled(value))
        for child in node.children.values():
            write(child)
        structure.extend(_CELL.pack(_END_NODE))

    write(tree.root)
    structure.extend(_CELL.pack(_END))
    # Reservations must lie on a multiple of 8 and the structure on one of 4; header and entries make it so.
    reservations_at = _HEADER.size
    structure_at = reservations_at + len(tree.reservations)
    strings_at = structure_at + len(structure)
    total = strings_at + len(names)
    header = _HEADER.pack(
        *(_MAGIC, total, structure_at, strings_at, reservations_at),
        *(_VERSION, _COMPATIBLE, tree.boot_cpu, len(names), len(structure)),
    )
    return b"".join((header, tree.reservations, structure, names))
