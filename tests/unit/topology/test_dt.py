"""The topology in a device tree, read back by the format's specification and, where it is there, by dtc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from unit.topology import trees
from unit.topology.making import TWO_SEGMENTS, topology
from unit.topology.trees import Branch, blob, cells, host_bridge, virt
from viommud.topology import dt, fdt
from viommud.topology.description import Described
from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint, Topology
from viommud.topology.place import MmioPlace, PciPlace

PCIE = "/pcie@10000000"
SLOT = "/virtio_mmio@a003e00"


def render(made: Topology, base: Branch) -> dict[str, dict[str, bytes]]:
    """Every node of the rendered tree."""
    return trees.read(dt.render(made, blob(base), "base.dtb"))


def test_an_iommu_on_pci() -> None:
    """The IOMMU is a child of the host bridge as the binding says, and the bridge maps exactly the endpoints."""
    nodes = render(topology([(0x10, 0x10), (0x18, 0x1F)]), virt())
    iommu = nodes[f"{PCIE}/iommu@1,0"]
    assert iommu["compatible"] == b"virtio,pci-iommu\0pci1af4,1057\0"
    assert cells(iommu["reg"]) == [0x800, 0, 0, 0, 0]
    assert cells(iommu["#iommu-cells"]) == [1]
    assert "iommus" not in iommu
    (phandle,) = cells(iommu["phandle"])
    assert cells(nodes[PCIE]["iommu-map"]) == [0x10, phandle, 0x10, 1, 0x18, phandle, 0x18, 8]


def test_nothing_else_changes() -> None:
    """Every other node and property is as it was, and no number of a node is used twice."""
    before = trees.read(blob(virt()))
    after = render(topology([(0x10, 0x10)]), virt())
    assert set(after) == {*before, f"{PCIE}/iommu@1,0"}
    phandle = after[f"{PCIE}/iommu@1,0"]["phandle"]
    for path, properties in before.items():
        extra = {"iommu-map"} if path == PCIE else set()
        assert {name: value for name, value in after[path].items() if name not in extra} == properties
        assert properties.get("phandle") != phandle


def test_the_result_is_packed() -> None:
    """A base padded to a mebibyte becomes a tree without padding: a kernel hangs on a padded one."""
    made = topology([(0x10, 0x10)])
    padded, plain = (dt.render(made, blob(virt(), pad=pad), "base") for pad in (1 << 20, 0))
    assert padded == plain
    assert len(plain) < len(blob(virt())) + 512
    trees.read(plain)


def test_libfdt_reads_the_result() -> None:
    """The library that kernels and firmware use finds the new node by its number."""
    image = dt.render(topology([(0x10, 0x10)]), blob(virt()), "base")
    tree = trees.opened(image)
    offset = tree.path_offset(PCIE)
    phandle = tree.getprop(offset, "iommu-map").as_uint32_list()[1]
    assert tree.get_path(tree.node_offset_by_phandle(phandle)) == f"{PCIE}/iommu@1,0"


def test_reservations_and_boot_processor_stay() -> None:
    """What stands beside the nodes of the base is in the result."""
    header = bytearray(blob(virt()))
    header[28:32] = (3).to_bytes(4, "big")
    tree = fdt.parse(bytes(header), "base")
    tree.reservations = (0x4000_0000).to_bytes(8, "big") + (0x1000).to_bytes(8, "big") + bytes(16)
    result = trees.opened(dt.render(topology([(0x10, 0x10)]), fdt.serialise(tree), "base"))
    assert result.boot_cpuid_phys() == 3
    assert result.num_mem_rsv() == 1
    assert tuple(result.get_mem_rsv(0)) == (0x4000_0000, 0x1000)


def test_an_iommu_on_mmio() -> None:
    """The virtio-mmio window becomes an IOMMU and keeps what it had."""
    nodes = render(topology([(0x10, 0x10)], iommu="mmio:0xa003e00"), virt())
    assert cells(nodes[SLOT]["#iommu-cells"]) == [1]
    assert nodes[SLOT]["compatible"] == b"virtio,mmio\0"
    (phandle,) = cells(nodes[SLOT]["phandle"])
    assert cells(nodes[PCIE]["iommu-map"]) == [0x10, phandle, 0x10, 1]
    assert "#iommu-cells" not in nodes["/virtio_mmio@a003c00"]


def test_a_window_with_a_phandle_keeps_it() -> None:
    """A window that others refer to already is referred to by the same number."""
    base = virt()
    slot = trees.mmio_slot(0xA00_3E00)
    numbered = Branch({**slot.properties, "phandle": [0x77]})
    nodes = render(
        topology([(0x10, 0x10)], iommu="mmio:0xa003e00"),
        Branch(base.properties, {**base.children, "virtio_mmio@a003e00": numbered}),
    )
    assert cells(nodes[SLOT]["phandle"]) == [0x77]
    assert cells(nodes[PCIE]["iommu-map"])[1] == 0x77


@pytest.mark.parametrize("numbered", [True, False])
def test_several_host_bridges(numbered: bool) -> None:
    """Each bridge maps its own functions; bridges without numbers count from 0 as in Linux."""
    base = virt(
        **{
            "pcie@10000000": host_bridge(0x40_1000_0000, 0 if numbered else None),
            "pcie@20000000": host_bridge(0x40_2000_0000, 1 if numbered else None),
            "pcie@30000000": host_bridge(0x40_3000_0000, 2 if numbered else None, (0, 0xF)),
        }
    )
    nodes = render(topology([(0x10, 0x10), (0x1_0018, 0x1_001F)], bridge=TWO_SEGMENTS), base)
    (phandle,) = cells(nodes[f"{PCIE}/iommu@1,0"]["phandle"])
    assert cells(nodes[PCIE]["iommu-map"]) == [0x10, phandle, 0x10, 1]
    assert cells(nodes["/pcie@20000000"]["iommu-map"]) == [0x18, phandle, 0x1_0018, 8]
    assert "iommu-map" not in nodes["/pcie@30000000"]


def test_a_range_over_two_bridges_of_one_segment() -> None:
    """Bridges that share a segment by buses get each its part of a range."""
    base = virt(**{"pcie@10000000": host_bridge(1, 0, (0, 0x7F)), "pcie@20000000": host_bridge(2, 0, (0x80, 0xFF))})
    nodes = render(topology([(0x7FF0, 0x800F)]), base)
    assert [cells(nodes[path]["iommu-map"])[0::2] for path in (PCIE, "/pcie@20000000")] == [
        [0x7FF0, 0x7FF0],
        [0x8000, 0x8000],
    ]
    assert [cells(nodes[path]["iommu-map"])[3] for path in (PCIE, "/pcie@20000000")] == [0x10, 0x10]


def test_a_platform_endpoint() -> None:
    """A device behind a bus is found by its address as the CPU has it, and names IOMMU and ID."""
    made = topology([(0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 0xC00_1000}])
    nodes = render(made, virt())
    (phandle,) = cells(nodes[f"{PCIE}/iommu@1,0"]["phandle"])
    assert cells(nodes["/platform-bus@c000000/ethernet@1000"]["iommus"]) == [phandle, 0x2_0000]


PLATFORM = {"platform": [{"id": 0x2_0000, "base": 0xC00_2000}]}
WITH_MAP = virt(**{"pcie@10000000": Branch({**host_bridge(1).properties, "iommu-map": [0, 0x8002, 0, 0x10000]})})
TAKEN = virt(**{"pcie@10000000": host_bridge(1, children={"virtio_iommu@1,0": Branch({"reg": [0x800, 0, 0, 0, 0]})})})
NO_PCI = Branch(virt().properties, {name: node for name, node in virt().children.items() if "pcie" not in name})


@pytest.mark.parametrize(
    ("endpoints", "section", "base", "sentence"),
    [
        ([(0x10, 0x10)], {}, NO_PCI, "the tree has no PCI host bridge, and the IOMMU is the PCI function 0000:00:01.0"),
        (
            [(0x10, 0x10)],
            {"iommu": "mmio:0xa003e00"},
            NO_PCI,
            "endpoint 0000:00:02.0 is on no bus of a PCI host bridge",
        ),
        ([(0x10, 0x10)], {}, WITH_MAP, "/pcie@10000000 has the property iommu-map already"),
        ([(0x10, 0x10)], {}, TAKEN, "0000:00:01.0 is taken by /pcie@10000000/virtio_iommu@1,0"),
        ([], {"iommu": "mmio:0x8000000"}, virt(), "mmio:0x8000000 is taken by /intc@8000000"),
        ([], {"iommu": "mmio:0xa003f00"}, virt(), "mmio:0xa003f00 is taken by /virtio_mmio@a003e00"),
        ([], {"iommu": "mmio:0xa000000"}, virt(), "there are some from 0xa003c00 to 0xa003e00"),
        ([(0x10, 0x10)], {"iommu": "02:01.0"}, virt(), "0000:02:01.0 is behind a bridge"),
        ([(0x1_0010, 0x1_0010)], {"bridge": TWO_SEGMENTS}, virt(), "endpoint 0001:00:02.0 is on no bus"),
        ([(0x10, 0x10)], {"iommu": "1:00:01.0", "bridge": TWO_SEGMENTS}, virt(), "0001:00:01.0 is on no bus"),
        ([(0x2_0000, 0x2_0000)], PLATFORM, virt(), "endpoint 0x20000: no device is at 0xc002000"),
    ],
)
def test_a_base_that_does_not_fit(
    endpoints: list[tuple[int, int]], section: dict[str, Any], base: Branch, sentence: str
) -> None:
    """What the base lacks or has too much of is told in one sentence that names the base."""
    with pytest.raises(TopologyError, match=r"^base\.dtb: ") as caught:
        dt.render(topology(endpoints, **section), blob(base), "base.dtb")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (b"", "not a flattened device tree"),
        (b"\x7fELF" + bytes(100), "not a flattened device tree"),
        (blob(virt())[:200], "and the file has 200"),
        (blob(virt())[:8] + b"\xff\xff\xff\xff" + blob(virt())[12:], "the device tree is broken"),
    ],
)
def test_a_base_that_is_no_tree(image: bytes, sentence: str) -> None:
    """Bytes that are no device tree are told as such."""
    with pytest.raises(TopologyError, match=r"^base\.dtb: ") as caught:
        dt.render(topology(), image, "base.dtb")
    assert sentence in str(caught.value)


CASES = [
    (topology([(0x10, 0x10), (0x18, 0x1F)]), PciPlace(0, 8)),
    (topology([(0x10, 0x10)], iommu="mmio:0xa003e00"), MmioPlace(0xA00_3E00)),
    (
        topology([(0x10, 0x10), (0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 0xC00_1000}]),
        PciPlace(0, 8),
    ),
]


@pytest.mark.parametrize(("made", "home"), CASES)
def test_it_reads_back(made: Topology, home: PciPlace | MmioPlace) -> None:
    """The reader of `topology check` finds what was written."""
    description = dt.read(dt.render(made, blob(virt()), "base"), "tree")
    assert description.iommus == (home,)
    wanted: list[PciRange | PlatformEndpoint] = [*made.pci, *made.platform]
    assert description.endpoints == tuple(Described(endpoint, home) for endpoint in wanted)


def test_a_tree_of_qemu_s_own_device_is_read() -> None:
    """The layout that QEMU writes for its own virtio-iommu: two ranges around the IOMMU's function."""
    iommu = Branch(
        {
            "compatible": b"virtio,pci-iommu\0pci1af4,1057\0",
            "reg": [0x800, 0, 0, 0, 0],
            "#iommu-cells": [1],
            "phandle": [9],
        }
    )
    bridge = host_bridge(1, children={"virtio_iommu@1,0": iommu})
    mapped = Branch({**bridge.properties, "iommu-map": [0, 9, 0, 8, 9, 9, 9, 0xFFF7]}, bridge.children)
    description = dt.read(blob(virt(**{"pcie@10000000": mapped})), "tree")
    assert [entry.endpoint for entry in description.endpoints] == [PciRange(0, 0, 7, 0), PciRange(0, 9, 0xFFFF, 9)]


