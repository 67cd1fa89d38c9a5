"""What holds for every topology: readers find exactly what was put in, and no input brings anything but one error."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.topology import tables, trees
from unit.topology.making import topology

from viommud.topology import builtin, dt, fdt, iort, viot
from viommud.topology.errors import TopologyError
from viommud.topology.model import PlatformEndpoint, Topology
from viommud.topology.place import PciPlace
from viommud.topology.section import BuiltinShape

IOMMU_RID = 8


@st.composite
def topologies(draw: st.DrawFn, most: int = 6) -> Topology:
    """Up to three segments with any endpoints but the IOMMU's own function, IDs from anywhere."""
    segments = draw(st.integers(1, 3))
    bridges = []
    for segment in range(segments):
        first_bus = 0 if segment == 0 else draw(st.integers(0, 255))
        first_id = draw(st.integers(0, 15)) * 0x10_0000 + segment * 0x1_0000
        bridges.append({"segment": segment, "first-bus": first_bus, "first-id": first_id})
    ids: set[int] = set()
    for _ in range(draw(st.integers(0, most))):
        bridge = draw(st.sampled_from(bridges))
        count = (256 - bridge["first-bus"]) * 256
        first = draw(st.integers(0, count - 1))
        for offset in range(first, min(first + draw(st.sampled_from([1, 1, 8])), count)):
            if bridge["segment"] or offset != IOMMU_RID:
                ids.add(bridge["first-id"] + offset)
    platform = [
        {"id": 0x8000_0000 + number, "base": 0x1000 * (number + 1), "acpi": rf"\_SB.VR{number:02d}"}
        for number in range(draw(st.integers(0, 3)))
    ]
    ids.update(0x8000_0000 + number for number in range(len(platform)))
    return topology([(number, number) for number in sorted(ids)], bridge=bridges, platform=platform)


def functions(made: Topology) -> dict[tuple[int, int], int]:
    """Every PCI endpoint by (segment, requester ID), with its ID."""
    return {
        (part.segment, part.first_rid + offset): part.first_id + offset
        for part in made.pci
        for offset in range(part.count)
    }


