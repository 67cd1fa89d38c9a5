"""The topology in a device tree.

Sources: Documentation/devicetree/bindings/virtio/pci-iommu.yaml, virtio/mmio.yaml and pci/pci-iommu.txt of Linux;
the names of properties are theirs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from viommud.topology import fdt
from viommud.topology.description import Described, Description
from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint, Topology
from viommud.topology.place import MAX_RID, MmioPlace, PciPlace, Place

_PCI_COMPATIBLE = ("virtio,pci-iommu", "pci1af4,1057")
_MMIO_COMPATIBLE = "virtio,mmio"
_CELL = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class _Phandle:
    """In a property: the number of the IOMMU's node."""


_IOMMU = _Phandle()
_Cells = tuple[int | _Phandle, ...]


@dataclass(frozen=True, slots=True)
class _Edit:
    """What to set on a node."""

    path: str
    new: bool
    properties: dict[str, _Cells | tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _HostBridge:
    """A PCI host bridge of the tree."""

    node: fdt.Node
    segment: int
    first_rid: int
    last_rid: int

    def __str__(self) -> str:
        return (
            f"{self.node.path} (segment {self.segment:04x}, buses {self.first_rid >> 8:02x}-{self.last_rid >> 8:02x})"
        )


def render(topology: Topology, base: bytes, what: str) -> bytes:
    """The base tree with the topology in it, packed.

    :param base: a tree without an IOMMU, as QEMU's -machine dumpdtb= writes it.
    :param what: names the base in errors.
    :raises TopologyError: the base does not have what the topology names, or has an IOMMU already.
    """
    tree = fdt.parse(base, what)
    edits = _edits(topology, tree.root, what)
    phandle = _iommu_phandle(tree.root, edits)
    nodes = {node.path: node for node in fdt.walk(tree.root)}
    for edit in edits:
        if edit.new:
            parent, _, name = edit.path.rpartition("/")
            nodes[edit.path] = nodes[parent].children[name] = fdt.Node(name, nodes[parent])
        nodes[edit.path].properties.update(_encoded(edit, phandle))
    return fdt.serialise(tree)


def overlay(topology: Topology, base: bytes, what: str) -> str:
    """The same as a device tree overlay in source form.

    :raises TopologyError: as :func:`render`.
    """
    root = fdt.parse(base, what).root
    edits = _edits(topology, root, what)
    existing = next((node.phandle for node in fdt.walk(root) if node.path == edits[0].path), None)
    reference = "&viommu" if existing is None else f"{existing:#x}"
    lines = ["/dts-v1/;", "/plugin/;", "", "/ {"]
    for number, edit in enumerate(edits):
        label = "viommu: " if number == 0 and existing is None else ""
        target, _, name = edit.path.rpartition("/") if edit.new else (edit.path, "", "")
        lines += [f"\tfragment@{number} {{", f'\t\ttarget-path = "{target or "/"}";']
        if edit.new:
            lines += ["\t\t__overlay__ {", f"\t\t\t{label}{name} {{"]
        else:
            lines += [f"\t\t{label}__overlay__ {{"]
        indent = "\t\t\t\t" if edit.new else "\t\t\t"
        lines += [f"{indent}{key} = {_source(value, reference)};" for key, value in edit.properties.items()]
        lines += ["\t\t\t};"] if edit.new else []
        lines += ["\t\t};", "\t};"]
    return "\n".join([*lines, "};", ""])


def _source(value: _Cells | tuple[str, ...], reference: str) -> str:
    if all(isinstance(part, str) for part in value):
        return ", ".join(f'"{part}"' for part in value)
    return "<" + " ".join(reference if part is _IOMMU else f"{part:#x}" for part in value) + ">"


def _encoded(edit: _Edit, phandle: int) -> dict[str, bytes]:
    return {
        name: b"".join(
            part.encode() + b"\0"
            if isinstance(part, str)
            else _CELL.pack(phandle if isinstance(part, _Phandle) else part)
            for part in value
        )
        for name, value in edit.properties.items()
    }


def _iommu_phandle(root: fdt.Node, edits: Sequence[_Edit]) -> int:
    """The number of the IOMMU's node, which the first edit makes or amends; a new number is added to that edit."""
    existing = next((node.phandle for node in fdt.walk(root) if node.path == edits[0].path), None)
    if existing is not None:
        return existing
    phandle = fdt.free_phandle(root)
    edits[0].properties["phandle"] = (phandle,)
    return phandle


def _edits(topology: Topology, root: fdt.Node, what: str) -> list[_Edit]:
    """What to change, the IOMMU's own node first."""
    bridges = _host_bridges(root, what)
    for node in fdt.walk(root):
        for name in ("iommu-map", "iommus"):
            if name in node.properties:
                raise TopologyError(
                    f"{what}: {node.path} has the property {name} already", hint="dump the tree without any IOMMU"
                )
    edits = [_iommu_edit(topology.iommu, root, bridges, what)]
    placed = 0
    for bridge in bridges:
        parts = [part for listed in topology.pci if (part := _clip(listed, bridge)) is not None]
        if parts:
            placed += sum(part.count for part in parts)
            cells = tuple(cell for part in parts for cell in (part.first_rid, _IOMMU, part.first_id, part.count))
            edits.append(_Edit(bridge.node.path, False, {"iommu-map": cells}))
    if placed != sum(part.count for part in topology.pci):
        missing = ", ".join(str(part) for part in topology.pci if not any(_clip(part, b) == part for b in bridges))
        raise TopologyError(f"{what}: endpoint {missing} is on no bus of a PCI host bridge: {_names(bridges)}")
    for endpoint in topology.platform:
        device = _at(root, endpoint.base)
        if device is None:
            raise TopologyError(f"{what}: the platform endpoint {endpoint.id:#x}: no device is at {endpoint.base:#x}")
        edits.append(_Edit(device.path, False, {"iommus": (_IOMMU, endpoint.id)}))
    return edits


def _iommu_edit(place: Place, root: fdt.Node, bridges: Sequence[_HostBridge], what: str) -> _Edit:
    if isinstance(place, MmioPlace):
        return _mmio_edit(place, root, what)
    if not bridges:
        raise TopologyError(f"{what}: the tree has no PCI host bridge, and the IOMMU is the PCI function {place}")
    home = next((b for b in bridges if b.segment == place.segment and b.first_rid <= place.rid <= b.last_rid), None)
    if home is None:
        raise TopologyError(f"{what}: the IOMMU's place {place} is on no bus of a PCI host bridge: {_names(bridges)}")
    if place.rid >> 8 != home.first_rid >> 8:
        raise TopologyError(
            f"{what}: the IOMMU's place {place} is behind a bridge; a device tree can name it on bus"
            f" {home.first_rid >> 8:02x} of {home.node.path}"
        )
    for child in home.node.children.values():
        reg = child.cells("reg")
        if reg and reg[0] >> 8 & 0xFF == place.rid & 0xFF:
            raise TopologyError(f"{what}: the IOMMU's place {place} is taken by {child.path}")
    slot, function = place.rid >> 3 & 0x1F, place.rid & 7
    return _Edit(
        f"{home.node.path}/iommu@{slot:x},{function:x}",
        True,
        {"compatible": _PCI_COMPATIBLE, "reg": (place.rid << 8, 0, 0, 0, 0), "#iommu-cells": (1,)},
    )


def _mmio_edit(place: MmioPlace, root: fdt.Node, what: str) -> _Edit:
    for node in fdt.walk(root):
        for number, (base, span) in enumerate(node.windows()):
            if base > place.last or place.base >= base + span:
                continue
            if number or base != place.base or _MMIO_COMPATIBLE not in node.strings("compatible"):
                raise TopologyError(f"{what}: the IOMMU's place {place} is taken by {node.path}")
            if "#iommu-cells" in node.properties:
                raise TopologyError(f"{what}: {node.path} is an IOMMU already", hint="dump the tree without any IOMMU")
            return _Edit(node.path, False, {"#iommu-cells": (1,)})
    candidates = (node for node in fdt.walk(root) if _MMIO_COMPATIBLE in node.strings("compatible"))
    slots = [base for node in candidates for base, _ in node.windows()]
    known = f"; there are some from {min(slots):#x} to {max(slots):#x}" if slots else ""
    raise TopologyError(f"{what}: no virtio-mmio window is at the IOMMU's place {place}{known}")


def _at(root: fdt.Node, base: int) -> fdt.Node | None:
    """The device whose first register window begins here."""
    return next((node for node in fdt.walk(root) if node.windows()[:1] and node.windows()[0][0] == base), None)


def _host_bridges(root: fdt.Node, what: str) -> list[_HostBridge]:
    nodes = [
        node
        for node in fdt.walk(root)
        if node.strings("device_type") == ["pci"]
        and (node.parent is None or node.parent.strings("device_type") != ["pci"])
    ]
    found = []
    for number, node in enumerate(nodes):
        buses = node.cells("bus-range") or [0, 0xFF]
        if len(buses) != 2 or not buses[0] <= buses[1] <= 0xFF:
            raise TopologyError(f"{what}: {node.path}: the property bus-range is not two bus numbers")
        segment = node.cell("linux,pci-domain", number)
        found.append(_HostBridge(node, segment, buses[0] << 8, buses[1] << 8 | 0xFF))
    return found


def _clip(part: PciRange, bridge: _HostBridge) -> PciRange | None:
    """The functions of a range that are behind a bridge."""
    first, last = max(part.first_rid, bridge.first_rid), min(part.last_rid, bridge.last_rid)
    if part.segment != bridge.segment or first > last:
        return None
    return PciRange(part.segment, first, last, part.first_id + first - part.first_rid)


def _names(bridges: Iterable[_HostBridge]) -> str:
    return "there is " + (", ".join(map(str, bridges)) or "none")


def read(blob: bytes, what: str) -> Description:
    """What a tree says about virtio IOMMUs and the devices behind them; other IOMMUs are passed over.

    :param what: names the tree in errors.
    :raises TopologyError: it is no device tree, or malformed where this matters.
    """
    root = fdt.parse(blob, what).root
    bridges = _host_bridges(root, what)
    iommus = {node.path: place for node in fdt.walk(root) if (place := _iommu_place(node, bridges, what)) is not None}
    endpoints: list[Described] = []
    for bridge in bridges:
        endpoints += _mapped(bridge, root, iommus, what)
    for node in fdt.walk(root):
        cells = node.cells("iommus")
        if cells is None:
            continue
        target = _target(root, cells[0] if cells else 0, node, what)
        if target.path in iommus:
            windows = node.windows()
            if len(cells) != 2 or not windows:
                raise TopologyError(f"{what}: {node.path}: iommus is not one IOMMU and one ID, or reg is missing")
            endpoints.append(Described(PlatformEndpoint(cells[1], windows[0][0]), iommus[target.path]))
    return Description(tuple(iommus.values()), tuple(endpoints))


def _iommu_place(node: fdt.Node, bridges: Sequence[_HostBridge], what: str) -> Place | None:
    compatible = node.strings("compatible")
    if any(name in compatible for name in _PCI_COMPATIBLE):
        home = next((bridge for bridge in bridges if bridge.node is node.parent), None)
        reg = node.cells("reg")
        if home is None or not reg:
            raise TopologyError(f"{what}: {node.path} is an IOMMU on PCI without a host bridge above it or without reg")
        return PciPlace(home.segment, reg[0] >> 8 & MAX_RID)
    if _MMIO_COMPATIBLE in compatible and "#iommu-cells" in node.properties:
        windows = node.windows()
        if not windows:
            raise TopologyError(f"{what}: {node.path} is an IOMMU on MMIO without a window")
        return MmioPlace(*windows[0])
    return None


def _mapped(bridge: _HostBridge, root: fdt.Node, iommus: dict[str, Place], what: str) -> Iterable[Described]:
    cells = bridge.node.cells("iommu-map") or []
    if len(cells) % 4:
        raise TopologyError(f"{what}: {bridge.node.path}: iommu-map is not made of entries of 4 cells")
    if bridge.node.cell("iommu-map-mask", MAX_RID) & MAX_RID != MAX_RID:
        raise TopologyError(f"{what}: {bridge.node.path}: iommu-map-mask makes functions share an ID")
    for at in range(0, len(cells), 4):
        first_rid, phandle, first_id, count = cells[at : at + 4]
        target = _target(root, phandle, bridge.node, what)
        if target.path not in iommus:
            continue
        if count == 0 or first_rid + count - 1 > MAX_RID:
            raise TopologyError(
                f"{what}: {bridge.node.path}: iommu-map has {count:#x} functions from {first_rid:#x} on"
            )
        part = PciRange(bridge.segment, first_rid, first_rid + count - 1, first_id)
        yield Described(part, iommus[target.path])


def _target(root: fdt.Node, phandle: int, source: fdt.Node, what: str) -> fdt.Node:
    node = fdt.find_phandle(root, phandle)
    if node is None:
        raise TopologyError(f"{what}: {source.path} refers to an IOMMU by the phandle {phandle:#x}, which no node has")
    return node
