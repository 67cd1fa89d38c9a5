"""Base device trees for tests, as a machine monitor writes them, and a reader made from the format's specification."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import libfdt  # type: ignore[import-untyped]

Value = bytes | str | Sequence[int]


def encode(value: Value) -> bytes:
    """A property's value: bytes as they are, a string with its end, numbers as 32-bit cells."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode() + b"\0"
    return struct.pack(f">{len(value)}I", *value)


@dataclass
class Branch:
    """A node to be written."""

    properties: Mapping[str, Value] = field(default_factory=dict)
    children: Mapping[str, Branch] = field(default_factory=dict)


def host_bridge(
    base: int, segment: int | None = 0, buses: tuple[int, int] = (0, 255), children: Mapping[str, Branch] | None = None
) -> Branch:
    """A PCI host bridge as that of QEMU's virt."""
    properties: dict[str, Value] = {
        "device_type": "pci",
        "compatible": "pci-host-ecam-generic",
        "#address-cells": [3],
        "#size-cells": [2],
        "bus-range": list(buses),
        "reg": [base >> 32, base & 0xFFFFFFFF, 0, 0x1000_0000],
        "ranges": [0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2EFF_0000],
    }
    if segment is not None:
        properties["linux,pci-domain"] = [segment]
    return Branch(properties, children or {})


def mmio_slot(base: int) -> Branch:
    """A virtio-mmio window as QEMU's virt has 32 of."""
    return Branch({"compatible": "virtio,mmio", "reg": [0, base, 0, 0x200], "interrupts": [0, 47, 1]})


def virt(**more: Branch) -> Branch:
    """A machine like QEMU's virt: interrupt controller, two virtio-mmio windows, one host bridge, a platform bus."""
    return Branch(
        {"#address-cells": [2], "#size-cells": [2], "compatible": "linux,dummy-virt", "interrupt-parent": [0x8002]},
        {
            "intc@8000000": Branch({"phandle": [0x8002], "#interrupt-cells": [3], "reg": [0, 0x800_0000, 0, 0x10000]}),
            "virtio_mmio@a003c00": mmio_slot(0xA00_3C00),
            "virtio_mmio@a003e00": mmio_slot(0xA00_3E00),
            "pcie@10000000": host_bridge(0x40_1000_0000),
            "platform-bus@c000000": Branch(
                {
                    "compatible": "simple-bus",
                    "#address-cells": [1],
                    "#size-cells": [1],
                    "ranges": [0, 0, 0xC00_0000, 0x200_0000],
                },
                {"ethernet@1000": Branch({"reg": [0x1000, 0x1000]})},
            ),
            **more,
        },
    )


def blob(root: Branch, *, pad: int = 0) -> bytes:
    """The flattened tree, padded as QEMU pads what it dumps."""
    tree = libfdt.Fdt.create_empty_tree(1 << 16)
    _write(tree, 0, root)
    tree.pack()
    if pad:
        tree.resize(pad)
    return bytes(tree.as_bytearray()[: tree.totalsize()])


def _write(tree: Any, offset: int, branch: Branch) -> None:
    for name, value in reversed(list(branch.properties.items())):
        tree.setprop(offset, name, encode(value))
    for name, child in reversed(list(branch.children.items())):
        _write(tree, tree.add_subnode(offset, name), child)


def opened(image: bytes) -> Any:
    """A blob as libfdt sees it."""
    return libfdt.FdtRo(image)


FDT_BEGIN, FDT_END_NODE, FDT_PROP, FDT_NOP, FDT_END = 1, 2, 3, 4, 9


def read(image: bytes) -> dict[str, dict[str, bytes]]:
    """Every node of a flattened tree by path, read by the layout of the Devicetree specification, section 5."""
    magic, total, structs, strings, _, version, _, _, strings_size, structs_size = struct.unpack_from(">10I", image)
    assert (magic, total, version) == (0xD00DFEED, len(image), 17)
    assert strings + strings_size <= total
    nodes: dict[str, dict[str, bytes]] = {}
    path: list[str] = []
    at = structs
    while True:
        (token,) = struct.unpack_from(">I", image, at)
        at += 4
        if token == FDT_BEGIN:
            end = image.index(b"\0", at)
            path.append(image[at:end].decode())
            nodes["/".join(path) or "/"] = {}
            at = end + 4 & ~3
        elif token == FDT_END_NODE:
            path.pop()
        elif token == FDT_PROP:
            length, name = struct.unpack_from(">II", image, at)
            at += 8
            key = image[strings + name : image.index(b"\0", strings + name)].decode()
            nodes["/".join(path) or "/"][key] = image[at : at + length]
            at = at + length + 3 & ~3
        elif token == FDT_END:
            assert at == structs + structs_size
            return nodes
        else:
            assert token == FDT_NOP


def cells(value: bytes) -> list[int]:
    """A property as 32-bit numbers."""
    return list(struct.unpack(f">{len(value) // 4}I", value))
