"""From the configuration to what an engine is made of: settings, endpoints and their reserved regions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from viommud.config import Config, Device, Endpoint
from viommud.control.config import ControlSection, MetricsSection
from viommud.endpoint_id import parse_endpoints
from viommud.host.config import HostDeviceSection, HostSection
from viommud.host.sysfs import normalise
from viommud.schema import U64_MAX, Wrong
from viommud.settings import Feature, Personality, Reserved, ReservedKind, Settings
from viommud.vfio_user.config import VfioUserSection

DEFAULT_GRANULE = 4096
RESV_MEM_BYTES = 24
"""What one reserved region takes of probe_size: header and value of the RESV_MEM property."""
PCI_SEGMENT_LAST = 0xFFFF
"""Last endpoint ID of PCI segment 0; an ID is bus << 8 | device << 3 | function."""

SOCKET_PATH_MAX = 107
"""Bytes of a socket's path: sun_path with its zero."""

PERSONALITIES = {"1.x": Personality.V1_X, "0.9": Personality.V0_9, "0.5": Personality.V0_5}

MSI_REGIONS = {
    # The interrupt window of x86, which no IOMMU translates as memory.
    "x86": Reserved(0xFEE0_0000, 0xFEEF_FFFF, ReservedKind.MSI),
    # Where Linux puts the doorbell on Arm (MSI_IOVA_BASE), and where QEMU's virt machine has its ITS and GICv2m.
    "arm64": Reserved(0x0800_0000, 0x080F_FFFF, ReservedKind.MSI),
}
_HOSTS = {"x86_64": "x86", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class EndpointRange:
    """Endpoints first to last, alike in what they reserve."""

    first: int
    last: int
    reserved: tuple[Reserved, ...] = ()
    vfio_user: VfioUserSection | None = None
    """Only for a single endpoint."""
    host: HostDeviceSection | None = None
    """Only for a single endpoint; its device is in the kernel's spelling."""


@dataclass(frozen=True, slots=True)
class DeviceSetup:
    """One virtual machine's IOMMU as the user wants it."""

    settings: Settings
    endpoints: tuple[EndpointRange, ...]
    named: bool
    """Endpoints were named by the configuration; otherwise every function of PCI segment 0 is one."""
    topology: bytes = b""
    """The topology in configuration space; empty: none there."""
    config_notices: bool = False
    """Send configuration change notices."""
    qmp: Path | None = None
    """QMP socket whose RESET events are resets of the machine."""
    host: HostSection = field(default_factory=HostSection)
    control: ControlSection = field(default_factory=ControlSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)

    @property
    def summary(self) -> str:
        """In a few words."""
        if not self.named:
            return "no endpoint named: all of PCI segment 0"
        count = sum(entry.last - entry.first + 1 for entry in self.endpoints)
        return f"{count} endpoint{'s' if count != 1 else ''}"


def plan(config: Config) -> DeviceSetup:
    """What a configuration amounts to.

    :raises UsageError: values that do not go together, in one line.
    """
    device, limits = config.device, config.limits
    personality = PERSONALITIES[device.personality]
    mask = _page_size_mask(device)
    features = _features(device, personality)
    for name, span in (("input-range", device.input_range), ("domain-range", device.domain_range)):
        if span.start > span.end:
            raise Wrong(f"device.{name}.start", span.start, f"at most device.{name}.end, which is {span.end:#x}")
    _check_input_range(device, mask & -mask)
    if personality is not Personality.V1_X:
        _check_early_domains(device)
    settings = Settings(
        features=features,
        page_size_mask=mask,
        input_first=device.input_range.start,
        input_last=device.input_range.end,
        domain_first=device.domain_range.start,
        domain_last=device.domain_range.end,
        probe_size=device.probe_size,
        personality=personality,
        bypass=device.bypass,
        max_endpoints=limits.endpoints,
        max_domains=limits.domains,
        max_faults=limits.faults,
        max_mappings=limits.mappings,
        max_domain_mappings=limits.mappings_per_domain,
        fault_wait_ms=limits.fault_wait_ms,
        fault_burst=limits.fault_burst,
        fault_rate=limits.fault_rate,
        spin_us=config.worker.spin_us,
        time_every=config.worker.time_every,
    )
    endpoints = _endpoints(config)
    return DeviceSetup(
        settings,
        endpoints,
        named=bool(config.endpoint),
        topology=_builtin_topology(config, settings, endpoints),
        config_notices=device.config_notices,
        qmp=None if config.qemu.qmp is None else Path(config.qemu.qmp),
        host=config.host,
        control=config.control,
        metrics=config.metrics,
    )


def _builtin_topology(config: Config, settings: Settings, endpoints: tuple[EndpointRange, ...]) -> bytes:
    """The topology as configuration space shows it; checked even where it is only for the renderings."""
    section = config.topology
    if section is None or (not config.endpoint and section.builtin is None):
        return b""
    if not config.endpoint:
        raise Wrong("topology.builtin", section.builtin, "left out without an [[endpoint]]: there is nothing to list")
    # Only here: most daemons describe nothing, and start the sooner.
    from viommud.topology import builtin
    from viommud.topology.model import Ids, Topology

    topology = Topology.build(section, [Ids(entry.first, entry.last) for entry in endpoints])
    if section.builtin is None:
        return b""
    if settings.personality is not Personality.V1_X:
        raise Wrong("device.personality", config.device.personality, '"1.x" with topology.builtin')
    if Feature.BYPASS_CONFIG in settings.features:
        raise Wrong("device.bypass-config", True, "false with topology.builtin: both use feature bit 6 and byte 36")
    return builtin.render(section.builtin, topology)


def _page_size_mask(device: Device) -> int:
    if device.page_size_mask is not None:
        if device.granule is not None:
            raise Wrong("device.page-size-mask", device.page_size_mask, "left out where device.granule is given")
        if device.page_size_mask == 0:
            raise Wrong("device.page-size-mask", 0, "a mask with at least one bit; the lowest is the granule")
        return device.page_size_mask
    granule = DEFAULT_GRANULE if device.granule is None else device.granule
    if granule == 0 or granule & (granule - 1):
        raise Wrong("device.granule", granule, 'a power of two, as 4096 or "64K"')
    return U64_MAX + 1 - granule


def _features(device: Device, personality: Personality) -> Feature:
    modern = personality is Personality.V1_X
    for name, value in (("bypass-config", device.bypass_config), ("mmio", device.mmio)):
        if value and not modern:
            raise Wrong(f"device.{name}", value, f'false with device.personality = "{device.personality}"')
    features = Feature.INPUT_RANGE | Feature.DOMAIN_RANGE | Feature.MAP_UNMAP | Feature.VERSION_1
    if device.probe_size:
        features |= Feature.PROBE
    if modern and device.mmio is not False:
        features |= Feature.MMIO
    if modern and device.bypass_config is not False:
        features |= Feature.BYPASS_CONFIG
    elif device.bypass:
        # The older feature says the same once and for all; it is never offered together with BYPASS_CONFIG.
        features |= Feature.BYPASS
    for wanted, feature in (
        (device.indirect, Feature.RING_INDIRECT_DESC),
        (device.event_idx, Feature.RING_EVENT_IDX),
        (device.in_order, Feature.IN_ORDER),
        (device.packed_ring, Feature.RING_PACKED),
    ):
        if wanted:
            features |= feature
    return features


def _check_input_range(device: Device, granule: int) -> None:
    if device.input_range.start % granule:
        raise Wrong("device.input-range.start", device.input_range.start, f"a multiple of the granule, {granule:#x}")
    if (device.input_range.end + 1) % granule:
        raise Wrong(
            "device.input-range.end", device.input_range.end, f"one less than a multiple of the granule, {granule:#x}"
        )


def _check_early_domains(device: Device) -> None:
    """Early drivers are told a number of bits rather than a range."""
    version = f'with device.personality = "{device.personality}"'
    if device.domain_range.start:
        raise Wrong("device.domain-range.start", device.domain_range.start, f"0 {version}")
    size = device.domain_range.end + 1
    if size & (size - 1):
        raise Wrong("device.domain-range.end", device.domain_range.end, f"one less than a power of two {version}")


def _endpoints(config: Config) -> tuple[EndpointRange, ...]:
    msi = _msi_region(config.device)
    default = () if msi is None else (msi,)
    if not config.endpoint:
        return (EndpointRange(0, PCI_SEGMENT_LAST, default),)
    ranges: list[EndpointRange] = []
    for index, endpoint in enumerate(config.endpoint):
        key = f"endpoint[{index}]"
        first, last = parse_endpoints(endpoint.id, f"{key}.id")
        for other_index, other in enumerate(ranges):
            if first <= other.last and other.first <= last:
                raise Wrong(f"{key}.id", endpoint.id, f"apart from the endpoints of endpoint[{other_index}]")
        if endpoint.vfio_user is not None:
            _check_vfio_user(endpoint.vfio_user, f"{key}.vfio-user", first, last, ranges)
        host = None
        if endpoint.host is not None:
            if endpoint.vfio_user is not None:
                raise Wrong(f"{key}.host", endpoint.id, "left out where the endpoint has vfio-user")
            host = _check_host(endpoint.host, f"{key}.host", first, last, ranges)
        reserved = _reserved(endpoint, key, default, config.device.probe_size)
        ranges.append(EndpointRange(first, last, reserved, endpoint.vfio_user, host))
    count = sum(entry.last - entry.first + 1 for entry in ranges)
    if count > config.limits.endpoints:
        raise Wrong("limits.endpoints", config.limits.endpoints, f"at least {count}, the endpoints that are configured")
    return tuple(ranges)


def _check_vfio_user(section: VfioUserSection, key: str, first: int, last: int, others: list[EndpointRange]) -> None:
    if first != last:
        raise Wrong(key, f"{first:#x}-{last:#x}", "a table of a single endpoint: a client is one device")
    for name, path in (("listen", section.listen), ("server", section.server)):
        size = len(os.fsencode(path))
        if not 0 < size <= SOCKET_PATH_MAX or "\0" in path:
            raise Wrong(f"{key}.{name}", path, f"the path of a socket, 1 to {SOCKET_PATH_MAX} bytes")
    if section.listen == section.server:
        raise Wrong(f"{key}.server", section.server, "another socket than listen")
    for index, other in enumerate(others):
        if other.vfio_user is not None and section.listen in (other.vfio_user.listen, other.vfio_user.server):
            raise Wrong(f"{key}.listen", section.listen, f"apart from the sockets of endpoint[{index}]")
        if other.vfio_user is not None and section.server == other.vfio_user.listen:
            raise Wrong(f"{key}.server", section.server, f"apart from the socket that endpoint[{index}] listens on")


def _check_host(
    section: HostDeviceSection, key: str, first: int, last: int, others: list[EndpointRange]
) -> HostDeviceSection:
    if first != last:
        raise Wrong(key, f"{first:#x}-{last:#x}", "a table of a single endpoint: it is one device")
    given = {name: value for name in ("device", "fd", "container") if (value := getattr(section, name)) is not None}
    if len(given) != 1:
        raise Wrong(key, ", ".join(given) or "empty", "a table with one of device, fd and container")
    (name,) = given
    if section.device is not None:
        section = HostDeviceSection(device=normalise(section.device, f"{key}.device"))
    for index, other in enumerate(others):
        if other.host == section:
            raise Wrong(f"{key}.{name}", given[name], f"another than that of endpoint[{index}]")
    return section


def _msi_region(device: Device) -> Reserved | None:
    """The doorbell region that endpoints have unless they name their own."""
    room = device.probe_size >= RESV_MEM_BYTES
    if device.msi == "auto":
        return MSI_REGIONS.get(_HOSTS.get(platform.machine(), "none")) if room else None
    region = MSI_REGIONS.get(device.msi)
    if region is not None and not room:
        raise Wrong("device.probe-size", device.probe_size, f'at least {RESV_MEM_BYTES}, or device.msi be "none"')
    return region


def _reserved(endpoint: Endpoint, key: str, default: tuple[Reserved, ...], probe_size: int) -> tuple[Reserved, ...]:
    own: list[Reserved] = []
    for index, entry in enumerate(endpoint.reserved):
        where = f"{key}.reserved[{index}]"
        if entry.start > entry.end:
            raise Wrong(f"{where}.start", entry.start, f"at most its end, which is {entry.end:#x}")
        kind = ReservedKind.MSI if entry.type == "msi" else ReservedKind.RESERVED
        if kind is ReservedKind.MSI and any(other.kind is ReservedKind.MSI for other in own):
            raise Wrong(f"{where}.type", entry.type, '"reserved": an endpoint has one MSI region at most')
        own.append(Reserved(entry.start, entry.end, kind))
    given = () if any(region.kind is ReservedKind.MSI for region in own) else default
    regions = (*given, *own)
    for index, region in enumerate(regions):
        for other in regions[:index]:
            if region.first <= other.last and other.first <= region.last:
                raise Wrong(
                    f"{key}.reserved[{index - len(given)}]",
                    f"{region.first:#x}-{region.last:#x}",
                    f"apart from the reserved region {other.first:#x}-{other.last:#x}"
                    + (" of device.msi" if other in given else ""),
                )
    if len(regions) * RESV_MEM_BYTES > probe_size:
        raise Wrong(
            "device.probe-size", probe_size, f"at least {len(regions) * RESV_MEM_BYTES} for the regions of {key}"
        )
    return regions
