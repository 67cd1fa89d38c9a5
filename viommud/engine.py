"""The C engine as a typed object: with `instruments` the only module that touches cffi.

An `Engine` is a `viommud.vhost_user.device.Device`.  Every method is a plain call into C, which releases the GIL; the
ones that change what the worker sees wait for it to finish its round, microseconds as a rule.  Errors of the engine
become `DeviceRefused` where a front-end asked, `OSError` elsewhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, TypeVar

from viommud import config_space
from viommud._core import ffi, lib
from viommud.instruments import Instruments
from viommud.settings import FEATURE_TOPOLOGY, Feature, Personality, Reserved, Settings
from viommud.vhost_user.device import DeviceRefused, MappedRegion, QueueSetup, Region

ABI = 2
if lib.viommu_abi_version() != ABI:  # a stale build of the extension beside newer Python
    raise ImportError(f"viommud._core has ABI {lib.viommu_abi_version()}, this package needs {ABI}: build it again")

REQUEST_NAMES = ("unknown", "attach", "detach", "map", "unmap", "probe")
STATUS_NAMES = ("ok", "ioerr", "unsupp", "deverr", "inval", "range", "noent", "fault", "nomem", "unanswered")
PAGE = 256  # entries of a listing fetched while the worker stands still


class RecordKind(IntEnum):
    """What a record tells."""

    REFUSED = lib.VIOMMU_RECORD_REFUSED
    BROKEN = lib.VIOMMU_RECORD_BROKEN
    ATTACHED = lib.VIOMMU_RECORD_ATTACHED
    DETACHED = lib.VIOMMU_RECORD_DETACHED
    FAULT = lib.VIOMMU_RECORD_FAULT
    INJECTED = lib.VIOMMU_RECORD_INJECTED


class Broken(IntEnum):
    """Why a ring was stopped."""

    AVAIL = lib.VIOMMU_BROKEN_AVAIL
    HEAD = lib.VIOMMU_BROKEN_HEAD
    LOOP = lib.VIOMMU_BROKEN_LOOP
    ORDER = lib.VIOMMU_BROKEN_ORDER
    INDIRECT = lib.VIOMMU_BROKEN_INDIRECT
    ADDRESS = lib.VIOMMU_BROKEN_ADDRESS
    LENGTH = lib.VIOMMU_BROKEN_LENGTH
    MEMORY = lib.VIOMMU_BROKEN_MEMORY


@dataclass(frozen=True, slots=True)
class Record:
    """Something that happened in the worker; fields as in struct viommu_record."""

    kind: RecordKind
    type: int
    code: int
    endpoint: int
    domain: int
    value: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine was made; fields as in struct viommu_stats."""

    requests: dict[str, dict[str, int]]
    """By request type, by status; what never happened is left out."""
    endpoints: int
    domains: int
    mappings: int
    peak_domains: int
    peak_mappings: int
    mapping_bytes: int
    limit_hits: int
    faults_sent: int
    faults_dropped: int
    rings_broken: int
    kicks: int
    notifications: int
    batches: int
    busy_ns: int
    spin_ns: int
    sleeps: int
    heartbeat: int
    asleep: bool


class VfioUserState(IntEnum):
    """Where the connection of a vfio-user endpoint is."""

    ABSENT = lib.VIOMMU_VFIO_USER_ABSENT
    UP = lib.VIOMMU_VFIO_USER_UP
    FAILED = lib.VIOMMU_VFIO_USER_FAILED


CUT_OFF_CAUSES = {
    0: None,
    lib.VIOMMU_VFIO_USER_GONE: "it closed the connection",
    lib.VIOMMU_VFIO_USER_PROTOCOL: "it broke the protocol",
    lib.VIOMMU_VFIO_USER_REFUSED: "it answered DMA_MAP or DMA_UNMAP with an error",
    lib.VIOMMU_VFIO_USER_TIMEOUT: "it did not give up a mapping, or take messages, in time",
    lib.VIOMMU_VFIO_USER_SILENT: "it did not answer a request in time",
    lib.VIOMMU_VFIO_USER_LIMIT: "it cannot keep as many mappings as memory now needs",
    lib.VIOMMU_VFIO_USER_NOMEM: "there was no memory for a message to it",
}


