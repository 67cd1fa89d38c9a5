"""VIOT, IORT and the draft of 2019, read by readers written from the layouts; iasl where it knows a table."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from unit.topology import tables
from unit.topology.making import TWO_SEGMENTS, topology
from viommud.topology import cpio, iort, viot, viot_v5
from viommud.topology.description import Described
from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint
from viommud.topology.place import PciPlace


def test_viot_lists_exactly_the_endpoints() -> None:
    """A guest finds the ID of every listed function, and of no other: not of its neighbours, not of the IOMMU."""
    nodes = tables.viot(viot.render(topology([(0x10, 0x10), (0x1_0018, 0x1_001F)], bridge=TWO_SEGMENTS)))
    assert [(node.kind, node.fields) for node in nodes if node.kind > 2] == [(3, {"segment": 0, "bdf": 8})]
    iommu = nodes[0].offset
    assert tables.linux_endpoint(nodes, 0, 0x10) == (0x10, iommu)
    assert tables.linux_endpoint(nodes, 1, 0x18) == (0x1_0018, iommu)
    assert tables.linux_endpoint(nodes, 1, 0x1F) == (0x1_001F, iommu)
    for segment, bdf in ((0, 8), (0, 0xF), (0, 0x11), (1, 0x10), (1, 0x17), (1, 0x20)):
        assert tables.linux_endpoint(nodes, segment, bdf) is None


def test_viot_on_mmio_with_a_platform_endpoint() -> None:
    """An IOMMU on MMIO and an endpoint on MMIO have nodes of their own kinds."""
    made = topology([(0x2_0000, 0x2_0000)], iommu="mmio:0xa003e00", platform=[{"id": 0x2_0000, "base": 0x1_0000_1000}])
    nodes = tables.viot(viot.render(made))
    assert [node.kind for node in nodes] == [4, 2]
    assert nodes[0].fields == {"base_address": 0xA00_3E00}
    assert nodes[1].fields == {"endpoint": 0x2_0000, "base_address": 0x1_0000_1000, "output_node": nodes[0].offset}


def test_viot_of_one_range_is_byte_for_byte_what_qemu_makes() -> None:
    """Node by node the bytes are those of QEMU's own table for the same topology; only its header's names differ."""
    image = viot.render(topology([(0x10, 0xFF)]))
    # hw/acpi/viot.c: count, first node, reserved; the virtio-pci node; one range of a host bridge.
    assert image[36:] == bytes.fromhex(
        "0200 3000 0000000000000000  03 00 1000 0000 0800 0000000000000000"
        "01 00 1800 10000000 0000 0000 1000 ff00 3000 000000000000".replace(" ", "")
    )


def test_viot_reads_back() -> None:
    """The reader of `topology check` finds what was written."""
    made = topology([(0x10, 0x1F), (0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 0x5000}])
    description = viot.read(viot.render(made), "table")
    home = PciPlace(0, 8)
    assert description.iommus == (home,)
    assert description.endpoints == (
        Described(PciRange(0, 0x10, 0x1F, 0x10), home),
        Described(PlatformEndpoint(0x2_0000, 0x5000), home),
    )


def broken(image: bytes, at: int, value: int) -> bytes:
    """A table with one byte changed and the checksum right again."""
    changed = bytearray(image)
    changed[at] = value
    changed[9] = 0
    changed[9] = -sum(changed) & 0xFF
    return bytes(changed)


GOOD = viot.render(topology([(0x10, 0x10)]))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (b"", "no ACPI table with the signature VIOT"),
        (b"IORT" + GOOD[4:], "no ACPI table with the signature VIOT"),
        (GOOD[:-1], "the table says it has 88 bytes, and the file has 87"),
        (GOOD[:60] + b"\x01" + GOOD[61:], "the checksum is wrong"),
        (broken(GOOD[:40], 4, 40), "a VIOT has at least 48 bytes"),
        (broken(GOOD, 36, 3), "the header counts 3 nodes, and the table ends after 2"),
        (broken(GOOD, 38, 47), "inside the table's header"),
        (broken(GOOD, 50, 15), "the node at 0x30 (type 3) cannot have 15 bytes"),
        (broken(GOOD, 50, 0), "the node at 0x30 (type 3) cannot have 0 bytes"),
        (broken(GOOD, 64 + 16, 64), "refers to 0x40, where no IOMMU is"),
        (broken(GOOD, 64 + 12, 0x11), "ends before it begins"),
    ],
)
def test_a_broken_viot_is_refused(image: bytes, sentence: str) -> None:
    """A table that a kernel would refuse, or that is none, is told in one sentence naming the file."""
    with pytest.raises(TopologyError, match=r"^some\.aml: ") as caught:
        viot.read(image, "some.aml")
    assert sentence in str(caught.value)


def test_viot_counts_its_nodes() -> None:
    """More ranges than the table's 16-bit count are refused, not cut off."""
    bridges = [{"segment": segment} for segment in range(3)]
    every_second = [(number, number) for number in range(0x10, 0x2_0010 + 0x10, 2)]
    with pytest.raises(TopologyError, match="VIOT holds 65535 nodes"):
        viot.render(topology(every_second, bridge=bridges))


