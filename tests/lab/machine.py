"""The lab running: QEMU without any acceleration, and in it a host with KVM, an SMMUv3 and devices behind it."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vm import assets
from vm.archive import ArchiveError
from vm.initramfs import Cpio

from lab import kernel, site, userland
from lab.site import ROOT

EDU = ("0000:00:02.0", "0000:00:03.0")
"""QEMU's educational device: DMA by register."""
NVME = "0000:00:04.0"
IGB = "0000:00:05.0"
"""A network controller with virtual functions."""

_NVME_MIB = 64
_INIT = Path(__file__).with_name("init")


@dataclass(frozen=True)
class Shape:
    """What kind of machine."""

    cpus: int = 2
    memory_mib: int = 3072


def ram_disk() -> bytes:
    """What finds the root."""
    archive = Cpio()
    archive.add_console()
    for empty in ("lower", "upper", "new", "proc"):
        archive.add_directory(empty)
    archive.add("init", _INIT.read_bytes(), 0o755)
    archive.add("bin/busybox", assets.busybox("arm64").read_bytes(), 0o755)
    return archive.finish()


def arguments(shape: Shape, out: Path, work: Path) -> list[str]:
    """QEMU's command line, except for where the console goes.

    :param out: directory that the lab sees as /out and may write to.
    :param work: directory for files of this run.
    """
    image, root, installed = kernel.image(), userland.root(), site.site()
    disk, initrd = work / "nvme.img", work / "initrd"
    with disk.open("wb") as file:
        file.truncate(_NVME_MIB << 20)
    initrd.write_bytes(ram_disk())
    shares = []
    for slot, (tag, path) in enumerate({"root": root, "site": installed, "project": ROOT, "out": out}.items()):
        readonly = "" if tag == "out" else ",readonly=on"
        shares += [
            *("-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{readonly}"),
            *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag},addr={0x10 + slot:#x}"),
        ]
    dma = "dma_mask=0xffffffffffff"
    return [
        *assets.emulator("arm64").command,
        *("-machine", "virt,virtualization=on,gic-version=3,iommu=smmuv3", "-accel", "tcg,thread=multi"),
        *("-cpu", "cortex-a76", "-smp", str(shape.cpus), "-m", f"{shape.memory_mib}M"),
        *("-nographic", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-device", f"edu,addr={EDU[0][8:]},{dma}", "-device", f"edu,addr={EDU[1][8:]},{dma}"),
        *("-drive", f"if=none,id=disk,format=raw,file={disk}"),
        *("-device", f"nvme,addr={NVME[8:]},drive=disk,serial=lab"),
        *("-netdev", "user,id=net,restrict=on", "-device", f"igb,addr={IGB[8:]},netdev=net"),
        *shares,
        *("-kernel", str(image), "-initrd", str(initrd), "-append", _command_line()),
    ]


def _command_line() -> str:
    # What the SMMU stops is told in the kernel's log and not on the console, where each line takes a millisecond.
    # The kernel has no driver for the clock.
    return f"console=ttyAMA0 panic=-1 quiet loglevel=1 lab.time={time.time():.0f}"


def shell(shape: Shape = Shape()) -> int:
    """A prompt in the lab, on this terminal; what it leaves in /out stays in build/lab."""
    out = ROOT / "build/lab"
    out.mkdir(parents=True, exist_ok=True)
    (out / "command").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = arguments(shape, out, Path(work))
        return subprocess.call([*command, "-serial", "mon:stdio"], env=_environment())


def run(script: Sequence[str], shape: Shape = Shape(), out: Path | None = None) -> int:
    """Run a command in the lab; its output goes where ours goes, and its exit status is returned.

    :param out: directory for /out; a temporary one when nobody wants what is left in it.
    :raises ArchiveError: the lab ended without having run it.
    """
    with tempfile.TemporaryDirectory() as work:
        place = out or Path(work) / "out"
        place.mkdir(parents=True, exist_ok=True)
        (place / "status").unlink(missing_ok=True)
        (place / "command").write_text(shlex.join(script) + "\n")
        command = arguments(shape, place, Path(work))
        with subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "-serial", "stdio"],
            stdin=subprocess.DEVNULL,
            env=_environment(),
        ) as process:
            process.wait()
        status = place / "status"
        if not status.exists():
            raise ArchiveError("the lab ended before the command did; see its console above")
        return int(status.read_text())


def _environment() -> dict[str, str]:
    return {**os.environ, **assets.emulator("arm64").environment}
