"""The model: which endpoint ID is where, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from unit.topology.making import TWO_SEGMENTS, topology
from viommud.errors import UsageError
from viommud.topology.model import PciRange, PlatformEndpoint
from viommud.topology.place import MmioPlace, PciPlace


def test_ids_of_one_bridge_are_requester_ids() -> None:
    """With one host bridge, endpoint 0x10 is 00:02.0 and nothing else has a place."""
    made = topology([(0x10, 0x10), (0x100, 0x10F)])
    assert made.iommu == PciPlace(0, 8)
    assert made.pci == (PciRange(0, 0x10, 0x10, 0x10), PciRange(0, 0x100, 0x10F, 0x100))
    assert made.find(0x10) == PciPlace(0, 0x10)
    assert made.find(0x10F) == PciPlace(0, 0x10F)
    assert made.find(0x11) is None


def test_a_bridge_counts_from_its_own_first_id() -> None:
    """A bridge with first-id gives its functions that ID and those after it, from its first bus on."""
    made = topology([(0x50_0000, 0x50_0002)], bridge=[{}, {"segment": 3, "first-bus": 0x20, "first-id": 0x50_0000}])
    assert made.pci == (PciRange(3, 0x2000, 0x2002, 0x50_0000),)


def test_a_range_over_two_bridges_becomes_two() -> None:
    """Endpoint IDs that run on from one segment into the next are two ranges of functions."""
    made = topology([(0xFFF8, 0x1_0007)], bridge=TWO_SEGMENTS)
    assert made.pci == (PciRange(0, 0xFFF8, 0xFFFF, 0xFFF8), PciRange(1, 0, 7, 0x1_0000))


def test_neighbours_become_one_range() -> None:
    """Endpoints given one by one are one range where functions and IDs both run on."""
    assert topology([(0x12, 0x12), (0x10, 0x10), (0x11, 0x11)]).pci == (PciRange(0, 0x10, 0x12, 0x10),)


def test_platform_endpoints_have_ids_beyond_the_bridges() -> None:
    """An MMIO endpoint has the ID that its table says."""
    made = topology([(0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 0xC00_1000}])
    assert made.platform == (PlatformEndpoint(0x2_0000, 0xC00_1000),)
    assert made.find(0x2_0000) == PlatformEndpoint(0x2_0000, 0xC00_1000)


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("00:01.0", PciPlace(0, 8)),
        ("0000:ff:1f.7", PciPlace(0, 0xFFFF)),
        ("mmio:0xa003e00", MmioPlace(0xA00_3E00)),
        ("mmio:4096", MmioPlace(4096)),
    ],
)
def test_places(written: str, place: PciPlace | MmioPlace) -> None:
    """The IOMMU's place is a PCI function or an MMIO window."""
    assert topology(iommu=written).iommu == place


MISTAKES: list[tuple[list[tuple[int, int]], dict[str, Any], str]] = [
    ([], {"iommu": "00:20.0"}, 'topology.iommu = "00:20.0": must be a PCI function'),
    ([], {"iommu": "00:01.8"}, "must be a PCI function"),
    ([], {"iommu": "mmio:0xa003e01"}, "must be a PCI function"),
    ([], {"iommu": "mmio:0x10000000000000000"}, "must be a PCI function"),
    ([], {"iommu": "mmio:0xffffffffffffff00"}, "ends beyond 64 bits"),
    ([], {"iommu": "1:00:01.0"}, "0001:00:01.0 is on no bus of bridge 0000:00-ff"),
    ([(8, 8)], {}, "endpoint 0x8: 0000:00:01.0 is the IOMMU's own function"),
    ([(0, 0xFFFF)], {}, "endpoint 0x8: 0000:00:01.0 is the IOMMU's own function"),
    ([(0x10, 0x18), (0x18, 0x20)], {}, "endpoints 0x10-0x18 and 0x18-0x20 overlap"),
    ([(0x1_0000, 0x1_0000)], {}, "endpoint 0x10000: not every ID has a place; bridge 0000:00-ff has 0x0-0xffff"),
    ([(0xFFFF, 0x1_0000)], {}, "endpoint 0xffff-0x10000: not every ID has a place"),
    ([(0x1_0000_0000, 0x1_0000_0000)], {}, "IDs go upwards from 0 to 0xffffffff"),
    (
        [],
        {"bridge": [{"first-bus": 2, "last-bus": 1}]},
        "topology.bridge[0].first-bus = 2: must be at most its last-bus",
    ),
    ([], {"bridge": [{"first-id": 0xFFFF_0001}]}, "topology.bridge[0].first-id: 0xffff0001 leaves no room"),
    (
        [],
        {"bridge": [{}, {"first-bus": 7}]},
        "topology.bridge[1]: bridge 0000:07-ff shares buses with bridge 0000:00-ff",
    ),
    (
        [],
        {"bridge": [{}, {"segment": 1, "first-id": 0xFFFF}]},
        "bridge 0001:00-ff would have endpoint IDs 0xffff-0x1fffe, and bridge 0000:00-ff has 0x0-0xffff",
    ),
    (
        [(0x10, 0x10)],
        {"platform": [{"id": 0x10, "base": 0}]},
        "topology.platform[0].id: 0x10 belongs to bridge 0000:00-ff",
    ),
    ([], {"platform": [{"id": 0x2_0000, "base": 0}]}, "there is no endpoint with the ID 0x20000"),
    (
        [(0x2_0000, 0x2_0000)],
        {"platform": [{"id": 0x2_0000, "base": 0}, {"id": 0x2_0000, "base": 4}]},
        "topology.platform[1].id: 0x20000 is given to two devices",
    ),
    (
        [(0x2_0000, 0x2_0001)],
        {"platform": [{"id": 0x2_0000, "base": 64}, {"id": 0x2_0001, "base": 64}]},
        "topology.platform[1].base: two endpoints have their registers at 0x40",
    ),
    (
        [(0x2_0000, 0x2_0000)],
        {"iommu": "mmio:0xa003e00", "platform": [{"id": 0x2_0000, "base": 0xA00_3E10}]},
        "0xa003e10 is in the window of the IOMMU itself",
    ),
    (
        [(0x2_0000, 0x2_0000)],
        {"platform": [{"id": 0x2_0000, "base": 0, "acpi": "VR00"}]},
        "topology.platform[0].acpi",
    ),
    ([], {"machine": "pc"}, 'machine = "pc": must be one of "microvm", "q35", "virt"'),
]


@pytest.mark.parametrize(("endpoints", "section", "sentence"), MISTAKES)
def test_a_mistake_is_one_clear_sentence(
    endpoints: list[tuple[int, int]], section: dict[str, Any], sentence: str
) -> None:
    """What cannot be is told with the key, the value, and what is allowed."""
    with pytest.raises(UsageError) as caught:
        topology(endpoints, **section)
    assert sentence in caught.value.sentence
    assert "\n" not in caught.value.sentence
