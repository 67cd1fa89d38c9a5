"""What `topology check` finds, given descriptions and machines with one thing wrong each."""

from __future__ import annotations

from typing import Any

import pytest

from unit.topology.making import topology
from viommud.topology import check, running
from viommud.topology.check import Finding, Severity
from viommud.topology.description import Described, Description
from viommud.topology.errors import TopologyError
from viommud.topology.model import PciRange, PlatformEndpoint
from viommud.topology.place import MmioPlace, PciPlace
from viommud.topology.running import Function, Running

HOME = PciPlace(0, 8)
OTHER = PciPlace(0, 0x48)
MADE = topology([(0x10, 0x11), (0x18, 0x18), (0x2_0000, 0x2_0000)], platform=[{"id": 0x2_0000, "base": 0x5000}])
GOOD = (
    Described(PciRange(0, 0x10, 0x11, 0x10), HOME),
    Described(PciRange(0, 0x18, 0x18, 0x18), HOME),
    Described(PlatformEndpoint(0x2_0000, 0x5000), HOME),
)


def test_no_difference() -> None:
    """A description that says what viommud serves gives no finding, however it cuts the ranges."""
    assert check.check_description(MADE, Description((HOME,), GOOD)) == []
    cut = (
        Described(PciRange(0, 0x11, 0x11, 0x11), HOME),
        Described(PciRange(0, 0x10, 0x10, 0x10), HOME),
        *GOOD[1:],
    )
    assert check.check_description(MADE, Description((HOME,), cut)) == []


@pytest.mark.parametrize(
    ("iommus", "endpoints", "severity", "sentence"),
    [
        ((), (), Severity.ERROR, "the IOMMU at 0000:00:01.0 is not described; virtio IOMMUs described: none"),
        ((OTHER,), (), Severity.ERROR, "virtio IOMMUs described: 0000:00:09.0"),
        ((HOME, HOME), GOOD, Severity.ERROR, "the IOMMU at 0000:00:01.0 is described 2 times"),
        (
            (HOME, OTHER),
            (*GOOD, Described(PciRange(0, 0x60, 0x60, 0x60), OTHER)),
            Severity.WARNING,
            "endpoints of another IOMMU, at 0000:00:09.0",
        ),
        (
            (HOME,),
            (Described(PciRange(0, 0, 0x1F, 0), HOME), GOOD[2]),
            Severity.ERROR,
            "0000:00:00.0-00:03.7 contains the IOMMU's own function 0000:00:01.0",
        ),
        (
            (HOME,),
            (*GOOD, Described(PciRange(0, 0x20, 0x27, 0x20), HOME)),
            Severity.ERROR,
            "0000:00:04.0-00:04.7 (ID 0x20-0x27) is described, and viommud does not translate for it",
        ),
        (
            (HOME,),
            (*GOOD, Described(PciRange(1, 0x10, 0x10, 0x1_0010), HOME)),
            Severity.ERROR,
            "0001:00:02.0 (ID 0x10010) is described, and viommud does not translate for it",
        ),
        (
            (HOME,),
            (*GOOD[:1], *GOOD[2:]),
            Severity.ERROR,
            "0000:00:03.0 (ID 0x18) is an endpoint, and is not described",
        ),
        (
            (HOME,),
            (GOOD[0], Described(PciRange(0, 0x18, 0x18, 0x19), HOME), GOOD[2]),
            Severity.ERROR,
            "0000:00:03.0 is described with ID 0x19, and viommud has it as 0x18",
        ),
        (
            (HOME,),
            (*GOOD, Described(PciRange(0, 0x18, 0x18, 0x18), HOME)),
            Severity.ERROR,
            "0000:00:03.0 and 0000:00:03.0 list the same functions",
        ),
        (
            (HOME,),
            (*GOOD, Described(PciRange(0, 0x20, 0x20, 0x18), HOME)),
            Severity.ERROR,
            "0000:00:03.0 and 0000:00:04.0 share endpoint IDs: 0x18 and 0x18",
        ),
        (
            (HOME,),
            (*GOOD, Described(PciRange(0, 0x20, 0x21, 0xFFFF_FFFF), HOME)),
            Severity.ERROR,
            "has endpoint IDs 0xffffffff-0x100000000; an ID has 32 bits",
        ),
        ((HOME,), GOOD[:2], Severity.ERROR, "mmio:0x5000 (ID 0x20000) is an endpoint, and is not described"),
        (
            (HOME,),
            (*GOOD[:2], Described(PlatformEndpoint(0x2_0001, 0x5000), HOME)),
            Severity.ERROR,
            "mmio:0x5000 is described with ID 0x20001, and viommud has 0x20000",
        ),
        (
            (HOME,),
            (*GOOD, Described(PlatformEndpoint(0x2_0001, 0x6000), HOME)),
            Severity.ERROR,
            "mmio:0x6000 (ID 0x20001) is described, and viommud does not translate for it",
        ),
    ],
)
def test_a_difference_is_found(
    iommus: tuple[PciPlace, ...], endpoints: tuple[Described, ...], severity: Severity, sentence: str
) -> None:
    """Each difference is one readable line of the right severity."""
    found = check.check_description(MADE, Description(iommus, endpoints))
    assert any(finding.severity is severity and sentence in finding.sentence for finding in found), found
    assert all("\n" not in str(finding) for finding in found)


