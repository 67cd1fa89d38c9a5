"""[topology] of the configuration: where the IOMMU, the host bridges and the platform's devices are."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from viommud.topology.place import VIRTIO_MMIO_SPAN

MAX_ID = 0xFFFF_FFFF

Machine = Literal["virt", "q35", "microvm"]
"""The machines of QEMU that viommud knows by name; virt is that of 64-bit Arm."""
MACHINES: tuple[Machine, ...] = get_args(Machine)

BuiltinShape = Literal["2019-11", "2020-02", "2020-08"]
"""The layouts of a topology in configuration space, by the month in which each was proposed."""

_U64 = Annotated[int, msgspec.Meta(ge=0)]
_U32 = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
_U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_Bus = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
_Span = Annotated[int, msgspec.Meta(ge=0x100, le=1 << 20)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of the file."""


class BridgeSection(_Section, frozen=True, kw_only=True):
    """[[topology.bridge]]: one PCI host bridge."""

    segment: _U16 = 0
    first_bus: _Bus = 0
    last_bus: _Bus = 0xFF
    first_id: _U32 | None = None
    """Endpoint ID of the first function of the first bus.  Default: segment << 16 | bus << 8."""


class PlatformSection(_Section, frozen=True, kw_only=True):
    """[[topology.platform]]: the place of an endpoint that is no PCI function."""

    id: _U32
    base: _U64
    """Base of its first register window."""
    acpi: str | None = None
    r"""Its path in the ACPI namespace, as "\\_SB.VR00"; only IORT needs it."""


class TopologySection(_Section, frozen=True, kw_only=True):
    """[topology]: how the guest is told."""

    machine: Machine
    iommu: str
    """The IOMMU's place: a PCI function "00:01.0" or "0000:00:01.0", or a virtio-mmio window "mmio:0x0a003e00"."""
    span: _Span = VIRTIO_MMIO_SPAN
    """Bytes of the IOMMU's MMIO window."""
    interrupt: _U32 | None = None
    """Global system interrupt of an IOMMU on MMIO; only what must state it needs it."""
    bridge: tuple[BridgeSection, ...] = (BridgeSection(),)
    platform: tuple[PlatformSection, ...] = ()
    builtin: BuiltinShape | None = None
    """Serve the topology in configuration space too, in this layout; never together with device.bypass-config."""