def around(wanted: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Functions to look up: the endpoints, their neighbours, and the IOMMU."""
    places = {(segment, rid + step) for segment, rid in wanted for step in (-1, 0, 1) if 0 <= rid + step <= 0xFFFF}
    return places | {(0, IOMMU_RID), (0, 0), (0, 0xFFFF)}


@given(topologies())
def test_a_guest_finds_exactly_the_endpoints_in_viot(made: Topology) -> None:
    """Looked up as Linux does, each endpoint has its ID, and no other function has one."""
    nodes, wanted = tables.viot(viot.render(made)), functions(made)
    for segment, rid in around(wanted):
        found = tables.linux_endpoint(nodes, segment, rid)
        assert (None if found is None else found[0]) == wanted.get((segment, rid))
    assert [node.fields["endpoint"] for node in nodes if node.kind == 2] == [entry.id for entry in made.platform]


@given(topologies())
def test_a_guest_finds_exactly_the_endpoints_in_iort(made: Topology) -> None:
    """With an interrupt service, endpoints go through the IOMMU and all other functions straight to the service."""
    nodes, wanted = tables.iort(iort.render(made, its=[0])), functions(made)
    roots = {tables.number(node.data, 12, 4): node for node in nodes if node.kind == 2}
    group, iommu = nodes[0].offset, nodes[1].offset
    for segment, rid in around(wanted):
        if segment in roots:
            expected = wanted.get((segment, rid))
            found = tables.translate(roots[segment], rid)
            assert found == ((segment << 16 | rid, group) if expected is None else (expected, iommu))


@pytest.mark.parametrize(
    ("shape", "reader"),
    [("2019-11", tables.list_2019), ("2020-02", tables.array_2020), ("2020-08", tables.records_2020)],
)
@given(made=topologies())
def test_configuration_space_lists_exactly_the_endpoints(shape: BuiltinShape, reader: object, made: Topology) -> None:
    """Whatever fits is listed whole; what does not fit is refused."""
    assert callable(reader)
    try:
        space = bytes(builtin.OFFSET) + builtin.render(shape, made)
    except TopologyError:
        assert len(made.pci) + len(made.platform) > 12 or not (made.pci or made.platform)
        return
    found = {}
    for item in reader(space):
        if "address" not in item:
            for rid in range(item["first"], item["last"] + 1):
                found[item["segment"], rid] = item["endpoint"] + rid - item["first"]
    assert found == functions(made)


BASE = trees.blob(
    trees.Branch(
        {"#address-cells": [2], "#size-cells": [2]},
        {f"pcie@{segment}": trees.host_bridge(segment << 36, segment) for segment in range(3)}
        | {f"device@{number}": trees.Branch({"reg": [0, 0x1000 * (number + 1), 0, 0x100]}) for number in range(3)},
    )
)


@given(topologies())
def test_a_guest_finds_exactly_the_endpoints_in_a_device_tree(made: Topology) -> None:
    """Looked up as the binding says, each endpoint has its ID, and no other function has one."""
    nodes, wanted = trees.read(dt.render(made, BASE, "base")), functions(made)
    for segment, rid in around(wanted):
        entries = trees.cells(nodes[f"/pcie@{segment}"].get("iommu-map", b""))
        found = [
            entries[at + 2] + rid - entries[at]
            for at in range(0, len(entries), 4)
            if entries[at] <= rid < entries[at] + entries[at + 3]
        ]
        assert found == ([wanted[segment, rid]] if (segment, rid) in wanted else [])


@given(topologies())
def test_descriptions_read_back(made: Topology) -> None:
    """The readers of `topology check` find what the renderings say."""
    wanted = sorted([*map(str, made.pci), *(f"{entry.id:#x}@{entry.base:#x}" for entry in made.platform)])
    for description in (viot.read(viot.render(made), "x"), dt.read(dt.render(made, BASE, "base"), "x")):
        assert description.iommus == (PciPlace(0, IOMMU_RID),)
        found = [entry.endpoint for entry in description.endpoints]
        assert wanted == sorted(
            f"{entry.id:#x}@{entry.base:#x}" if isinstance(entry, PlatformEndpoint) else str(entry) for entry in found
        )


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789,._+@#-", min_size=1, max_size=12)
branches: st.SearchStrategy[trees.Branch] = st.recursive(
    st.builds(trees.Branch, st.dictionaries(names, st.binary(max_size=20), max_size=4)),
    lambda below: st.builds(
        trees.Branch,
        st.dictionaries(names, st.binary(max_size=20), max_size=3),
        st.dictionaries(names, below, max_size=3),
    ),
    max_leaves=8,
)


@given(branches)
def test_any_tree_goes_through_unchanged(branch: trees.Branch) -> None:
    """A tree of libfdt's, read and written, has the same nodes in the same order with the same properties."""
    image = trees.blob(branch)
    before, after = trees.read(image), trees.read(fdt.serialise(fdt.parse(image, "tree")))
    assert list(after.items()) == list(before.items())


SAMPLE = topology([(0x10, 0x10), (0x100, 0x1FF)])
SAMPLES = {"viot": viot.render(SAMPLE), "dt": dt.render(SAMPLE, BASE, "base")}
READERS = {"viot": viot.read, "dt": dt.read}


@pytest.mark.parametrize("kind", list(READERS))
@given(
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
)
def test_damaged_files_bring_one_error_at_most(kind: str, damage: list[tuple[float, int]], keep: float) -> None:
    """Bytes from anywhere are read or refused; nothing else happens."""
    image = bytearray(SAMPLES[kind])
    for where, value in damage:
        image[int(where * len(image))] = value
    if kind == "viot":
        image[9] = 0
        image[9] = -sum(image) & 0xFF
    with suppress(TopologyError):
        READERS[kind](bytes(image[: len(image) if keep > 0.5 else int(keep * 2 * len(image))]), "x")