def test_the_window_s_size_is_no_difference() -> None:
    """An IOMMU on MMIO is known by its base."""
    made = topology(iommu="mmio:0xa003e00")
    assert check.check_description(made, Description((MmioPlace(0xA00_3E00, 0x1000),), ())) == []


def function(rid: int, kind: str | None, vendor: int = 0x8086, device: int = 1) -> Function:
    """A function of a running machine."""
    return Function(rid, vendor, device, kind)


IOMMU = function(8, "vhost-user-test-device-pci", 0x1AF4, 0x1057)
DISK, NET = function(0x10, "vfio-pci"), function(0x18, "vfio-user-pci")
RUNNING = topology([(0x10, 0x10), (0x18, 0x18)])


@pytest.mark.parametrize(
    ("functions", "findings"),
    [
        ([IOMMU, DISK, NET], []),
        (
            [IOMMU, DISK],
            [Finding(Severity.ERROR, "no device is at 0000:00:03.0, which is an endpoint")],
        ),
        ([DISK, NET], [Finding(Severity.ERROR, "the IOMMU's place 0000:00:01.0 is empty")]),
        (
            [function(8, "e1000e"), DISK, NET],
            [Finding(Severity.ERROR, "0000:00:01.0 is e1000e (8086:0001) and no virtio-iommu")],
        ),
        (
            [IOMMU, DISK, function(0x18, "edu")],
            [
                Finding(
                    Severity.ERROR,
                    "0000:00:03.0 is an endpoint and is edu (8086:0001): QEMU does its DMA itself, untranslated",
                )
            ],
        ),
        (
            [IOMMU, DISK, NET, function(0x20, "vfio-pci")],
            [
                Finding(
                    Severity.WARNING, "0000:00:04.0 is vfio-pci (8086:0001) and no endpoint: its DMA is not confined"
                )
            ],
        ),
        (
            [IOMMU, DISK, function(0x18, None)],
            [Finding(Severity.NOTE, "0000:00:03.0 is 8086:0001; QEMU does not tell who does its DMA")],
        ),
    ],
)
def test_a_running_machine(functions: list[Function], findings: list[Finding]) -> None:
    """Endpoints that are not there, that QEMU emulates itself, and devices left out are found."""
    assert check.check_running(RUNNING, Running(tuple(functions), ())) == findings


def test_an_empty_range_is_a_warning() -> None:
    """A range may wait for devices to be plugged in later."""
    made = topology([(0x100, 0x1FF)])
    assert [found.severity for found in check.check_running(made, Running((IOMMU,), ()))] == [Severity.WARNING]


def test_an_iommu_on_mmio_is_looked_for_in_its_slot() -> None:
    """The window's address says which slot of the machine must hold the generic device."""
    made = topology(iommu="mmio:0xa003e00")
    assert check.check_running(made, Running((), (31,))) == []
    (finding,) = check.check_running(made, Running((), (30,)))
    assert "virtio-mmio slot 31, which is mmio:0xa003e00; slots: 30" in finding.sentence


class Answers:
    """A QEMU that gives prepared answers."""

    def __init__(self, pci: Any, objects: dict[str, dict[str, Any]]) -> None:
        self._pci = pci
        self._objects = objects

    def ask(self, command: str, **arguments: object) -> Any:
        """What QEMU 11.1 answers to these commands, in its format."""
        if command == "query-pci":
            return self._pci
        path = str(arguments["path"])
        if command == "qom-get":
            return self._objects[path][str(arguments["property"])]
        if path in self._objects:
            return [{"name": name, "type": "string"} for name in self._objects[path]]
        return [
            {"name": child.removeprefix(path + "/"), "type": f"child<{values['type']}>"}
            for child, values in self._objects.items()
            if child.startswith(path + "/")
        ]


def pci(slot: int, name: str = "", **more: Any) -> dict[str, Any]:
    """A device in the answer to query-pci."""
    return {"slot": slot, "function": 0, "qdev_id": name, "id": {"vendor": 0x1AF4, "device": 0x1057}, **more}


def test_the_machine_is_read_by_name_and_by_address() -> None:
    """Devices with an id are known by it, those without by their address on the root bus, those below bridges by id."""
    below = {"bus": {"number": 1}, "devices": [pci(0, "disk"), pci(1)]}
    answers = Answers(
        [{"bus": 0, "devices": [pci(1), pci(2, "port", pci_bridge=below), pci(3)]}],
        {
            "/machine/peripheral/port": {"type": "pcie-root-port", "addr": 0x10, "parent_bus": "/machine/x/pcie.0"},
            "/machine/peripheral/disk": {"type": "vfio-pci", "addr": 0, "parent_bus": "/machine/port/port"},
            "/machine/peripheral-anon/device[0]": {
                "type": "vhost-user-test-device-pci",
                "addr": 0x08,
                "parent_bus": "/machine/x/pcie.0",
            },
            "/machine/peripheral-anon/device[1]": {
                "type": "vhost-user-test-device",
                "parent_bus": "/machine/unattached/device[9]/virtio-mmio-bus.31",
            },
        },
    )
    seen = running.look(answers)
    assert {found.rid: found.kind for found in seen.functions} == {
        8: "vhost-user-test-device-pci",
        0x10: "pcie-root-port",
        0x100: "vfio-pci",
        0x108: None,
        0x18: None,
    }
    assert seen.mmio_slots == (31,)


def test_an_answer_that_is_not_understood() -> None:
    """A QEMU that answers differently is told as such."""
    with pytest.raises(TopologyError, match="query-pci is not understood"):
        running.look(Answers([{"devices": []}], {}))
