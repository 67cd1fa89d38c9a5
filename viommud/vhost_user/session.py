"""The vhost-user session: everything that decides what a message means now (with `rings`, for those that run rings).

One object per connection, without a socket: requests in, responses out, and calls to the device behind it.  A request
is syntactically right when it arrives here.  What cannot be granted is refused and leaves nothing behind that takes
effect later; a refusal is answered with a non-zero acknowledgement where the front-end asked for one.  A request that
owes an answer and has no way to say no ends the connection.

Source: QEMU docs/interop/vhost-user.rst and hw/virtio/vhost-user.c.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from structlog.typing import FilteringBoundLogger

from viommud.vhost_user.codec import Request
from viommud.vhost_user.device import Device, MappedRegion, Region
from viommud.vhost_user.errors import Refused, RemoteProtocolError
from viommud.vhost_user.fds import (
    OwnedFd,
    check_area,
    close_all,
    is_unix_stream_socket,
    replace_eventfd,
    require_eventfd,
    require_memory,
)
from viommud.vhost_user.features import OFFERED_PROTOCOL_MASK, VHOST_USER_BITS
from viommud.vhost_user.memory import MemorySnapshot, check_apart, checked_region, describe
from viommud.vhost_user.messages import GRANTED, REFUSED, FrontendRequest, ProtocolFeature, RequestType
from viommud.vhost_user.payloads import (
    CONFIG_MIGRATION,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    Config,
    Empty,
    Inflight,
    LogArea,
    MemoryTable,
    Payload,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from viommud.vhost_user.restart import Verdict
from viommud.vhost_user.ring import Ring
from viommud.vhost_user.rings import Environment, Rings, worth_a_line

STATUS_NEEDS_RESET = 0x40
STATUS_MASK = 0xFF


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a front-end may make the daemon hold."""

    memory_slots: int = 509
    """Memory regions; 509 is what the vhost kernel module allows and QEMU's memory devices expect."""


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back to the front-end.  The descriptors are owned by the response."""

    payload: Payload
    own: bool
    """The request's own reply rather than an acknowledgement."""
    fds: tuple[OwnedFd, ...] = ()

    def close(self) -> None:
        """Close the descriptors; to be called after sending."""
        close_all(self.fds)


Fds = tuple[OwnedFd, ...]
Handler = Callable[["Session", Any, Fds], Response | None]
"""Payload class and number of descriptors are those of the request's row: the codec has seen to it."""


