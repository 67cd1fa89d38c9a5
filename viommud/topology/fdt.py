"""Flattened device trees: the one module that touches libfdt.

A blob is read into plain nodes; changes go to libfdt, which knows the format and packs the result.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from viommud.errors import UsageError
from viommud.topology.errors import TopologyError

_MAGIC = b"\xd0\x0d\xfe\xed"
_HEADER_BYTES = 40
_MAX_BLOB = 64 << 20
_MAX_DEPTH = 64


def _libfdt() -> Any:
    try:
        return importlib.import_module("libfdt")
    except ImportError as error:
        raise UsageError(
            "device trees need the Python module libfdt",
            hint="pip install 'viommud[topology]', or Debian's python3-libfdt",
        ) from error


@dataclass(slots=True)
class Node:
    """A node of a tree."""

    path: str
    parent: Node | None
    properties: dict[str, bytes]
    children: list[Node] = field(default_factory=list)

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


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it, in the tree's order."""
    yield node
    for child in node.children:
        yield from walk(child)


def parse(blob: bytes, what: str) -> Node:
    """The root of the tree in a blob; bytes behind its own length are ignored.

    :param what: names the blob in errors.
    :raises TopologyError: it is no device tree, or a broken one.
    """
    if len(blob) < _HEADER_BYTES or blob[:4] != _MAGIC:
        raise TopologyError(f"{what}: not a flattened device tree: it begins {bytes(blob[:4])!r}")
    total = int.from_bytes(blob[4:8], "big")
    if not _HEADER_BYTES <= total <= min(len(blob), _MAX_BLOB):
        raise TopologyError(f"{what}: the device tree says it has {total} bytes, and the file has {len(blob)}")
    libfdt = _libfdt()
    try:
        return _node(libfdt, libfdt.FdtRo(bytes(blob[:total])), 0, None, 0)
    except libfdt.FdtException as error:
        raise TopologyError(f"{what}: the device tree is broken: {error}") from error


def _node(libfdt: Any, tree: Any, offset: int, parent: Node | None, depth: int) -> Node:
    if depth > _MAX_DEPTH:
        raise TopologyError(f"the device tree is more than {_MAX_DEPTH} levels deep")
    path = "/" if parent is None else f"{parent.path.rstrip('/')}/{tree.get_name(offset)}"
    node = Node(path, parent, {})
    at = tree.first_property_offset(offset, [libfdt.NOTFOUND])
    while at >= 0:
        found = tree.get_property_by_offset(at)
        node.properties[found.name] = bytes(found)
        at = tree.next_property_offset(at, [libfdt.NOTFOUND])
    child = tree.first_subnode(offset, [libfdt.NOTFOUND])
    while child >= 0:
        node.children.append(_node(libfdt, tree, child, node, depth + 1))
        child = tree.next_subnode(child, [libfdt.NOTFOUND])
    return node


def find_phandle(root: Node, phandle: int) -> Node | None:
    """The node that others refer to by this number."""
    return next((node for node in walk(root) if node.phandle == phandle), None)


def free_phandle(root: Node) -> int:
    """A number that no node has yet."""
    return max((node.phandle or 0 for node in walk(root)), default=0) + 1


def amend(blob: bytes, nodes: Sequence[tuple[str, dict[str, bytes]]]) -> bytes:
    """The tree with properties set on nodes, and packed; a node that is not there yet is made.

    QEMU pads what it dumps to a mebibyte, and a kernel that is given the padded blob hangs: hence packed.

    :param nodes: path and properties of each; a new node's parent exists.
    """
    libfdt = _libfdt()
    tree = libfdt.Fdt(bytearray(blob[: int.from_bytes(blob[4:8], "big")]))
    room = sum(
        len(path) + 32 + sum(len(name) + len(value) + 32 for name, value in properties.items())
        for path, properties in nodes
    )
    tree.resize(tree.totalsize() + room)
    for path, properties in nodes:
        offset = tree.path_offset(path, [libfdt.NOTFOUND])
        if offset < 0:
            parent, _, name = path.rpartition("/")
            offset = tree.add_subnode(tree.path_offset(parent or "/"), name)
        # libfdt puts a new property first: backwards, so that they read in the order given.
        for name, value in reversed(properties.items()):
            tree.setprop(offset, name, value)
    tree.pack()
    return bytes(tree.as_bytearray()[: tree.totalsize()])