@dataclass(frozen=True, slots=True)
class VfioUserStats:
    """Counters of a vfio-user endpoint; fields as in struct viommu_vfio_user_stats."""

    state: VfioUserState
    cause: str | None
    """Why the server was cut off last."""
    failures: int
    connections: int
    requests: int
    replies: int
    errors: int
    answered: int
    strays: int
    maps: int
    unmaps: int
    reads: int
    read_bytes: int
    writes: int
    write_bytes: int
    refused: int
    memory_bytes: int
    peak_memory_bytes: int
    reachable_bytes: int
    peak_reachable_bytes: int


class VfioUser:
    """An endpoint whose device is another process.  Lives as long as its engine."""

    def __init__(self, handle: Any, endpoint: int) -> None:
        self._handle = handle
        self.endpoint = endpoint
        self.event_fd: int = lib.viommu_vfio_user_event_fd(handle)
        """An eventfd, written whenever the state changes."""

    def connect(self, client_fd: int, server_fd: int, limits: Any) -> None:
        """Relay between two sockets that have exchanged VERSION; both stay the caller's.

        :param limits: has max_fds, max_dma_maps and max_transfer.
        :raises OSError: the connection before has not ended, or the host lacks something.
        """
        raw = ffi.new("struct viommu_vfio_user_limits *")
        raw.max_fds, raw.max_dma_maps, raw.max_transfer = limits.max_fds, limits.max_dma_maps, limits.max_transfer
        rc = lib.viommu_vfio_user_connect(self._handle, client_fd, server_fd, raw)
        if rc != 0:
            raise OSError(-rc, os.strerror(-rc))

    def disconnect(self) -> None:
        """End the connection, if there is one."""
        lib.viommu_vfio_user_disconnect(self._handle)

    def stats(self) -> VfioUserStats:
        """Counters, read without stopping anything."""
        raw = ffi.new("struct viommu_vfio_user_stats *")
        lib.viommu_vfio_user_stats(self._handle, raw)
        plain: dict[str, Any] = {f.name: getattr(raw, f.name) for f in fields(VfioUserStats)}
        plain["state"], plain["cause"] = VfioUserState(raw.state), CUT_OFF_CAUSES[raw.cause]
        return VfioUserStats(**plain)


@dataclass(frozen=True, slots=True)
class EndpointInfo:
    """An endpoint that the guest has named."""

    id: int
    domain: int | None
    bypass: bool
    faults: int


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain that exists."""

    id: int
    endpoints: int
    mappings: int
    bypass: bool


@dataclass(frozen=True, slots=True)
class Mapping:
    """One guest MAP: IOVAs first to last, both included, lead to guest-physical phys on."""

    first: int
    last: int
    phys: int
    flags: int


@dataclass(frozen=True, slots=True)
class HostInfo:
    """Of the iommufd; as struct viommu_iommufd_info."""

    monitor_ioas: int
    unsettled: int
    bytes_from_monitor: int
    bytes_from_files: int


class EngineRegion:
    """A piece of guest memory, mapped; keeps its file open until closed and out of use."""

    def __init__(self, region: Region, fd: int) -> None:
        out = ffi.new("struct viommu_region **")
        rc = lib.viommu_region_map(region.guest_addr, region.size, region.user_addr, region.mmap_offset, fd, out)
        if rc == -errno.ENXIO:
            raise DeviceRefused("the file of a memory region is shorter than the region")
        if rc == -errno.EBADF:
            raise DeviceRefused("a memory region is not backed by a file that can be shared")
        if rc != 0:
            raise DeviceRefused(f"a memory region cannot be mapped: {os.strerror(-rc)}")
        self._handle: Any = out[0]
        self._region = region

    @property
    def region(self) -> Region:
        """The description it was mapped from."""
        return self._region

    @property
    def handle(self) -> Any:
        """The engine's own handle."""
        return self._handle

    def close(self) -> None:
        """Give up our reference; the engine unmaps when it has none either."""
        if self._handle is not None:
            lib.viommu_region_free(self._handle)
            self._handle = None


def _reserved(reserved: Sequence[Reserved]) -> Any:
    raw = ffi.new("struct viommu_reserved[]", max(len(reserved), 1))
    for entry, region in zip(raw, reserved, strict=False):
        entry.first, entry.last, entry.subtype = region.first, region.last, int(region.kind)
    return raw


