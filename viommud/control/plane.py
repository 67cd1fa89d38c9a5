"""The control plane as the daemon runs it: its sockets, and who serves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from structlog.typing import FilteringBoundLogger

from viommud.control.config import MetricsSection
from viommud.control.server import EVERYTHING, MONITOR_ONLY, ControlServer
from viommud.control.subject import Subject
from viommud.exporter import Exporter, write_textfile
from viommud.options import Options
from viommud.sockets import VhostSocket, adopt_listening, listen_at

MONITOR_FD, STEER_FD, METRICS_FD = "monitor", "steer", "metrics"
"""FileDescriptorName= of the sockets in a systemd unit."""


@dataclass
class ControlPlane:
    """Sockets that are there, and what is done with them."""

    subject: Subject
    log: FilteringBoundLogger
    metrics: MetricsSection
    monitor: VhostSocket | None = None
    steer: VhostSocket | None = None
    exporter: VhostSocket | None = None

    @classmethod
    @contextmanager
    def acquire(
        cls, subject: Subject, options: Options, passed: Mapping[str, int], log: FilteringBoundLogger
    ) -> Iterator[ControlPlane]:
        """Sockets as the command line, systemd (by name) and the configuration want them, in this order.

        :raises UsageError: one cannot be had.
        """
        control, metrics = subject.setup.control, subject.setup.metrics
        subject.allow_injection = control.allow_injection
        with ExitStack() as stack:

            def socket_for(
                name: str, option: Path | None, path: str | None, key: str, group: str | None, mode: str
            ) -> VhostSocket | None:
                if option is None and name in passed:
                    return stack.enter_context(adopt_listening(passed[name], f"the descriptor passed as {name}"))
                where = option or (None if path is None else Path(path))
                if where is None:
                    return None
                return stack.enter_context(listen_at(where, key, group=group, mode=int(mode, 8)))

            yield cls(
                subject,
                log,
                metrics,
                socket_for(MONITOR_FD, options.control_path, control.path, "control.path", control.group, control.mode),
                socket_for(
                    STEER_FD,
                    options.steer_path,
                    control.steer_path,
                    "control.steer-path",
                    control.steer_group,
                    control.steer_mode,
                ),
                socket_for(METRICS_FD, options.metrics_path, metrics.path, "metrics.path", metrics.group, metrics.mode),
            )

    @property
    def described(self) -> dict[str, str]:
        """Which sockets there are, and where."""
        found = {MONITOR_FD: self.monitor, STEER_FD: self.steer, METRICS_FD: self.exporter}
        return {name: sock.described for name, sock in found.items() if sock is not None}

    async def run(self) -> None:
        """Serve them until cancelled."""
        async with trio.open_nursery() as nursery:
            for found, interfaces in ((self.monitor, MONITOR_ONLY), (self.steer, EVERYTHING)):
                if found is not None:
                    server = ControlServer(self.subject, interfaces, self.log)
                    nursery.start_soon(server.run, trio.socket.from_stdlib_socket(found.sock))
            if self.exporter is not None:
                exporter = Exporter(self.subject, self.log)
                nursery.start_soon(exporter.run, trio.socket.from_stdlib_socket(self.exporter.sock))
            if self.metrics.textfile is not None:
                path, seconds = Path(self.metrics.textfile), self.metrics.textfile_seconds
                nursery.start_soon(write_textfile, self.subject, path, seconds, self.log)
