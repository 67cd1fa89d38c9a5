"""What is told of devices of the host while a front-end is served."""

from __future__ import annotations

from structlog.typing import FilteringBoundLogger

from viommud.engine import Engine, HostInfo


class HostReport:
    """Looks after the devices that wait for the front-end, and logs what has become of guest memory."""

    def __init__(self, engine: Engine, log: FilteringBoundLogger) -> None:
        self._engine = engine
        self._log = log
        self._last: HostInfo | None = None

    def look(self, _: object = None) -> None:
        """Called with every request of the front-end, which may have bound a device before it sent it."""
        info = self._engine.settle_host_devices()
        last, self._last = self._last, info
        if info is None or last is None:
            return
        if info.bytes_from_monitor != last.bytes_from_monitor:
            self._log.info("host-memory", source="monitor", ioas=info.monitor_ioas, bytes=info.bytes_from_monitor)
        if info.bytes_from_files != last.bytes_from_files:
            self._log.info(
                "host-memory",
                source="files",
                bytes=info.bytes_from_files,
                hint="what the guest maps is pinned a second time",
            )
