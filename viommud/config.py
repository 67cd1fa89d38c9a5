"""The configuration of one virtual machine's IOMMU: a TOML file as frozen structs.

Every key has a default; a file without any key is right.  What the keys mean together is device_setup's business.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from viommud.control.config import ControlSection, MetricsSection
from viommud.errors import UsageError
from viommud.host.config import HostDeviceSection, HostSection
from viommud.schema import U64_MAX, convert
from viommud.topology.section import TopologySection
from viommud.vfio_user.config import VfioUserSection

T = TypeVar("T")
U32_MAX = (1 << 32) - 1

U64 = Annotated[int, msgspec.Meta(ge=0)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=U32_MAX)]
PositiveU32 = Annotated[int, msgspec.Meta(ge=1, le=U32_MAX)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of the file."""


class AddressRange(Section, frozen=True, kw_only=True):
    """First and last address; both are inside."""

    start: U64 = 0
    end: U64 = U64_MAX


class DomainRange(Section, frozen=True, kw_only=True):
    """First and last domain ID; both are inside."""

    start: U32 = 0
    end: U32 = U32_MAX


class Device(Section, frozen=True, kw_only=True):
    """[device]: what the guest is offered."""

    granule: U64 | None = None
    """Smallest mapping in bytes, a power of two; larger powers of two are allowed with it.  Default 4096."""
    page_size_mask: U64 | None = None
    """In place of granule: one bit for each page size."""
    input_range: AddressRange = AddressRange()
    """IOVAs that can be mapped."""
    domain_range: DomainRange = DomainRange()
    """Domain IDs the guest may use."""
    bypass: bool = True
    """Do endpoints in no domain reach all guest memory when the VM starts?"""
    bypass_config: bool | None = None
    """May the driver change that, and make bypass domains?  Default: yes, from personality 1.x on."""
    mmio: bool | None = None
    """May mappings be marked as MMIO?  Default: yes, from personality 1.x on."""
    probe_size: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 512
    """Bytes for the properties of an endpoint; a reserved region takes 24.  0: no PROBE request."""
    personality: Literal["1.x", "0.9", "0.5"] = "1.x"
    """Age of the guest's driver: the released specification, drafts of late 2018, drafts of 2017."""
    msi: Literal["auto", "arm64", "x86", "none"] = "auto"
    """The MSI doorbell region that every endpoint reserves; auto: that of the host's processor."""
    indirect: bool = True
    event_idx: bool = True
    in_order: bool = False
    packed_ring: bool = False
    config_notices: bool = False
    """Is the front-end sent a configuration change notice when the device needs a reset?  QEMU 11.1 may crash of it."""


class Limits(Section, frozen=True, kw_only=True):
    """[limits]: what a guest can make the daemon keep.  Beyond it a request is refused with NOMEM."""

    endpoints: PositiveU32 = 65536
    """Endpoints that the guest has named."""
    domains: PositiveU32 = 4096
    mappings: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = 1 << 20
    """In all domains together."""
    mappings_per_domain: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = 1 << 18
    faults: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 256
    """Fault reports that wait for a buffer of the guest."""
    fault_wait_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = 1000
    """A report that has waited longer is dropped."""
    fault_burst: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 32
    """Reports one endpoint may raise at once ..."""
    fault_rate: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 100
    """... and per second after that."""


class Worker(Section, frozen=True, kw_only=True):
    """[worker]: the thread that serves the guest's requests."""

    spin_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 500
    """How long it polls an empty queue before it sleeps; 0: never polls.  Never polls on a single CPU."""
    time_every: U32 = 16
    """One batch of requests in so many is timed, for the service times; 0: none is."""


class Qemu(Section, frozen=True, kw_only=True):
    """[qemu]: what is asked of QEMU beside the vhost-user connection."""

    qmp: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Path of a QMP socket of our own: its RESET events tell a reset of the machine from one of the device."""


class ReservedRegion(Section, frozen=True, kw_only=True):
    """IOVAs that the guest cannot map; both ends are inside."""

    start: U64
    end: U64
    type: Literal["reserved", "msi"] = "reserved"


class Endpoint(Section, frozen=True, kw_only=True):
    """[[endpoint]]: a device, or a range of devices, that this IOMMU translates for."""

    id: str | U32
    """A PCI function "00:02.0" or "0000:00:02.0", a number, or two of them as a range "01:00.0-01:1f.7"."""
    reserved: tuple[ReservedRegion, ...] = ()
    """Further reserved regions; one of type "msi" takes the place of device.msi."""
    vfio_user: VfioUserSection | None = None
    """The device is another process, and its DMA is translated."""
    host: HostDeviceSection | None = None
    """The device is one of the host, assigned by VFIO."""


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    device: Device = Device()
    limits: Limits = Limits()
    worker: Worker = Worker()
    qemu: Qemu = Qemu()
    host: HostSection = HostSection()
    endpoint: tuple[Endpoint, ...] = ()
    topology: TopologySection | None = None
    control: ControlSection = ControlSection()
    metrics: MetricsSection = MetricsSection()


def parse(text: str) -> Config:
    """The configuration in a TOML text.

    :raises UsageError: in one line: key, value, and what is allowed.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not TOML: {error}") from error
    return convert(data, Config)


def load(path: Path, then: Callable[[Config], T]) -> T:
    """Read a file and hand the configuration on; what is wrong with it, there too, is said of this file.

    :raises UsageError: in one line: file, key, value, and what is allowed.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        return then(parse(text))
    except UsageError as error:
        raise UsageError(f"{path}: {error}", hint=error.hint) from error
