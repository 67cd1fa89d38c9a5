"""What is made outside for guests inside: a kernel and a RAM disk, in the lab's /out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from vm import assets, initramfs
from vm.programs import BuildError, compiler

from lab.site import ROOT

GUEST = Path("/out/guest")
"""As the lab sees it."""

BENCH = Path("/out/bench_stage2")

MODULES = ("virtio-iommu", "vfio-pci", "vfio_iommu_type1")
PROGRAMS = ("edu_dma", "block_io", "vfio_map")


def prepare(out: Path) -> None:
    """Put them into a directory that becomes /out."""
    place = out / GUEST.name
    place.mkdir(parents=True, exist_ok=True)
    kernel = assets.kernel("arm64")
    shutil.copy(kernel.image, place / "Image")
    (place / "initrd").write_bytes(initramfs.make(kernel, MODULES, PROGRAMS))


def build_bench(out: Path) -> None:
    """The benchmark of the engine, for the lab, in the directory that becomes /out.

    :raises BuildError: with what the compiler said.
    """
    sources = [ROOT / "csrc/bench/bench_stage2.c", *sorted((ROOT / "csrc").glob("*.c"))]
    flags = ["-std=gnu11", "-O2", "-D_GNU_SOURCE", "-static", f"-I{ROOT / 'csrc'}", "-pthread"]
    command = [compiler("arm64"), *flags, "-o", str(out / BENCH.name), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"bench_stage2 cannot be compiled:\n{done.stderr}")
