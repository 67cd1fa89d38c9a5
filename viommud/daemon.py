"""The daemon: the one place that knows the order of things.

Log, engine, socket, ready; then, for each front-end, a session over its connection and the engine's records beside
it, until the front-end goes.  One engine serves one connection: the next VM finds nothing of the one before, and
config.bypass is again what the user set (a connection's life is what a back-end can see of a system reset).
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import trio
from structlog.typing import FilteringBoundLogger

from viommud import __version__
from viommud.control.plane import ControlPlane
from viommud.control.subject import Subject
from viommud.deadline import Deadline
from viommud.device_setup import DeviceSetup
from viommud.endpoint_id import show
from viommud.engine import Engine
from viommud.errors import UsageError
from viommud.host.devices import HostDevices, passed_descriptors
from viommud.host.devices import acquire as acquire_host
from viommud.host.report import HostReport
from viommud.log import RateLimiter, configure
from viommud.notices import ConfigNotices
from viommud.options import Options
from viommud.peer import accept, peer_credentials
from viommud.qmp import watch_resets
from viommud.report import ENDPOINTS_REMEMBERED, Reporter, feature_names
from viommud.service import notify
from viommud.sockets import VhostSocket, acquire, listen_at
from viommud.vfio_user.relay import Relay
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.features import VHOST_USER_BITS
from viommud.vhost_user.serve import serve
from viommud.vhost_user.session import Session

DRAIN_PAUSE = 0.05
"""Seconds between two looks at the engine's records: a guest that makes many costs the control plane little."""
LEFT_OUT_PAUSE = 5.0
"""Seconds without a record after which left-out lines are told of."""
SETTLE_SECONDS = 2.0
"""For those who look to be told the last of it, when a front-end has gone by itself."""

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_OK = 0
EXIT_CONNECTION_BROKEN = 1


def run_daemon(options: Options, setup: DeviceSetup) -> int:
    """Serve until the front-end goes or a signal comes; returns the exit status.

    :raises UsageError: the socket or the engine cannot be had.
    """
    log = configure(options.log_level, options.log_format)
    # From here on a signal is an orderly end; until the daemon can take it, it waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    with ExitStack() as stack:
        host = acquire_host(setup, passed_descriptors(dict(options.pass_fd)), may_open=False)
        if host is not None:
            stack.enter_context(host)
            if options.keep_listening:
                raise UsageError("--keep-listening: a device of the host is given to one front-end and cannot wait")
            setup = host.narrow(setup)
        passed = passed_descriptors(dict(options.pass_fd))
        engine = make_engine(setup, host)
        try:
            vhost_socket = stack.enter_context(acquire(options))
            device_sockets = _device_sockets(setup, stack)
            subject = Subject(setup, vhost_socket.described)
            plane = stack.enter_context(ControlPlane.acquire(subject, options, passed, log))
        except BaseException:
            engine.close()
            raise
        deadline = Deadline(lambda: _last_words(stack, log))
        daemon = Daemon(
            setup,
            vhost_socket,
            log,
            plane,
            deadline,
            keep_listening=options.keep_listening,
            device_sockets=device_sockets,
        )
        try:
            return trio.run(daemon.run, engine)
        finally:
            deadline.met()


def serve_front_end(
    setup: DeviceSetup,
    vhost_socket: VhostSocket,
    log: FilteringBoundLogger,
    host: HostDevices | None,
    options: Options,
    *,
    on_signal: Callable[[], None],
) -> int:
    """Serve a front-end that is connected, until it goes; returns the exit status.

    :param on_signal: called at the first signal that would end us, to have the front-end end.
    :raises UsageError: a socket or the engine cannot be had.
    """
    with ExitStack() as stack:
        device_sockets = _device_sockets(setup, stack)
        subject = Subject(setup, vhost_socket.described)
        passed = passed_descriptors(dict(options.pass_fd))
        plane = stack.enter_context(ControlPlane.acquire(subject, options, passed, log))
        engine = make_engine(setup, host)
        daemon = Daemon(setup, vhost_socket, log, plane, device_sockets=device_sockets, on_signal=on_signal)
        return trio.run(daemon.run, engine)


def _last_words(stack: ExitStack, log: FilteringBoundLogger) -> None:
    """The worker did not stop in time: no socket file is left behind all the same."""
    log.error("worker-stuck", hint="it could not be stopped in time, and the process ends without it")
    stack.close()


def _device_sockets(setup: DeviceSetup, stack: ExitStack) -> dict[int, VhostSocket]:
    return {
        entry.first: stack.enter_context(listen_at(Path(entry.vfio_user.listen), "vfio-user.listen"))
        for entry in setup.endpoints
        if entry.vfio_user is not None
    }