def _check_added(rc: int, first: int, last: int) -> None:
    if rc == -errno.EEXIST:
        raise ValueError(f"an endpoint of {first:#x}-{last:#x} exists already")
    if rc == -errno.EINVAL:
        raise ValueError(f"the reserved regions of endpoints {first:#x}-{last:#x} cannot be described")
    if rc != 0:
        raise OSError(-rc, os.strerror(-rc))


_Info = TypeVar("_Info", EndpointInfo, DomainInfo)


def _in_pages(fetch: Callable[[int], list[_Info]]) -> Iterator[_Info]:
    start = 0
    while start <= 0xFFFFFFFF:
        page = fetch(start)
        yield from page
        if len(page) < PAGE:
            return
        start = page[-1].id + 1


def _fd(fd: int | None) -> int:
    return -1 if fd is None else fd


class Engine:
    """The virtio-iommu of one virtual machine, with its worker thread.

    :param topology: a built-in topology, configuration space from `config_space.BYPASS_OFFSET` on; offered with feature
        bit 6, which is BYPASS_CONFIG where there is none.
    """

    def __init__(self, settings: Settings, topology: bytes = b"") -> None:
        if topology and (Feature.BYPASS_CONFIG in settings.features or settings.personality is not Personality.V1_X):
            raise ValueError("a built-in topology excludes BYPASS_CONFIG and the early personalities")
        raw = ffi.new("struct viommu_settings *")
        for field in fields(settings):
            setattr(raw, field.name, int(getattr(settings, field.name)))
        out = ffi.new("struct viommu_engine **")
        rc = lib.viommu_engine_new(raw, out)
        if rc == -errno.EINVAL:
            raise ValueError("the settings contradict each other")
        if rc != 0:
            raise OSError(-rc, os.strerror(-rc))
        self._engine: Any = out[0]
        self.settings = settings
        self.instruments = Instruments(self._engine)
        """For those who look at the engine and steer it."""
        self.vfio_users: list[VfioUser] = []
        """Endpoints whose devices are other processes, in the order they were added."""
        self._topology = topology
        self._driver_features = 0
        self.record_fd: int = lib.viommu_engine_record_fd(self._engine)
        """Readable when take_records() has something."""

    def close(self) -> None:
        """Stop the worker and free everything; no other method may be called afterwards."""
        if self._engine is not None:
            self.instruments.close()
            lib.viommu_engine_free(self._engine)
            self._engine = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add_endpoints(self, first: int, last: int, reserved: Sequence[Reserved] = ()) -> None:
        """Endpoints first to last exist, each with these reserved regions.

        :raises ValueError: one exists already, regions overlap, or they do not fit into probe_size bytes.
        """
        rc = lib.viommu_engine_add_endpoints(self._engine, first, last, _reserved(reserved), len(reserved))
        _check_added(rc, first, last)

    def add_vfio_user(
        self,
        endpoint: int,
        reserved: Sequence[Reserved] = (),
        *,
        shared: bool,
        timeout_ms: int,
        reply_timeout_ms: int,
        spin_us: int = 0,
    ) -> VfioUser:
        """An endpoint whose device is another process; it has no connection yet.

        :param shared: the server is given the files of guest memory.
        :raises ValueError: as for add_endpoints().
        """
        raw = ffi.new("struct viommu_vfio_user_settings *")
        raw.endpoint = endpoint
        raw.mode = lib.VIOMMU_VFIO_USER_SHARED if shared else lib.VIOMMU_VFIO_USER_STRICT
        raw.timeout_ms, raw.reply_timeout_ms, raw.spin_us = timeout_ms, reply_timeout_ms, spin_us
        out = ffi.new("struct viommu_vfio_user **")
        rc = lib.viommu_vfio_user_new(self._engine, raw, _reserved(reserved), len(reserved), out)
        _check_added(rc, endpoint, endpoint)
        self.vfio_users.append(VfioUser(out[0], endpoint))
        return self.vfio_users[-1]

    def set_iommufd(self, fd: int, *, from_files: bool = False) -> None:
        """Endpoints added by add_host_device() are behind the host's IOMMU, by this iommufd.

        :param from_files: guest memory there comes from its files, whatever the front-end has mapped already.
        :raises OSError: it is no iommufd.
        """
        source = lib.VIOMMU_IOMMUFD_FROM_FILES if from_files else lib.VIOMMU_IOMMUFD_FROM_MONITOR
        rc = lib.viommu_engine_set_iommufd(self._engine, fd, source)
        if rc != 0:
            raise OSError(-rc, os.strerror(-rc))

    def add_host_device(self, endpoint: int, fd: int, reserved: Sequence[Reserved] = ()) -> None:
        """An endpoint whose device is this VFIO character device.

        :raises ValueError: as add_endpoints().
        """
        rc = lib.viommu_engine_add_iommufd_endpoint(self._engine, endpoint, fd, _reserved(reserved), len(reserved))
        _check_added(rc, endpoint, endpoint)

    def add_type1_device(self, endpoint: int, container: int, reserved: Sequence[Reserved] = ()) -> None:
        """An endpoint whose device is alone in this VFIO container, of TYPE1v2.

        :raises ValueError: as add_endpoints().
        :raises OSError: it is no such container.
        """
        rc = lib.viommu_engine_add_type1_endpoint(self._engine, endpoint, container, _reserved(reserved), len(reserved))
        _check_added(rc, endpoint, endpoint)

    def settle_host_devices(self) -> HostInfo | None:
        """Put devices where they belong that the front-end had not bound before; None: there is no iommufd."""
        raw = ffi.new("struct viommu_iommufd_info *")
        lib.viommu_engine_settle_iommufd(self._engine)
        if lib.viommu_engine_iommufd_info(self._engine, raw) != 0:
            return None
        return HostInfo(raw.monitor_ioas, raw.unsettled, raw.bytes_from_monitor, raw.bytes_from_files)

    def set_limits(self, *, endpoints: int, domains: int, mappings: int, mappings_per_domain: int) -> None:
        """Limits anew; what exists stays, even above them."""
        self.instruments.set_limits(
            endpoints=endpoints, domains=domains, mappings=mappings, mappings_per_domain=mappings_per_domain
        )
        self.settings = replace(
            self.settings,
            max_endpoints=endpoints,
            max_domains=domains,
            max_mappings=mappings,
            max_domain_mappings=mappings_per_domain,
        )

    # ---------------------------------------------------------------------------------- what a session asks for

    @property
    def offered_features(self) -> int:
        """Virtio feature bits."""
        return int(self.settings.features) | (FEATURE_TOPOLOGY if self._topology else 0)

    @property
    def num_queues(self) -> int:
        """The request queue and the event queue."""
        return int(lib.VIOMMU_QUEUES)

    @property
    def max_queue_size(self) -> int:
        """Entries."""
        return int(lib.VIOMMU_MAX_QUEUE_SIZE)

    @property
    def config_size(self) -> int:
        """Bytes."""
        return config_space.size(self.settings, self._topology)

    @property
    def needs_reset(self) -> bool:
        """A ring is broken and the device has not been reset since."""
        return bool(lib.viommu_engine_needs_reset(self._engine))

    def config_read(self, offset: int, size: int) -> bytes:
        """Configuration space as it is now."""
        return config_space.render(self.settings, self.bypass, self._topology)[offset : offset + size]

    def config_write(self, offset: int, data: bytes, migration: bool) -> None:
        """Take over `bypass` and nothing else.

        The front-end writes back the whole space, so the other fields are ignored, not refused.  A value other than 0
        and 1 is ignored too: to clamp it would let a driver's mistake open the bypass.
        """
        at = config_space.BYPASS_OFFSET - offset
        if not 0 <= at < len(data) or not Feature.BYPASS_CONFIG & self.settings.features:
            return
        if not migration and not Feature.BYPASS_CONFIG & self._driver_features:
            return
        if data[at] in (0, 1) and bool(data[at]) != self.bypass:
            self.bypass = bool(data[at])

    def set_driver_features(self, features: int) -> None:
        """Features that the driver accepted."""
        if self._topology:
            features &= ~FEATURE_TOPOLOGY  # says that there is something to read; nothing for the engine
        rc = lib.viommu_engine_set_features(self._engine, features)
        if rc != 0:
            raise DeviceRefused(f"features {features & ~self.offered_features:#x} were not offered")
        self._driver_features = features

    def map_region(self, region: Region, fd: int) -> EngineRegion:
        """Map a piece of guest memory; it is used from the next set_memory() on."""
        return EngineRegion(region, fd)

    def set_memory(self, regions: Sequence[MappedRegion]) -> None:
        """Exactly these regions are guest memory now."""
        handles = [region.handle for region in regions if isinstance(region, EngineRegion)]
        rc = lib.viommu_engine_set_memory(self._engine, handles, len(handles))
        if rc != 0:
            raise DeviceRefused(f"the memory table cannot be used: {os.strerror(-rc)}")

    def _ring(self, setup: QueueSetup) -> Any:
        ring = ffi.new("struct viommu_ring *")
        ring.size, ring.base = setup.size, setup.base
        ring.desc, ring.avail, ring.used = setup.desc, setup.avail, setup.used
        ring.gpa = setup.addresses_are_gpa
        ring.logged, ring.log_addr = setup.log_addr is not None, setup.log_addr or 0
        ring.kick, ring.call, ring.err = setup.kick_fd, _fd(setup.call_fd), _fd(setup.err_fd)
        return ring

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        """Serve a ring."""
        rc = lib.viommu_queue_start(self._engine, index, self._ring(setup))
        if rc == -errno.EFAULT:
            raise DeviceRefused(
                f"ring {index} lies outside the memory the front-end shared (is guest RAM shared, share=on?)"
            )
        if rc == -errno.EINVAL:
            raise DeviceRefused(f"ring {index} has a size, alignment or base that no ring can have")
        if rc != 0:
            raise DeviceRefused(f"ring {index} cannot be started: {os.strerror(-rc)}")

    def stop_queue(self, index: int) -> int:
        """Serve a ring no more; everything taken from it has been answered."""
        base = ffi.new("uint32_t *")
        rc = lib.viommu_queue_stop(self._engine, index, base)
        if rc != 0:
            raise DeviceRefused(f"there is no ring {index}")
        return int(base[0])

    def ring_looks_used(self, index: int, setup: QueueSetup) -> bool:
        """Whether a stopped ring's memory shows that it was served before."""
        return int(lib.viommu_queue_looks_used(self._engine, self._ring(setup))) == 1

    def set_call(self, index: int, fd: int | None) -> None:
        """Replace the eventfd of interrupts; of a ring that does not run, the next start brings it."""
        lib.viommu_queue_set_call(self._engine, index, _fd(fd))

    def set_err(self, index: int, fd: int | None) -> None:
        """Replace the eventfd of ring errors."""
        lib.viommu_queue_set_err(self._engine, index, _fd(fd))

    def set_log(self, fd: int | None, size: int, offset: int) -> None:
        """Replace the dirty log."""
        rc = lib.viommu_engine_set_log(self._engine, _fd(fd), size, offset)
        if rc != 0:
            raise DeviceRefused(f"the dirty log cannot be mapped: {os.strerror(-rc)}")

    def set_logging(self, on: bool) -> None:
        """Log writes to guest memory, or stop logging."""
        lib.viommu_engine_set_logging(self._engine, on)

    def set_queue_log(self, index: int, log_addr: int | None) -> None:
        """Where writes to a ring are logged."""
        lib.viommu_queue_set_log(self._engine, index, log_addr is not None, log_addr or 0)

    def inflight_size(self, num_queues: int, queue_size: int) -> int:
        """Bytes of in-flight memory."""
        return int(lib.viommu_inflight_size(num_queues, queue_size))

    def set_inflight(self, fd: int | None, size: int, offset: int, num_queues: int, queue_size: int) -> None:
        """Replace the in-flight memory."""
        rc = lib.viommu_engine_set_inflight(self._engine, _fd(fd), size, offset, num_queues, queue_size)
        if rc != 0:
            raise DeviceRefused(f"the in-flight memory cannot be used: {os.strerror(-rc)}")

    def reset(self) -> None:
        """Device reset: no endpoint attached, no domain, no waiting fault.  `bypass` stays."""
        lib.viommu_engine_reset(self._engine)

    # ------------------------------------------------------------------------------------------------ the rest

    @property
    def driver_features(self) -> Feature:
        """Features that the driver accepted."""
        return Feature(self._driver_features)

    @property
    def bypass(self) -> bool:
        """config.bypass: whether endpoints in no domain reach all memory."""
        return bool(lib.viommu_engine_bypass(self._engine))

    @bypass.setter
    def bypass(self, value: bool) -> None:
        lib.viommu_engine_set_bypass(self._engine, value)

    def raise_fault(self, endpoint: int, reason: int, flags: int, address: int = 0) -> bool:
        """Report a fault to the guest: reason 0 unknown, 1 domain, 2 mapping; flags READ 1, WRITE 2, ADDRESS 0x100.

        :returns: False when it was dropped (too many wait, or the endpoint is over its rate).
        :raises ValueError: there is no such endpoint.
        """
        rc = lib.viommu_engine_fault(self._engine, endpoint, reason, flags, address)
        if rc == -errno.ENOENT:
            raise ValueError(f"there is no endpoint {endpoint:#x}")
        return int(rc) == 0

    def stats(self) -> Stats:
        """Counters, read without stopping the worker."""
        raw = ffi.new("struct viommu_stats *")
        lib.viommu_engine_stats(self._engine, raw)
        requests = {
            name: counts
            for i, name in enumerate(REQUEST_NAMES)
            if (counts := {status: int(n) for status, n in zip(STATUS_NAMES, raw.requests[i], strict=True) if n})
        }
        plain: dict[str, Any] = {f.name: getattr(raw, f.name) for f in fields(Stats) if f.name != "requests"}
        return Stats(requests=requests, **plain)

    def take_records(self, limit: int = PAGE) -> tuple[list[Record], int]:
        """Up to limit records, oldest first, and how many were lost since the last call."""
        raw = ffi.new("struct viommu_record[]", limit)
        lost = ffi.new("uint64_t *")
        count = lib.viommu_engine_take_records(self._engine, raw, limit, lost)
        records = [
            Record(RecordKind(r.kind), r.type, r.code, r.endpoint, r.domain, r.value, r.first, r.last)
            for r in raw[0:count]
        ]
        return records, int(lost[0])

    def endpoints_from(self, start: int, limit: int = PAGE) -> list[EndpointInfo]:
        """Up to limit endpoints the guest has named, by ID, from an ID on."""
        raw = ffi.new("struct viommu_endpoint_info[]", limit)
        count = lib.viommu_engine_endpoints(self._engine, start, raw, limit)
        return [
            EndpointInfo(info.id, info.domain if info.attached else None, info.bypass, info.faults)
            for info in raw[0:count]
        ]

    def domains_from(self, start: int, limit: int = PAGE) -> list[DomainInfo]:
        """Up to limit domains, by ID, from an ID on."""
        raw = ffi.new("struct viommu_domain_info[]", limit)
        count = lib.viommu_engine_domains(self._engine, start, raw, limit)
        return [DomainInfo(info.id, info.endpoints, info.mappings, info.bypass) for info in raw[0:count]]

    def endpoints(self) -> Iterator[EndpointInfo]:
        """Endpoints the guest has named, by ID; fetched a page at a time."""
        yield from _in_pages(self.endpoints_from)

    def domains(self) -> Iterator[DomainInfo]:
        """Domains, by ID; fetched a page at a time."""
        yield from _in_pages(self.domains_from)

    def mappings(self, domain: int, start: int = 0, limit: int = PAGE) -> list[Mapping]:
        """Up to limit mappings of a domain that end at or after IOVA start, in order.

        :raises KeyError: there is no such domain.
        """
        raw = ffi.new("struct viommu_mapping_info[]", limit)
        count = lib.viommu_engine_mappings(self._engine, domain, start, raw, limit)
        if count < 0:
            raise KeyError(domain)
        return [Mapping(m.first, m.last, m.phys, m.flags) for m in raw[0:count]]

    def translate(self, endpoint: int, iova: int, access: int = 0) -> int | None:
        """The guest-physical address an access (READ 1, WRITE 2) of an endpoint reaches; None: none.

        :raises ValueError: there is no such endpoint.
        """
        gpa = ffi.new("uint64_t *")
        rc = lib.viommu_engine_translate(self._engine, endpoint, iova, access, gpa)
        if rc == -errno.ENOENT:
            raise ValueError(f"there is no endpoint {endpoint:#x}")
        return int(gpa[0]) if rc == 0 else None
