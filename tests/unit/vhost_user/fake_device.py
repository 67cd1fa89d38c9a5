"""A device that does nothing and remembers everything, and a way to talk to a session about it without a socket."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import structlog
from frontend import wire

from viommud.vhost_user.codec import NEED_DATA, Connection, Request, Role
from viommud.vhost_user.device import DeviceRefused, MappedRegion, QueueSetup, Region
from viommud.vhost_user.fds import OwnedFd
from viommud.vhost_user.messages import FRONTEND_REQUESTS
from viommud.vhost_user.session import Session, SessionLimits

CONFIG_SIZE = 40
FEATURES = wire.F_VERSION_1 | wire.F_EVENT_IDX | wire.F_INDIRECT_DESC | wire.F_RING_PACKED | 0b1110111
RAM_SIZE = 1 << 20
RAM_GPA = 0x4000_0000


@dataclass
class FakeMapping:
    """A region that was asked to be mapped."""

    region: Region
    closed: bool = False

    def close(self) -> None:
        """Remember it."""
        assert not self.closed, "a region was unmapped twice"
        self.closed = True


@dataclass
class FakeDevice:
    """Implements viommud.vhost_user.device.Device; `calls` lists what it was asked, in order."""

    offered_features: int = FEATURES
    num_queues: int = 2
    max_queue_size: int = 1024
    config_size: int = CONFIG_SIZE
    needs_reset: bool = False
    config: bytearray = field(default_factory=lambda: bytearray(range(CONFIG_SIZE)))
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    memory: tuple[MappedRegion, ...] = ()
    mappings: list[FakeMapping] = field(default_factory=list)
    running: dict[int, QueueSetup] = field(default_factory=dict)
    processed: dict[int, int] = field(default_factory=dict)
    """Base that stop_queue() reports, by ring."""
    looks_used: bool = False
    refuse: str = ""
    """Name of the method that refuses."""
    features: int = 0
    logging: bool = False
    resets: int = 0

    def _called(self, name: str, *arguments: Any) -> None:
        if self.refuse == name:
            raise DeviceRefused(f"{name} does not want to")
        self.calls.append((name, *arguments))

    def names(self) -> list[str]:
        """Names of the calls so far."""
        return [call[0] for call in self.calls]

    def config_read(self, offset: int, size: int) -> bytes:
        """A piece of `config`."""
        self._called("config_read", offset, size)
        return bytes(self.config[offset : offset + size])

    def config_write(self, offset: int, data: bytes, migration: bool) -> None:
        """Change `config`."""
        self._called("config_write", offset, data, migration)
        self.config[offset : offset + len(data)] = data

    def set_driver_features(self, features: int) -> None:
        """Remember them."""
        assert not self.running
        self._called("set_driver_features", features)
        self.features = features

    def map_region(self, region: Region, fd: int) -> FakeMapping:
        """Map and unmap, to see that the descriptor is good."""
        self._called("map_region", region)
        mmap.mmap(fd, min(region.size, mmap.PAGESIZE)).close()
        self.mappings.append(FakeMapping(region))
        return self.mappings[-1]

    def set_memory(self, regions: Sequence[MappedRegion]) -> None:
        """Remember the table."""
        self.memory = tuple(regions)
        self._called("set_memory", tuple(mapped.region for mapped in regions))

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        """Remember that the ring runs."""
        assert index not in self.running
        self._called("start_queue", index, setup)
        os.fstat(setup.kick_fd)
        self.running[index] = setup

    def stop_queue(self, index: int) -> int:
        """The base it was started with, unless `processed` says otherwise."""
        self._called("stop_queue", index)
        setup = self.running.pop(index)
        return self.processed.get(index, setup.base)

    def ring_looks_used(self, index: int, setup: QueueSetup) -> bool:
        """What `looks_used` says."""
        self._called("ring_looks_used", index)
        return self.looks_used

    def set_call(self, index: int, fd: int | None) -> None:
        """Remember whether there is one."""
        assert index in self.running
        self._called("set_call", index, fd is not None)

    def set_err(self, index: int, fd: int | None) -> None:
        """Remember whether there is one."""
        assert index in self.running
        self._called("set_err", index, fd is not None)

    def set_log(self, fd: int | None, size: int, offset: int) -> None:
        """Remember the area."""
        self._called("set_log", fd is not None, size, offset)

    def set_logging(self, on: bool) -> None:
        """Remember the switch."""
        self._called("set_logging", on)
        self.logging = on

    def set_queue_log(self, index: int, log_addr: int | None) -> None:
        """Remember the address."""
        assert index in self.running
        self._called("set_queue_log", index, log_addr)

    def inflight_size(self, num_queues: int, queue_size: int) -> int:
        """Some function of both."""
        return num_queues * (64 + 16 * queue_size)

    def set_inflight(self, fd: int | None, size: int, offset: int, num_queues: int, queue_size: int) -> None:
        """Remember the area."""
        assert not self.running
        self._called("set_inflight", fd is not None, size, offset, num_queues, queue_size)

    def reset(self) -> None:
        """Count."""
        assert not self.running
        self._called("reset")
        self.resets += 1
        self.needs_reset = False


@dataclass
class Answer:
    """What the session answered, as the front-end sees it."""

    code: int
    flags: int
    payload: bytes
    fds: tuple[int, ...]

    @property
    def u64(self) -> int:
        """The payload as a number."""
        (value,) = struct.unpack("=Q", self.payload)
        return int(value)


class Harness:
    """A session over a FakeDevice, driven by the bytes and descriptors a front-end would send."""

    def __init__(self, device: FakeDevice | None = None, limits: SessionLimits | None = None) -> None:
        self.device = device or FakeDevice()
        self.log = structlog.testing.CapturingLogger()
        self.lines = self.log.calls
        logger = structlog.wrap_logger(
            self.log, processors=[], wrapper_class=structlog.make_filtering_bound_logger("info")
        )
        self.session = Session(self.device, logger, limits)
        self.connection = Connection(FRONTEND_REQUESTS, Role.RESPONDER)
        self.answers_fds: list[int] = []

    def close(self) -> None:
        """End the connection."""
        self.connection.close()
        self.session.close()
        for fd in self.answers_fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reasons(self) -> list[str]:
        """Why requests were refused, as logged."""
        return [str(call.kwargs["reason"]) for call in self.lines if call.method_name == "warning"]

    def send(
        self, code: int, payload: bytes = b"", fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> Answer | None:
        """Send one message; the descriptors are duplicated, as a socket does it."""
        flags = wire.VERSION | (wire.NEED_REPLY if need_reply else 0)
        self.connection.receive_data(wire.header(code, len(payload), flags), [OwnedFd(os.dup(fd)) for fd in fds])
        if payload:
            self.connection.receive_data(payload)
        request = self.connection.next_event()
        assert isinstance(request, Request)
        assert self.connection.next_event() is NEED_DATA
        response = self.session.handle(request)
        if response is None:
            return None
        if response.own:
            out = self.connection.send_reply(request, response.payload, [fd.fileno() for fd in response.fds])
        else:
            out = self.connection.send_ack(request, response.payload)
        received = tuple(os.dup(fd) for fd in out.fds)
        self.answers_fds += received
        response.close()
        code, flags, size = struct.unpack_from("=III", out.data)
        assert size == len(out.data) - 12
        return Answer(code, flags, out.data[12:], received)

    def ask(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Answer:
        """Send a request that has its own reply."""
        answer = self.send(code, payload, fds)
        assert answer is not None
        assert (code, 5) == (answer.code, answer.flags)
        return answer

    def ack(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with NEED_REPLY; what it was acknowledged with."""
        answer = self.send(code, payload, fds, need_reply=True)
        assert answer is not None
        assert (code, 5) == (answer.code, answer.flags)
        return answer.u64

    def grant(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send what must be granted."""
        assert self.ack(code, payload, fds) == 0, self.reasons()

    def refuse(self, code: int, payload: bytes = b"", fds: Sequence[int] = ()) -> str:
        """Send what must be refused; the reason."""
        assert self.ack(code, payload, fds) != 0
        return self.reasons()[-1]

    # The usual sequences

    def negotiate(self, *, features: int = FEATURES & ~wire.F_RING_PACKED, protocol: int | None = None) -> Self:
        """Up to SET_FEATURES; with PROTOCOL_FEATURES unless `features` has the bit removed by the caller later."""
        offered = self.ask(wire.GET_PROTOCOL_FEATURES).u64
        self.send(wire.SET_PROTOCOL_FEATURES, wire.u64(offered if protocol is None else protocol))
        self.send(wire.SET_OWNER)
        self.send(wire.SET_FEATURES, wire.u64(features | wire.F_PROTOCOL_FEATURES))
        return self

    def add_ram(self, gpa: int = RAM_GPA, size: int = RAM_SIZE) -> None:
        """One region of RAM."""
        fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self.grant(wire.ADD_MEM_REG, wire.single_region(wire.region(gpa, size, gpa)), [fd])
        finally:
            os.close(fd)

    def ready(self, **negotiate: Any) -> Self:
        """Negotiated, with RAM."""
        self.negotiate(**negotiate)
        self.add_ram()
        return self

    def configure(self, index: int, *, base: int = 0, size: int = 256) -> None:
        """Everything about a ring but enabling it; acknowledged pieces must be granted."""
        at = RAM_GPA + index * 0x10000
        self.grant(wire.SET_VRING_NUM, wire.vring_state(index, size))
        self.grant(wire.SET_VRING_BASE, wire.vring_state(index, base))
        self.grant(wire.SET_VRING_ADDR, wire.vring_addr(index, at, at + 0x8000, at + 0x4000))
        with Eventfd() as kick, Eventfd() as call:
            self.grant(wire.SET_VRING_KICK, wire.u64(index), [kick.fd])
            self.grant(wire.SET_VRING_CALL, wire.u64(index), [call.fd])

    def start(self, *bases: int) -> Self:
        """Configure and enable both rings, in QEMU's order."""
        for index in range(self.device.num_queues):
            self.configure(index, base=bases[index] if bases else 0)
        for index in range(self.device.num_queues):
            self.grant(wire.SET_VRING_ENABLE, wire.vring_state(index, 1))
        return self

    def stop(self) -> list[int]:
        """Disable and stop both rings, in QEMU's order; the bases."""
        indices = range(self.device.num_queues)
        for index in indices:
            self.grant(wire.SET_VRING_ENABLE, wire.vring_state(index, 0))
        answers = [self.ask(wire.GET_VRING_BASE, wire.vring_state(index)) for index in indices]
        return [struct.unpack("=II", answer.payload)[1] for answer in answers]


class Eventfd:
    """An eventfd for one `with` block."""

    def __enter__(self) -> Self:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)
