"""QEMU's command line as words, for a shell, and for libvirt."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import pytest

from unit.topology.making import topology
from viommud.topology import qemu_args
from viommud.topology.errors import TopologyError
from viommud.topology.qemu_args import Guest, VfioPci, VfioUser


def guest(**changes: Any) -> Guest:
    """A guest of one processor with these changes."""
    settings = {
        "memory_mib": 1024,
        "cpus": 1,
        "accelerator": "tcg",
        "socket": Path("/run/vm,1.sock"),
        "config_size": 40,
        "topology_file": None,
        **changes,
    }
    return Guest(**settings)


GENERIC = "chardev=viommud-socket,virtio-id=23,num_vqs=2,vq_size=256,config_size=40"


def test_virt_with_a_device_tree() -> None:
    """The whole line for Arm's virt under emulation."""
    line = qemu_args.iommu_line(topology([(0x10, 0x10)]), guest(topology_file=Path("guest.dtb")))
    assert line.words() == [
        *("qemu-system-aarch64", "-machine", "virt,memory-backend=viommud-memory", "-accel", "tcg"),
        *("-cpu", "cortex-a72", "-smp", "1", "-m", "1024M"),
        *("-object", "memory-backend-memfd,id=viommud-memory,size=1024M,share=on"),
        *("-chardev", "socket,id=viommud-socket,path=/run/vm,,1.sock"),
        *("-device", f"vhost-user-test-device-pci,bus=pcie.0,addr=01.0,{GENERIC}"),
        *("-dtb", "guest.dtb"),
    ]


def test_q35_with_devices() -> None:
    """Assigned devices come before the vhost-user device, each with an id and its endpoint's address."""
    line = qemu_args.iommu_line(
        topology([(0x10, 0x1F)], machine="q35"),
        guest(
            accelerator="kvm",
            topology_file=Path("viot.aml"),
            devices=(VfioUser(0x19, Path("/run/nvme.sock")), VfioPci(0x10, "0000:65:00.0")),
        ),
    )
    words = line.words()
    assert words[:2] == ["qemu-system-x86_64", "-machine"]
    assert words[words.index("-cpu") + 1] == "host"
    devices = [
        words[at + 1] for at, word in enumerate(words) if word in ("-device", "-object", "-chardev", "-acpitable")
    ]
    assert devices[1:3] == [
        "iommufd,id=viommud-iommufd",
        "vfio-pci,id=endpoint10,host=0000:65:00.0,iommufd=viommud-iommufd,bus=pcie.0,addr=02.0",
    ]
    assert json.loads(devices[3]) == {
        "driver": "vfio-user-pci",
        "id": "endpoint19",
        "bus": "pcie.0",
        "addr": "03.1",
        "socket": {"type": "unix", "path": "/run/nvme.sock"},
    }
    assert devices[4:] == [
        "socket,id=viommud-socket,path=/run/vm,,1.sock",
        f"vhost-user-test-device-pci,bus=pcie.0,addr=01.0,{GENERIC}",
        "file=viot.aml",
    ]


@pytest.mark.parametrize(
    ("machine", "base", "slot"), [("virt", 0xA00_0000, 0), ("virt", 0xA00_3E00, 31), ("microvm", 0xFEB0_0E00, 7)]
)
def test_the_mmio_transport(machine: str, base: int, slot: int) -> None:
    """On virtio-mmio the slot follows from the window, and the device is told to be a modern one."""
    words = qemu_args.iommu_line(topology(machine=machine, iommu=f"mmio:{base:#x}"), guest()).words()
    assert words[words.index("-global") + 1] == "virtio-mmio.force-legacy=false"
    assert f"vhost-user-test-device,bus=virtio-mmio-bus.{slot},{GENERIC}" in words


@pytest.mark.parametrize("iommu", ["00:01.0", "mmio:0xfeb02e00"])
def test_microvm_takes_an_option_rom(iommu: str) -> None:
    """With endpoints on PCI the machine is told to have PCI, and the table comes as an option ROM."""
    made = topology([(0x10, 0x10)], machine="microvm", iommu=iommu)
    words = qemu_args.iommu_line(made, guest(option_rom=Path("viot.rom"))).words()
    assert words[words.index("-machine") + 1] == "microvm,memory-backend=viommud-memory,pcie=on"
    assert words[words.index("-option-rom") + 1] == "viot.rom"
    assert not any("romfile" in word for word in words)


def test_virt_takes_a_rom_of_the_iommu_s_device() -> None:
    """With UEFI the table comes in the ROM of the IOMMU's own function; commas are doubled."""
    words = qemu_args.iommu_line(topology([(0x10, 0x10)]), guest(option_rom=Path("a,b.rom"))).words()
    assert f"vhost-user-test-device-pci,bus=pcie.0,addr=01.0,{GENERIC},romfile=a,,b.rom" in words
    assert "-option-rom" not in words