def make_engine(setup: DeviceSetup, host: HostDevices | None = None) -> Engine:
    """An engine with the endpoints of the configuration.

    :raises UsageError: the engine does not accept them.
    """
    try:
        engine = Engine(setup.settings, setup.topology)
        try:
            if host is not None and host.iommufd is not None:
                engine.set_iommufd(host.iommufd, from_files=setup.host.memory == "files")
            for entry in setup.endpoints:
                if entry.host is not None:
                    assert host is not None
                    if entry.first in host.containers:
                        engine.add_type1_device(entry.first, host.containers[entry.first], entry.reserved)
                    else:
                        engine.add_host_device(entry.first, host.devices[entry.first], entry.reserved)
                elif entry.vfio_user is None:
                    engine.add_endpoints(entry.first, entry.last, entry.reserved)
                else:
                    engine.add_vfio_user(
                        entry.first,
                        entry.reserved,
                        shared=entry.vfio_user.mode == "shared",
                        timeout_ms=entry.vfio_user.timeout_ms,
                        reply_timeout_ms=entry.vfio_user.reply_timeout_ms,
                        spin_us=entry.vfio_user.spin_us,
                    )
        except BaseException:
            engine.close()
            raise
    except ValueError as error:
        raise UsageError(f"the configuration cannot be used: {error}") from error
    except OSError as error:
        raise UsageError(f"the engine cannot be started: {error.strerror}") from error
    return engine


