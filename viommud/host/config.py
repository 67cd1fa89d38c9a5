"""[host] and [endpoint.host] of the configuration: devices of the host behind this IOMMU."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class HostSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[host]: what holds for all of them."""

    memory: Literal["monitor", "files"] = "monitor"
    """Where guest memory in the host's IOMMU comes from: what QEMU has mapped already, so that no page is pinned twice,
    and its files where that is not found; or always the files."""
    iommufd: _Text = "iommufd"
    """Name under which the descriptor of /dev/iommu is passed."""


class HostDeviceSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[endpoint.host]: the endpoint is a device of the host, bound to vfio-pci.  One of the keys is given."""

    device: _Text | None = None
    """Its PCI address, "0000:65:00.0": `viommud run` opens it and gives it to QEMU."""
    fd: _Text | None = None
    """Or the name under which its descriptor is passed by who starts QEMU too."""
    container: _Text | None = None
    """Or, where another process than QEMU drives the device or the kernel has no iommufd: the name under which a VFIO
    container is passed that has the device, TYPE1v2, and nothing mapped."""
