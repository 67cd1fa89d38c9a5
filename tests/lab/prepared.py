"""What is made outside for guests inside: a kernel and a RAM disk, in the lab's /out."""

from __future__ import annotations

import shutil
from pathlib import Path

from vm import assets, initramfs

GUEST = Path("/out/guest")
"""As the lab sees it."""

MODULES = ("virtio-iommu", "vfio-pci", "vfio_iommu_type1")
PROGRAMS = ("edu_dma", "block_io", "vfio_map")


def prepare(out: Path) -> None:
    """Put them into a directory that becomes /out."""
    place = out / GUEST.name
    place.mkdir(parents=True, exist_ok=True)
    kernel = assets.kernel("arm64")
    shutil.copy(kernel.image, place / "Image")
    (place / "initrd").write_bytes(initramfs.make(kernel, MODULES, PROGRAMS))