@dataclass
class Daemon:
    """One socket and what comes through it, one front-end at a time."""

    setup: DeviceSetup
    vhost_socket: VhostSocket
    log: FilteringBoundLogger
    plane: ControlPlane
    deadline: Deadline | None = None
    """Armed by the first signal."""
    keep_listening: bool = False
    device_sockets: Mapping[int, VhostSocket] = field(default_factory=dict)
    """By endpoint: where the vfio-user client of its device connects."""
    on_signal: Callable[[], None] | None = None
    """Called at the first signal in place of ending."""
    _limiter: RateLimiter = field(default_factory=RateLimiter)
    _successor: trio.socket.SocketType | None = None
    """A front-end that came when the one before had just gone."""

    async def run(self, engine: Engine) -> int:
        """Serve with this engine first, which is closed in any case; returns the exit status."""
        status = EXIT_OK
        with trio.open_signal_receiver(*END_SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_signal, signals, nursery.cancel_scope)
                nursery.start_soon(self.plane.run)
                try:
                    status = await self._serve(engine)
                finally:
                    notify("STOPPING=1")
                    if self._successor is not None:
                        self._successor.close()
                with trio.move_on_after(SETTLE_SECONDS):
                    await self.plane.subject.settled()
                nursery.cancel_scope.cancel()
        self.log.info("stopped")
        return status

    async def _end_on_signal(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            if self.deadline is not None:
                self.deadline.arm()
            self.log.info("signal", name=signal.Signals(number).name)
            if self.on_signal is None:
                scope.cancel()
            else:
                self.on_signal()
                self.on_signal = None

    async def _serve(self, engine: Engine) -> int:
        self._announce()
        subject = self.plane.subject
        subject.engine = engine
        if not self.vhost_socket.listening:
            # The socket is handed over with its descriptor; VhostSocket.close() then has nothing to close.
            connection = trio.socket.from_stdlib_socket(socket.socket(fileno=self.vhost_socket.sock.detach()))
            notify("READY=1", "STATUS=serving a front-end")
            return await self._serve_connection(connection, engine)
        listener = trio.socket.from_stdlib_socket(self.vhost_socket.sock)
        notify("READY=1", "STATUS=waiting for a front-end")
        while True:
            try:
                connection = await self._next_front_end(listener)
            except BaseException:
                subject.let_go()
                engine.close()
                raise
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._refuse_others, listener, connection)
                notify("STATUS=serving a front-end")
                status = await self._serve_connection(connection, engine)
                nursery.cancel_scope.cancel()
            if not self.keep_listening:
                return status
            notify("STATUS=waiting for a front-end")
            subject.engine = engine = make_engine(self.setup)

    def _announce(self) -> None:
        self.log.info(
            "started",
            version=__version__,
            socket=self.vhost_socket.described,
            listening=self.vhost_socket.listening,
            endpoints=self.setup.summary,
            features=feature_names(self.setup.settings.features),
            control=self.plane.described,
        )
        translated = [entry.first for entry in self.setup.endpoints if entry.vfio_user or entry.host]
        if translated:
            self.log.info("translating", endpoints=[show(endpoint) for endpoint in translated])
        else:
            self.log.info("state-only", hint="keeps state only, translates for no device")

    async def _next_front_end(self, listener: trio.socket.SocketType) -> trio.socket.SocketType:
        successor, self._successor = self._successor, None
        return successor or await self._accept(listener)

    async def _accept(self, listener: trio.socket.SocketType) -> trio.socket.SocketType:
        return await accept(listener, lambda reason: self._limited("warning", "cannot-accept", reason=reason))

    async def _refuse_others(self, listener: trio.socket.SocketType, served: trio.socket.SocketType) -> None:
        """A VM has one IOMMU here: whoever connects while it is served is turned away."""
        while True:
            other = await self._accept(listener)
            if self.keep_listening and _hung_up(served):
                # The one that is served has gone, only its session has not noticed yet.
                self._successor = other
                return
            self._limited("warning", "second-client-refused", **peer_credentials(other))
            other.close()

    def _limited(self, level: str, event: str, **fields: object) -> None:
        extra = self._limiter.admit(event)
        if extra is not None:
            getattr(self.log, level)(event, **fields, **extra)

    async def _serve_connection(self, connection: trio.socket.SocketType, engine: Engine) -> int:
        """One front-end from its first message to its end; closes connection and engine."""
        started = time.monotonic()
        subject = self.plane.subject
        subject.begin()
        notices = ConfigNotices(
            lambda: engine.needs_reset, lambda reason: self._limited("warning", "config-notice-failed", reason=reason)
        )
        reporter = Reporter(engine, self.log, on_broken_ring=notices.want, events=subject.events)
        broken: str | None = None
        try:
            self.log.info("client-connected", **peer_credentials(connection))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch_records, engine, reporter)
                self._start_relays(nursery, engine)
                if self.setup.config_notices:
                    nursery.start_soon(notices.run)
                if self.setup.qmp is not None:
                    nursery.start_soon(watch_resets, self.setup.qmp, lambda: self._machine_reset(engine), self.log)
                try:
                    await serve(
                        connection,
                        engine,
                        self.log,
                        on_session=subject.attend,
                        on_backend_channel=notices.adopt,
                        on_request=HostReport(engine, self.log).look if self.has_host_devices else None,
                    )
                except RemoteProtocolError as error:
                    broken = error.sentence
                    subject.counts.protocol_errors += 1
                    self.log.error("protocol-error", reason=broken, hint="the connection is closed")
                except OSError as error:
                    # Nothing a peer says leads here: the host lacks something.
                    broken = f"{error.strerror}"
                    self.log.error("connection-failed", reason=broken)
                nursery.cancel_scope.cancel()
        finally:
            # Also when a signal ends the session: what happened in it is told in any case.
            connection.close()
            reporter.drain()
            reporter.tell_left_out(everything=True)
            self._summarise(engine, reporter, subject.session, broken, time.monotonic() - started)
            subject.let_go()
            engine.close()
        return EXIT_OK if broken is None else EXIT_CONNECTION_BROKEN

    @property
    def has_host_devices(self) -> bool:
        """Some endpoint is a device of the host."""
        return any(entry.host is not None for entry in self.setup.endpoints)

    def _machine_reset(self, engine: Engine) -> None:
        """The vhost-user connection shows a reset of the device; that of the machine sets bypass back as well."""
        engine.bypass = self.setup.settings.bypass
        self._limited("info", "machine-reset", bypass=engine.bypass)

    def _start_relays(self, nursery: trio.Nursery, engine: Engine) -> None:
        """Devices of other processes come and go while the front-end is there."""
        sections = {entry.first: entry.vfio_user for entry in self.setup.endpoints}
        granule = engine.settings.page_size_mask & -engine.settings.page_size_mask
        for user in engine.vfio_users:
            section = sections[user.endpoint]
            assert section is not None
            listener = trio.socket.from_stdlib_socket(self.device_sockets[user.endpoint].sock)
            nursery.start_soon(Relay(user, section, granule, self.log).run, listener)

    def _summarise(
        self, engine: Engine, reporter: Reporter, session: Session | None, broken: str | None, seconds: float
    ) -> None:
        stats = engine.stats()
        features = session.features & ~VHOST_USER_BITS if session else 0
        refused = dict(session.refused) if session else {}
        self.log.info(
            "session-ended",
            seconds=round(seconds, 3),
            features=feature_names(features),
            requests=stats.requests,
            endpoints=[show(endpoint) for endpoint in sorted(reporter.endpoints_seen)],
            endpoints_more=len(reporter.endpoints_seen) >= ENDPOINTS_REMEMBERED,
            peak_domains=stats.peak_domains,
            peak_mappings=stats.peak_mappings,
            limit_hits=stats.limit_hits,
            faults_sent=stats.faults_sent,
            faults_dropped=stats.faults_dropped,
            rings_broken=stats.rings_broken,
            records_lost=reporter.records_lost,
            frontend_requests_refused=refused,
            protocol_errors=0 if broken is None else 1,
        )


async def _watch_records(engine: Engine, reporter: Reporter) -> None:
    while True:
        with trio.move_on_after(LEFT_OUT_PAUSE if reporter.pending else float("inf")):
            await trio.lowlevel.wait_readable(engine.record_fd)
            reporter.drain()
        reporter.tell_left_out()
        await trio.sleep(DRAIN_PAUSE)


def _hung_up(sock: trio.socket.SocketType) -> bool:
    """Has the other end closed the connection, whether or not its last bytes have been read?"""
    if sock.fileno() < 0:
        return True
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLHUP)
    return bool(poller.poll(0))