def test_the_dump_has_the_same_machine() -> None:
    """The line that dumps the base agrees with the guest's in all that a tree depends on, and needs no socket."""
    made = topology([(0x10, 0x10)])
    dump = qemu_args.dump_line(made, guest(), Path("base.dtb")).words()
    real = qemu_args.iommu_line(made, guest()).words()
    assert dump[2] == real[2] + ",dumpdtb=base.dtb"
    assert dump[3:] == real[3 : len(dump)]
    assert not {"-chardev", "-device"} & set(dump)


def test_kvm_on_arm_takes_the_host_s_interrupt_controller() -> None:
    """Under KVM the machine has what the host can offer, in the dump as well."""
    made = topology([(0x10, 0x10)])
    for line in (
        qemu_args.iommu_line(made, guest(accelerator="kvm")),
        qemu_args.dump_line(made, guest(accelerator="kvm"), Path("x")),
    ):
        assert "gic-version=host" in line.words()[2]


def test_another_processor() -> None:
    """A processor that is named takes the place of the default one, in the dump as well."""
    made = topology([(0x10, 0x10)])
    for line in (
        qemu_args.iommu_line(made, guest(cpu="cortex-a76")),
        qemu_args.dump_line(made, guest(cpu="cortex-a76"), Path("x")),
    ):
        words = line.words()
        assert words[words.index("-cpu") + 1] == "cortex-a76"


def test_a_shell_reads_the_words_back() -> None:
    """The shell's form says the same words, with quotes where they are needed."""
    line = qemu_args.iommu_line(topology([(0x10, 0x10)]), guest(devices=(VfioUser(0x10, Path("/run/it's here.sock")),)))
    script = f"set -- {qemu_args.shell(line)}printf '%s\\n' \"$@\""
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == line.words()
    assert json.loads(qemu_args.as_json(line)) == line.words()


def test_libvirt_gets_what_it_cannot_say_itself() -> None:
    """The block is well-formed, and leaves machine, memory and processors to libvirt."""
    line = qemu_args.iommu_line(
        topology([(0x10, 0x10)]), guest(devices=(VfioUser(0x10, Path("/run/<\"'&.sock")),), topology_file=Path("t.dtb"))
    )
    root = Xml.fromstring(qemu_args.libvirt(line))
    values = [child.attrib["value"] for child in root]
    words = line.words()
    assert values == words[words.index("-device") :]


@pytest.mark.parametrize(
    ("endpoints", "section", "changes", "sentence"),
    [
        ([], {"machine": "q35", "iommu": "mmio:0xa003e00"}, {}, "the machine q35 has no virtio-mmio windows"),
        ([], {"iommu": "mmio:0xa003f00"}, {}, "one every 0x200; 0xa003f00 is none of them"),
        ([], {"iommu": "mmio:0xa004000"}, {}, "0xa004000 is none of them"),
        ([], {"iommu": "01:00.0"}, {}, "the IOMMU: 0000:01:00.0 is not on bus 00"),
        ([(0x10, 0x10)], {"machine": "q35"}, {"option_rom": Path("viot.rom")}, "q35 takes no option ROM"),
        ([(0x10, 0x10)], {"iommu": "mmio:0xa003e00"}, {"option_rom": Path("viot.rom")}, "is no PCI function"),
        (
            [],
            {"machine": "microvm", "iommu": "mmio:0xfeb00000"},
            {"topology_file": Path("viot.aml")},
            "microvm takes neither a device tree nor -acpitable",
        ),
        ([], {"bridge": [{}, {"segment": 1}]}, {}, "bridge 0001:00-ff: the machines of QEMU have PCI segment 0 only"),
        ([(0x10, 0x10)], {}, {"devices": (VfioPci(0x18, "0000:01:00.0"),)}, "endpoint 0x18 is no PCI function"),
        (
            [(0x10, 0x10)],
            {},
            {"devices": (VfioPci(0x10, "0000:01:00.0"), VfioUser(0x10, Path("x")))},
            "endpoint 0x10 is given two devices",
        ),
        ([(0x100, 0x100)], {}, {"devices": (VfioUser(0x100, Path("x")),)}, "0000:01:00.0 is not on bus 00"),
    ],
)
def test_what_qemu_cannot_have(
    endpoints: list[tuple[int, int]], section: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    """A topology that QEMU's machine cannot have is refused in one sentence."""
    with pytest.raises(TopologyError) as caught:
        qemu_args.iommu_line(topology(endpoints, **section), guest(**changes))
    assert sentence in str(caught.value)


def test_only_virt_has_a_device_tree() -> None:
    """There is no tree to dump on x86."""
    with pytest.raises(TopologyError, match="q35 has no device tree to dump"):
        qemu_args.dump_line(topology(machine="q35"), guest(), Path("x"))