@pytest.mark.parametrize(
    ("properties", "sentence"),
    [
        ({"iommu-map": [0, 0x99, 0, 1]}, "by the phandle 0x99, which no node has"),
        ({"iommu-map": [0, 0x8002, 0]}, "not made of entries of 4 cells"),
        ({"iommu-map-mask": [0xFF]}, "iommu-map-mask makes functions share an ID"),
        ({"bus-range": [3]}, "bus-range is not two bus numbers"),
        ({"iommu-map": b"abc"}, "which are no 32-bit cells"),
        ({"linux,pci-domain": [1, 2]}, "has 2 cells in place of 1"),
    ],
)
def test_a_malformed_tree_is_refused(properties: dict[str, trees.Value], sentence: str) -> None:
    """What no kernel could use is told with the node and the property."""
    bridge = Branch({**host_bridge(1).properties, **properties})
    with pytest.raises(TopologyError) as caught:
        dt.read(blob(virt(**{"pcie@10000000": bridge})), "tree")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("made", "home"), CASES)
def test_the_overlay_makes_the_same_tree(made: Topology, home: PciPlace | MmioPlace, tmp_path: Path) -> None:
    """Compiled and applied by the tools of the device tree compiler, the overlay gives what `-o` writes."""
    if shutil.which("fdtoverlay") is None:
        pytest.skip("no dtc here")
    base = blob(virt(), pad=1 << 16)
    (tmp_path / "base.dtb").write_bytes(base)
    (tmp_path / "overlay.dts").write_text(dt.overlay(made, base, "base.dtb"))
    for command in (
        "dtc -q -@ -I dts -O dtb -o overlay.dtbo overlay.dts",
        "fdtoverlay -i base.dtb -o applied.dtb overlay.dtbo",
        "dtc -q -I dtb -O dtb -o packed.dtb applied.dtb",
    ):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    applied = dt.read((tmp_path / "packed.dtb").read_bytes(), "applied")
    assert applied == dt.read(dt.render(made, base, "base.dtb"), "rendered")
    assert applied.iommus == (home,)


def test_the_overlay_needs_no_label_for_a_numbered_window() -> None:
    """An IOMMU that has a number already is referred to by it."""
    base = virt(**{"virtio_mmio@a003e00": Branch({**trees.mmio_slot(0xA00_3E00).properties, "phandle": [0x77]})})
    text = dt.overlay(topology([(0x10, 0x10)], iommu="mmio:0xa003e00"), blob(base), "base.dtb")
    assert "iommu-map = <0x10 0x77 0x10 0x1>;" in text
    assert "viommu" not in text
