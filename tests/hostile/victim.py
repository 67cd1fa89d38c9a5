"""A daemon under attack, and what must hold when the attack is over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from frontend import iommu
from frontend.client import Client, ConnectionEndedError
from frontend.guest import Guest
from frontend.ring import wait_until
from integration.daemon import Daemon, LogLine

ENDPOINT = 0x10
PAGE = 0x1000
RAM = 0x4000_0000

CONFIG = """
[device]
msi = "none"
bypass = false
packed-ring = true
in-order = true

[limits]
domains = 16
mappings = 64
mappings-per-domain = 48

[worker]
spin-us = 50

[[endpoint]]
id = "00:02.0"
reserved = [{ start = 0x1000_0000, end = 0x1000_ffff }]
"""

THREADS = 2
"""Control plane and worker."""
RSS_GROWTH_KIB = 12 << 10
LINES = 320
"""Of the log, for one test: bounded however often an attack is repeated.  A few lines for each of the six types of
request times ten statuses that one guest can be refused with, and a few others ..."""
PER_CONNECTION = ("client-connected", "session-ended", "protocol-error")
"""... beside those that a connection has once."""


def turned_down(client: Client, code: int, payload: bytes, fds: Sequence[int] = ()) -> bool:
    """Send a request that no back-end grants: was it refused, or the connection ended?"""
    try:
        return client.acknowledged(code, payload, fds) != 0
    except (ConnectionEndedError, BrokenPipeError):
        return True


class Victim:
    """A daemon that serves one front-end after the other."""

    def __init__(self, directory: Path) -> None:
        self.daemon = Daemon(directory, "--keep-listening", config=CONFIG)

    def __enter__(self) -> Self:
        self.daemon.__enter__()
        with self.guest() as guest:  # the first connection fills caches; what comes after is compared with it
            guest.start()
            assert guest.attach(1, ENDPOINT) == iommu.OK
        self._wait_until_alone()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self.daemon.terminate() == 0, self.daemon.log_text
        finally:
            self.daemon.__exit__(kind, error, trace)

    def connect(self) -> Client:
        """A connection, once the daemon has noticed that the one before has ended."""
        self._wait_until_alone()
        return self.daemon.connect()

    def guest(self, **options: Any) -> Guest:
        """A guest on such a connection."""
        return Guest(self.connect(), **options)

    def negotiated(self) -> Client:
        """A connection after the first messages."""
        client = self.connect()
        client.negotiate()
        return client

    @contextmanager
    def attacked(self, lines: int = LINES) -> Iterator[None]:
        """What happens inside must leave nothing behind."""
        self._wait_until_alone()
        descriptors, logged = self.daemon.open_descriptors(), len(self.daemon.log())
        connections = len(self.daemon.log("client-connected"))
        resident = self.daemon.status("VmRSS")
        yield
        assert self.daemon.process.poll() is None, self.daemon.log_text
        self._wait_until_alone()
        wait_until(lambda: self.daemon.open_descriptors() == descriptors, f"only these descriptors: {descriptors}")
        assert self.daemon.guest_mappings() == []
        assert self.daemon.status("VmRSS") - resident < RSS_GROWTH_KIB
        assert "Traceback" not in self.daemon.log_text
        new = [line["event"] for line in self.daemon.log()[logged:]]
        assert len([event for event in new if event not in PER_CONNECTION]) <= lines
        connections = len(self.daemon.log("client-connected")) - connections
        assert all(new.count(event) <= connections for event in PER_CONNECTION)
        with self.guest() as guest:
            guest.start()
            assert guest.attach(1, ENDPOINT) == iommu.OK
            assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
            assert guest.probe(ENDPOINT).status == iommu.OK

    def last_session(self) -> LogLine:
        """How the session that was the last summed itself up."""
        self._wait_until_alone()
        return self.daemon.log("session-ended")[-1]

    def _wait_until_alone(self) -> None:
        def alone() -> bool:
            started = len(self.daemon.log("client-connected"))
            ended = len(self.daemon.log("session-ended"))
            return started == ended and len(os.listdir(f"/proc/{self.daemon.process.pid}/task")) == THREADS

        wait_until(alone, "the daemon to be without a front-end")
