"""The descriptors behind the endpoints that are devices of the host: opened here, or passed by who started us."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from viommud.device_setup import RESV_MEM_BYTES, DeviceSetup, EndpointRange
from viommud.endpoint_id import show
from viommud.errors import UsageError
from viommud.host import limits, sysfs, uapi
from viommud.host.uapi import IovaRanges
from viommud.service import listen_fds


@dataclass
class HostDevices:
    """An iommufd and devices; the engine duplicates what it needs, QEMU inherits them."""

    iommufd: int | None = None
    """None: no device needs one."""
    devices: dict[int, int] = field(default_factory=dict)
    """Descriptor of each endpoint's device that is bound to the iommufd."""
    containers: dict[int, int] = field(default_factory=dict)
    """VFIO container of each endpoint that has one."""
    ranges: dict[int, IovaRanges] = field(default_factory=dict)
    """What the host can translate for it; an endpoint whose device was bound by somebody before is not in it."""

    def close(self) -> None:
        """Close them all."""
        for fd in self.descriptors():
            with suppress(OSError):
                os.close(fd)
        self.iommufd = None
        self.devices.clear()
        self.containers.clear()

    def descriptors(self) -> list[int]:
        """All of them."""
        own = [] if self.iommufd is None else [self.iommufd]
        return [*own, *self.devices.values(), *self.containers.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def narrow(self, setup: DeviceSetup) -> DeviceSetup:
        """A setup as the host can serve it.

        :raises UsageError: it cannot.
        """
        return limits.apply(setup, self.ranges, RESV_MEM_BYTES)


def passed_descriptors(given: Mapping[str, int]) -> dict[str, int]:
    """Descriptors by name: those of the command line, and those in LISTEN_FDS, which stay there for others to find."""
    return {**dict(listen_fds(dict(os.environ))), **given}


def acquire(setup: DeviceSetup, given: Mapping[str, int], *, may_open: bool) -> HostDevices | None:
    """What the endpoints of a configuration need; None when none is a device of the host.

    :param given: descriptors by name.
    :param may_open: open devices that are named by their address; otherwise all must be passed.
    :raises UsageError: one cannot be had.
    """
    entries = [entry for entry in setup.endpoints if entry.host is not None]
    if not entries:
        return None
    with ExitStack() as stack:
        found = stack.enter_context(HostDevices())
        if any(entry.host is not None and entry.host.container is None for entry in entries):
            found.iommufd = _iommufd(setup.host.iommufd, given, may_open=may_open)
        for entry in entries:
            assert entry.host is not None
            if entry.host.container is not None:
                _add_container(found, entry.first, entry.host.container, given)
                continue
            fd = found.devices[entry.first] = _device(entry, given, may_open=may_open)
            with suppress(OSError):  # somebody has bound it before us: then nothing can be asked of it any more
                found.ranges[entry.first] = uapi.iova_ranges(f"/proc/self/fd/{fd}")
        stack.pop_all()
        return found


def _iommufd(name: str, given: Mapping[str, int], *, may_open: bool) -> int:
    if name in given:
        iommufd = os.dup(_check(given[name], f'host.iommufd = "{name}"'))
        described = f'the descriptor passed as "{name}"'
    elif may_open:
        iommufd, described = _open(uapi.IOMMU, "the kernel's iommufd"), uapi.IOMMU
    else:
        raise UsageError(
            f'endpoints are devices of the host, and no descriptor "{name}" is passed for them',
            hint="start QEMU with `viommud run`, or pass descriptors with --pass-fd or in LISTEN_FDS",
        )
    if not uapi.is_iommufd(iommufd):
        os.close(iommufd)
        raise UsageError(f"{described}: not an open /dev/iommu")
    return iommufd


def _add_container(found: HostDevices, endpoint: int, name: str, given: Mapping[str, int]) -> None:
    described = f'endpoint {show(endpoint)}: host.container = "{name}"'
    if name not in given:
        raise UsageError(f"{described}: no descriptor of this name is passed")
    fd = found.containers[endpoint] = os.dup(_check(given[name], described))
    try:
        found.ranges[endpoint] = uapi.type1_ranges(fd)
    except OSError as error:
        raise UsageError(
            f"{described}: {error.strerror}", hint="a VFIO container is needed, with its group, set to TYPE1v2"
        ) from error


def _device(entry: EndpointRange, given: Mapping[str, int], *, may_open: bool) -> int:
    assert entry.host is not None
    key = f"endpoint {show(entry.first)}"
    if entry.host.fd is not None:
        if entry.host.fd not in given:
            raise UsageError(f'{key}: host.fd = "{entry.host.fd}": no descriptor of this name is passed')
        return os.dup(_check(given[entry.host.fd], f'{key}: host.fd = "{entry.host.fd}"'))
    assert entry.host.device is not None
    if not may_open:
        raise UsageError(
            f"{key}: host.device is opened by `viommud run` only, since QEMU must have the same descriptor",
            hint="or name a descriptor that is passed, with host.fd",
        )
    return _open(str(sysfs.vfio_device(entry.host.device)), entry.host.device)


def _check(fd: int, described: str) -> int:
    try:
        os.fstat(fd)
    except OSError as error:
        raise UsageError(f"{described}: descriptor {fd}: {error.strerror}") from error
    return fd


def _open(path: str, what: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="the kernel needs CONFIG_IOMMUFD") from error
    except OSError as error:
        raise UsageError(f"{what} ({path}): {error.strerror}") from error