def test_iort_on_pci() -> None:
    """Listed functions go to the IOMMU's node with their IDs; the IOMMU itself and others go nowhere."""
    nodes = tables.iort(iort.render(topology([(0x10, 0x17), (0x1_0000, 0x1_0000)], bridge=TWO_SEGMENTS)))
    iommu, first, second = nodes
    assert (iommu.kind, len(iommu.data)) == (0x80, 40)
    assert tables.number(iommu.data, 0, 4) == 8
    assert (tables.number(iommu.data, 16, 4), tables.number(iommu.data, 20, 4)) == (1, 1)
    assert not iommu.mappings
    assert (first.kind, tables.number(first.data, 12, 4)) == (2, 0)
    assert (second.kind, tables.number(second.data, 12, 4)) == (2, 1)
    assert tables.translate(first, 0x17) == (0x17, iommu.offset)
    assert tables.translate(first, 8) is None
    assert tables.translate(first, 0x18) is None
    assert tables.translate(second, 0) == (0x1_0000, iommu.offset)


def test_iort_on_mmio() -> None:
    """An IOMMU on MMIO has its window and interrupt in its node, and a named component its single ID."""
    made = topology(
        [(0x2_0000, 0x2_0000)],
        iommu="mmio:0xa003e00",
        interrupt=79,
        platform=[{"id": 0x2_0000, "base": 0x5000, "acpi": r"\_SB.VR00"}],
    )
    iommu, complex_, named = tables.iort(iort.render(made))
    assert [tables.number(iommu.data, at, size) for at, size in ((0, 8), (8, 8), (16, 4), (20, 4), (24, 8))] == [
        0xA00_3E00,
        0x200,
        0,
        1,
        79,
    ]
    assert len(iommu.data) == 40
    assert complex_.kind == 2
    assert named.kind == 1
    assert named.data[13:].split(b"\0")[0] == rb"\_SB.VR00"
    assert named.mappings == [(0, 0, 0x2_0000, iommu.offset, 1)]


def test_iort_with_an_interrupt_translation_service() -> None:
    """With an ITS, every function reaches it with its requester ID, listed ones through the IOMMU."""
    made = topology([(0x10, 0x10), (0xFFFF, 0xFFFF)])
    group, iommu, root = tables.iort(iort.render(made, its=[0]))
    assert group.kind == 0
    assert group.data == bytes.fromhex("01000000 00000000")
    for rid in (0, 8, 0x0F, 0x11, 0xFFFE):
        assert tables.translate(root, rid) == (rid, group.offset)
    for rid in (0x10, 0xFFFF):
        assert tables.translate(root, rid) == (rid, iommu.offset)
        assert tables.translate(iommu, rid) == (rid, group.offset)


def test_the_draft_of_2019_wraps_an_iort() -> None:
    """Behind header and 12 reserved bytes is a whole IORT with the draft's own node types."""
    image = viot_v5.render(topology([(0x10, 0x10)]))
    body = tables.body(image, b"VIOT")
    assert body[:12] == bytes(12)
    iommu, root = tables.iort(body[12:])
    assert (iommu.kind, iommu.data) == (0x80, (8).to_bytes(4, "little"))
    assert tables.translate(root, 0x10) == (0x10, iommu.offset)
    made = topology(iommu="mmio:0xa003e00", interrupt=79)
    iommu = tables.iort(tables.body(viot_v5.render(made), b"VIOT")[12:])[0]
    assert iommu.kind == 0x81
    assert [tables.number(iommu.data, at, 8) for at in (0, 8, 16, 24)] == [0xA00_3E00, 0x200, 1, 79]


@pytest.mark.parametrize("render", [iort.render, viot_v5.render])
def test_iort_needs_what_it_must_state(render: object) -> None:
    """Without interrupt or ACPI path there is one sentence with the key that is missing."""
    assert callable(render)
    with pytest.raises(TopologyError, match=r"topology\.interrupt is missing"):
        render(topology(iommu="mmio:0xa003e00"))
    with pytest.raises(TopologyError, match="needs its path in the ACPI namespace"):
        render(topology([(0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 0x5000}]))


def test_iort_counts_its_mappings() -> None:
    """A root complex whose mappings do not fit a node's 16-bit length is refused."""
    with pytest.raises(TopologyError, match="a node has 65535 at most"):
        iort.render(topology([(number, number) for number in range(0x10, 0x4000, 2)]))


def test_the_archive_for_a_linux_initrd() -> None:
    """The table is where a kernel looks for it, uncompressed, and what follows can be appended."""
    table = viot.render(topology([(0x10, 0x10)]))
    archive = cpio.table_override("viot.aml", table)
    assert tables.newc(archive) == {"kernel/firmware/acpi/viot.aml": table}
    assert len(archive) % 512 == 0


def iasl_knows(signature: str) -> bool:
    """Whether this machine's iasl has a template of a table."""
    if shutil.which("iasl") is None:
        return False
    listed = subprocess.run(["iasl", "-ht"], capture_output=True, text=True, check=True).stdout
    return f") {signature} " in listed


@pytest.mark.parametrize(
    ("name", "image"),
    [
        (
            "VIOT",
            viot.render(topology([(0x10, 0x1F), (0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 4096}])),
        ),
        ("IORT", iort.render(topology([(0x10, 0x1F)]), its=[0])),
    ],
)
def test_iasl_reads_the_tables(name: str, image: bytes, tmp_path: Path) -> None:
    """The reference disassembler of ACPI finds nothing wrong."""
    if not iasl_knows(name):
        pytest.skip(f"no iasl here that knows {name}")
    (tmp_path / "table.aml").write_bytes(image)
    done = subprocess.run(["iasl", "-d", "table.aml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.dsl").read_text()
    assert f'Signature : "{name}"' in text
    assert "Incorrect checksum" not in done.stderr + text