class Session:
    """The back-end's side of one connection."""

    def __init__(self, device: Device, log: FilteringBoundLogger, limits: SessionLimits | None = None) -> None:
        self._device = device
        self._log = log
        self._limits = limits or SessionLimits()
        self._owned = False
        self._features = 0
        self._protocol_features = 0
        self._status = 0
        self._memory = MemorySnapshot()
        self._rings = Rings(device, log)
        self._backend_channel: OwnedFd | None = None
        self.refused: Counter[str] = Counter()
        """Refused requests by name."""

    @property
    def features(self) -> int:
        """Acknowledged virtio features, with vhost-user's own bits."""
        return self._features

    @property
    def protocol_features(self) -> int:
        """Negotiated protocol features."""
        return self._protocol_features

    @property
    def memory(self) -> tuple[Region, ...]:
        """Guest memory, as the front-end described it."""
        return self._memory.regions

    @property
    def running(self) -> bool:
        """Does the device run any ring?"""
        return self._rings.running

    @property
    def restarts(self) -> Mapping[Verdict, int]:
        """How often the guest's driver ran its rings again, continuing or anew."""
        return self._rings.restarts

    def negotiated(self, feature: ProtocolFeature) -> bool:
        """Have both sides agreed on a protocol feature?"""
        return bool(self._protocol_features & feature.mask)

    def take_backend_channel(self) -> OwnedFd | None:
        """The socket of the last SET_BACKEND_REQ_FD, once; the caller owns it."""
        channel, self._backend_channel = self._backend_channel, None
        return channel

    def handle(self, request: Request) -> Response | None:
        """Do what a request asks; its descriptors are closed unless something keeps them.

        :returns: what to send, or None.
        :raises RemoteProtocolError: the connection cannot go on.
        """
        kind = request.kind
        # NEED_REPLY counts from the message after the one that negotiates REPLY_ACK.
        acknowledge = request.need_reply and self.negotiated(ProtocolFeature.REPLY_ACK)
        with request:
            self._log.debug("frontend-request", request=kind.name)
            own_reply = kind.reply is not None and (kind.reply_needs is None or self.negotiated(kind.reply_needs))
            try:
                response = self._dispatch(kind)(self, request.payload, request.fds)
            except Refused as refusal:
                self._note_refusal(kind, refusal)
                if own_reply:
                    return _own_refusal(request, refusal)
                return Response(REFUSED, own=False) if acknowledge else None
        if own_reply:
            return response
        return Response(GRANTED, own=False) if acknowledge else None

    def close(self) -> None:
        """The connection is over: stop the rings, let go of everything, reset the device.

        A guest of the next connection finds nothing of this one's.
        """
        # Last in, first out; every step is taken even if one before it fails.
        with ExitStack() as stack:
            if self._backend_channel is not None:
                stack.callback(self._backend_channel.close)
            for ring in self._rings:
                stack.callback(ring.close)
            stack.callback(self._device.reset)
            stack.callback(self._replace_memory, MemorySnapshot())
            stack.callback(self._device.set_inflight, None, 0, 0, 0, 0)
            stack.callback(self._device.set_log, None, 0, 0)
            if self._features & 1 << F_LOG_ALL:
                stack.callback(self._device.set_logging, False)
            for ring in self._rings:
                stack.callback(self._rings.stop, ring)

    # Answers and refusals

    def _dispatch(self, kind: RequestType) -> Handler:
        if kind.needs is not None and not self.negotiated(kind.needs):
            raise Refused(f"protocol feature {kind.needs.name} is not negotiated")
        handler = HANDLERS.get(kind.code)
        if handler is None:
            raise Refused("this device has no use for it")
        return handler

    def _note_refusal(self, kind: RequestType, refusal: Refused) -> None:
        self.refused[kind.name] += 1
        count = self.refused[kind.name]
        if worth_a_line(count):
            context = {"hint": refusal.hint} if refusal.hint else {}
            self._log.warning(
                "frontend-request-refused", request=kind.name, reason=str(refusal), count=count, **context
            )

    # Features

    def _get_features(self, _payload: Empty, _fds: Fds) -> Response:
        # LOG_ALL is left out: QEMU's generic device would show it to the guest.
        return _reply(U64(self._device.offered_features | 1 << F_PROTOCOL_FEATURES))

    def _set_features(self, payload: U64, _fds: Fds) -> None:
        features = payload.value
        allowed = self._device.offered_features | 1 << F_PROTOCOL_FEATURES
        if self.negotiated(ProtocolFeature.LOG_SHMFD):
            # QEMU switches logging with this bit on live rings, offered or not.
            allowed |= 1 << F_LOG_ALL
        if features & ~allowed:
            raise Refused(f"features {features & ~allowed:#x} were not offered")
        changed = (features ^ self._features) & ~VHOST_USER_BITS
        if changed and self.running:
            raise Refused(f"features {changed:#x} cannot change while a ring runs")
        if changed:
            self._device.set_driver_features(features & ~VHOST_USER_BITS)
        if (features ^ self._features) & 1 << F_LOG_ALL:
            self._device.set_logging(bool(features & 1 << F_LOG_ALL))
        self._features = features
        self._run_complete_rings()

    def _get_protocol_features(self, _payload: Empty, _fds: Fds) -> Response:
        return _reply(U64(OFFERED_PROTOCOL_MASK))

    def _set_protocol_features(self, payload: U64, _fds: Fds) -> None:
        features = payload.value
        if features & ~OFFERED_PROTOCOL_MASK:
            # The front-end would wait for answers that only a feature we lack gives.
            raise RemoteProtocolError(f"SET_PROTOCOL_FEATURES: {features & ~OFFERED_PROTOCOL_MASK:#x} were not offered")
        if features != self._protocol_features and (self._memory.mapped or self.running):
            raise Refused("protocol features cannot change once guest memory is set")
        self._protocol_features = features

    def _set_owner(self, _payload: Empty, _fds: Fds) -> None:
        if self._owned:
            raise Refused("the session has an owner already")
        self._owned = True

    def _reset_owner(self, _payload: Empty, _fds: Fds) -> None:
        # Deprecated; vhost-user.rst allows to disable the rings and advises against more.
        self._owned = False
        self._rings.disable()

    def _get_queue_num(self, _payload: Empty, _fds: Fds) -> Response:
        return _reply(U64(self._device.num_queues))

    def _set_backend_req_fd(self, _payload: Empty, fds: Fds) -> None:
        if not is_unix_stream_socket(fds[0].fileno()):
            raise Refused("the descriptor is not a UNIX stream socket")
        if self._backend_channel is not None:
            self._backend_channel.close()
        self._backend_channel = fds[0].move()

    # Status and reset

    def _get_status(self, _payload: Empty, _fds: Fds) -> Response:
        return _reply(U64(self._status | (STATUS_NEEDS_RESET if self._device.needs_reset else 0)))

    def _set_status(self, payload: U64, _fds: Fds) -> None:
        if payload.value > STATUS_MASK:
            raise Refused(f"status {payload.value:#x} has more than 8 bits")
        self._status = payload.value & ~STATUS_NEEDS_RESET
        if self._status:
            return
        # QEMU also writes 0 when it has stopped the rings of a guest that is only paused (vhost_dev_stop()); then the
        # bases decide when the rings run again, as after any stop.
        if not self._rings.suspended:
            self._reset_device(Empty(), ())

    def _reset_device(self, _payload: Empty, _fds: Fds) -> None:
        self._rings.forget()
        self._status = 0
        self._device.reset()
        self._log.debug("device-reset")

    # Guest memory

    def _get_max_mem_slots(self, _payload: Empty, _fds: Fds) -> Response:
        return _reply(U64(self._limits.memory_slots))

    def _set_mem_table(self, payload: MemoryTable, fds: Fds) -> None:
        regions = [checked_region(wire, addresses_are_gpa=self._addresses_are_gpa) for wire in payload.regions]
        if len(regions) > self._limits.memory_slots:
            raise Refused(f"{len(regions)} memory regions, at most {self._limits.memory_slots} are allowed")
        for index, region in enumerate(regions):
            check_apart(region, regions[:index])
        for region, fd in zip(regions, fds, strict=True):
            require_memory(fd, describe(region))
        mapped: list[MappedRegion] = []
        try:
            for region, fd in zip(regions, fds, strict=True):
                mapped.append(self._device.map_region(region, fd.fileno()))
        except BaseException:
            for done in mapped:
                done.close()
            raise
        self._replace_memory(MemorySnapshot(tuple(mapped)))

    def _add_mem_reg(self, payload: SingleRegion, fds: Fds) -> None:
        region = checked_region(payload.region, addresses_are_gpa=self._addresses_are_gpa)
        if len(self._memory.mapped) >= self._limits.memory_slots:
            raise Refused(f"all {self._limits.memory_slots} memory slots are taken")
        check_apart(region, self._memory.regions)
        require_memory(fds[0], describe(region))
        self._replace_memory(self._memory.with_region(self._device.map_region(region, fds[0].fileno())))

    def _rem_mem_reg(self, payload: SingleRegion, _fds: Fds) -> None:
        region = checked_region(payload.region, addresses_are_gpa=self._addresses_are_gpa)
        mapped = self._memory.find(region)
        if mapped is None:
            raise Refused(f"there is no {describe(region)} at user address {region.user_addr:#x}")
        self._replace_memory(self._memory.without(mapped))

    @property
    def _addresses_are_gpa(self) -> bool:
        return self.negotiated(ProtocolFeature.GPA_ADDRESSES)

    def _replace_memory(self, memory: MemorySnapshot) -> None:
        # By identity: SET_MEM_TABLE may describe the same region again, mapped a second time.
        kept = {id(mapped) for mapped in memory.mapped}
        dropped = [mapped for mapped in self._memory.mapped if id(mapped) not in kept]
        self._device.set_memory(memory.mapped)
        self._memory = memory
        for mapped in dropped:
            mapped.close()

    # Rings

    @property
    def _environment(self) -> Environment:
        return Environment(self._features, self._memory, self._addresses_are_gpa)

    def _run_if_complete(self, ring: Ring) -> None:
        self._rings.run_if_complete(ring, self._environment)

    def _set_vring_num(self, payload: VringState, _fds: Fds) -> None:
        ring = self._rings.stopped(payload.index)
        # A refused size must not leave an older one behind that disagrees with the driver's.
        ring.size = None
        if not 0 < payload.num <= self._device.max_queue_size:
            raise Refused(f"ring {ring.index}: size {payload.num}, allowed are 1 to {self._device.max_queue_size}")
        ring.size = payload.num
        try:
            self._run_if_complete(ring)
        except Refused:
            ring.size = None
            raise

    def _set_vring_addr(self, payload: VringAddr, _fds: Fds) -> None:
        ring = self._rings[payload.index]
        before = ring.addr
        ring.addr = payload
        if ring.running and before is not None and _same_place(before, payload):
            self._device.set_queue_log(ring.index, ring.log_addr)
            return
        self._rings.stop(ring)
        try:
            self._run_if_complete(ring)
        except Refused:
            ring.addr = None
            raise

    def _set_vring_base(self, payload: VringState, _fds: Fds) -> None:
        ring = self._rings.stopped(payload.index)
        ring.base = payload.num
        ring.base_is_new = True

    def _get_vring_base(self, payload: VringState, _fds: Fds) -> Response:
        ring = self._rings[payload.index]
        self._rings.stop(ring)
        ring.drop_kick()
        base = self._environment.format.initial_base if ring.base is None else ring.base
        if ring.has_run:
            ring.returned = base
            ring.base_is_new = False
        return _reply(VringState(ring.index, base))

    def _set_vring_kick(self, payload: VringFd, fds: Fds) -> None:
        ring = self._rings[payload.index]
        if payload.no_fd:
            raise Refused(f"ring {ring.index}: polling instead of a kick eventfd is not supported")
        require_eventfd(fds[0], "kick")
        self._rings.stop(ring)
        ring.drop_kick()
        ring.kick = fds[0].move()
        try:
            self._run_if_complete(ring)
        except Refused:
            ring.drop_kick()
            raise

    def _set_vring_call(self, payload: VringFd, fds: Fds) -> None:
        ring = self._rings[payload.index]
        ring.call = replace_eventfd(ring.call, fds, "call")
        if ring.running:
            self._device.set_call(ring.index, ring.call.fileno() if ring.call else None)

    def _set_vring_err(self, payload: VringFd, fds: Fds) -> None:
        ring = self._rings[payload.index]
        ring.err = replace_eventfd(ring.err, fds, "error")
        if ring.running:
            self._device.set_err(ring.index, ring.err.fileno() if ring.err else None)

    def _set_vring_enable(self, payload: VringState, _fds: Fds) -> None:
        if not self._features & 1 << F_PROTOCOL_FEATURES:
            raise Refused("feature PROTOCOL_FEATURES is not acknowledged: rings are enabled from the start")
        ring = self._rings[payload.index]
        if payload.num > 1:
            raise Refused(f"ring {ring.index}: enable is 0 or 1, not {payload.num}")
        ring.enabled = bool(payload.num)
        if not ring.enabled:
            # A request of this device has no effect to be suppressed other than its own: it waits in the ring.
            self._rings.stop(ring)
            return
        try:
            self._run_if_complete(ring)
        except Refused:
            ring.enabled = False
            raise

    def _run_complete_rings(self) -> None:
        """Feature PROTOCOL_FEATURES may have gone, and with it the need to enable a ring."""
        for ring in self._rings:
            try:
                self._run_if_complete(ring)
            except Refused:
                ring.drop_kick()
                raise

    # Configuration space

    def _get_config(self, payload: Config, _fds: Fds) -> Response:
        self._check_config_range(payload)
        self._rings.config_was_read()
        data = self._device.config_read(payload.offset, len(payload.data))
        return _reply(Config(payload.offset, payload.flags, data))

    def _set_config(self, payload: Config, _fds: Fds) -> None:
        self._check_config_range(payload)
        self._device.config_write(payload.offset, payload.data, bool(payload.flags & CONFIG_MIGRATION))

    def _check_config_range(self, payload: Config) -> None:
        size = len(payload.data)
        if size == 0 or payload.offset + size > self._device.config_size:
            raise Refused(
                f"{size} bytes at {payload.offset} are not in a configuration space of {self._device.config_size}"
            )

    # Dirty log and in-flight memory

    def _set_log_base(self, payload: LogArea, fds: Fds) -> Response:
        if not self.negotiated(ProtocolFeature.LOG_SHMFD):
            raise Refused("a log without protocol feature LOG_SHMFD cannot be shared")
        if not fds:
            raise Refused("no descriptor came with the log")
        check_area(fds[0], "dirty log", payload.size, payload.offset)
        self._device.set_log(fds[0].fileno(), payload.size, payload.offset)
        return _reply(GRANTED)

    def _set_log_fd(self, _payload: Empty, fds: Fds) -> None:
        # The front-end offers to be woken when pages become dirty; it must work without, and QEMU never sends it.
        require_eventfd(fds[0], "log")

    def _get_inflight_fd(self, payload: Inflight, _fds: Fds) -> Response:
        size = self._check_inflight(payload)
        fd = OwnedFd(os.memfd_create("viommud-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        try:
            os.ftruncate(fd.fileno(), size)
            # Nobody may shrink memory that the other side has mapped.
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            fd.close()
            raise Refused(f"{size} bytes of in-flight memory: {error.strerror}") from error
        return _reply(replace(payload, mmap_size=size, mmap_offset=0), (fd,))

    def _set_inflight_fd(self, payload: Inflight, fds: Fds) -> None:
        due = self._check_inflight(payload)
        if self.running:
            raise Refused("in-flight memory cannot change while a ring runs")
        if payload.mmap_size < due:
            raise Refused(f"{payload.mmap_size} bytes of in-flight memory, {due} are needed")
        check_area(fds[0], "in-flight memory", payload.mmap_size, payload.mmap_offset)
        self._device.set_inflight(
            fds[0].fileno(), payload.mmap_size, payload.mmap_offset, payload.num_queues, payload.queue_size
        )

    def _check_inflight(self, payload: Inflight) -> int:
        queues, size = self._device.num_queues, self._device.max_queue_size
        if not 0 < payload.num_queues <= queues or not 0 < payload.queue_size <= size:
            raise Refused(
                f"in-flight memory for {payload.num_queues} rings of {payload.queue_size}, "
                f"there are {queues} of at most {size}"
            )
        return self._device.inflight_size(payload.num_queues, payload.queue_size)


def _reply(payload: Payload, fds: Fds = ()) -> Response:
    return Response(payload, own=True, fds=fds)


def _own_refusal(request: Request, refusal: Refused) -> Response:
    """The own reply that says no.

    :raises RemoteProtocolError: there is none.
    """
    payload = request.kind.refusal
    if payload is None:
        raise RemoteProtocolError(f"{request.kind.name}: {refusal}", hint=refusal.hint) from refusal
    if isinstance(payload, Inflight) and isinstance(request.payload, Inflight):
        payload = replace(payload, padded=request.payload.padded)
    return _reply(payload)


def _same_place(one: VringAddr, other: VringAddr) -> bool:
    return (one.desc, one.avail, one.used) == (other.desc, other.avail, other.used)


HANDLERS: Mapping[int, Handler] = MappingProxyType(
    {
        FrontendRequest.GET_FEATURES: Session._get_features,
        FrontendRequest.SET_FEATURES: Session._set_features,
        FrontendRequest.SET_OWNER: Session._set_owner,
        FrontendRequest.RESET_OWNER: Session._reset_owner,
        FrontendRequest.SET_MEM_TABLE: Session._set_mem_table,
        FrontendRequest.SET_LOG_BASE: Session._set_log_base,
        FrontendRequest.SET_LOG_FD: Session._set_log_fd,
        FrontendRequest.SET_VRING_NUM: Session._set_vring_num,
        FrontendRequest.SET_VRING_ADDR: Session._set_vring_addr,
        FrontendRequest.SET_VRING_BASE: Session._set_vring_base,
        FrontendRequest.GET_VRING_BASE: Session._get_vring_base,
        FrontendRequest.SET_VRING_KICK: Session._set_vring_kick,
        FrontendRequest.SET_VRING_CALL: Session._set_vring_call,
        FrontendRequest.SET_VRING_ERR: Session._set_vring_err,
        FrontendRequest.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
        FrontendRequest.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
        FrontendRequest.GET_QUEUE_NUM: Session._get_queue_num,
        FrontendRequest.SET_VRING_ENABLE: Session._set_vring_enable,
        FrontendRequest.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
        FrontendRequest.GET_CONFIG: Session._get_config,
        FrontendRequest.SET_CONFIG: Session._set_config,
        FrontendRequest.GET_INFLIGHT_FD: Session._get_inflight_fd,
        FrontendRequest.SET_INFLIGHT_FD: Session._set_inflight_fd,
        FrontendRequest.RESET_DEVICE: Session._reset_device,
        FrontendRequest.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
        FrontendRequest.ADD_MEM_REG: Session._add_mem_reg,
        FrontendRequest.REM_MEM_REG: Session._rem_mem_reg,
        FrontendRequest.SET_STATUS: Session._set_status,
        FrontendRequest.GET_STATUS: Session._get_status,
    }
)
"""What is done about each request; the others are refused."""
