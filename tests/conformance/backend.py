"""A back-end in this process: the real engine behind a real vhost-user connection, with its insides in reach.

A test talks to it as a front-end does, and can ask the engine what no front-end sees: where an access of an endpoint
would go, what a domain maps, that a device's access failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
import trio
from frontend import iommu, wire
from frontend.client import Client
from frontend.guest import Guest
from frontend.ring import wait_until

from viommud.config import parse
from viommud.daemon import make_engine
from viommud.device_setup import plan
from viommud.engine import Mapping
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.serve import serve
from viommud.vhost_user.session import Session
from viommud.vhost_user.transport import PeerGoneError

T = TypeVar("T")

RAM = 0x4000_0000
PAGE = 0x1000
U64 = (1 << 64) - 1

ENDPOINT = 0x10
SIBLING = 0x18
GUARDED = 0x20
"""An endpoint with reserved regions."""
MSI_FIRST, MSI_LAST = 0x0800_0000, 0x080F_FFFF
HOLE_FIRST, HOLE_LAST = 0x1000_0000, 0x1000_FFFF
NOBODY = 0x1000
"""No endpoint has this ID."""

CONFIG = """
[device]
msi = "none"
bypass = false
packed-ring = true
in-order = true

[worker]
spin-us = 50

[[endpoint]]
id = "00:02.0"

[[endpoint]]
id = "00:03.0"

[[endpoint]]
id = "00:04.0"
reserved = [
    { start = 0x0800_0000, end = 0x080f_ffff, type = "msi" },
    { start = 0x1000_0000, end = 0x1000_ffff },
]
"""
"""Endpoints ENDPOINT and SIBLING, which reserve nothing, and GUARDED; every ring format; nothing is bypassed."""

LOG = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[structlog.testing.LogCapture()])


class Backend:
    """An engine, the thread that serves its one connection, and the front-end's end of that."""

    def __init__(self, config: str = CONFIG) -> None:
        setup = plan(parse(config))
        self.engine = make_engine(setup)
        self.client, self._theirs = Client.pair()
        self.error: RemoteProtocolError | None = None
        """What ended the connection, if it was the front-end's mistake."""
        self._session: Session | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), name="backend")
        self._thread.start()
        self._ready.wait()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ready.set()
        self._theirs.setblocking(False)
        try:
            await serve(
                trio.socket.from_stdlib_socket(self._theirs), self.engine, LOG, on_session=self._remember_session
            )
        except RemoteProtocolError as error:
            self.error = error
        except PeerGoneError:
            pass

    def _remember_session(self, session: Session) -> None:
        self._session = session

    def close(self) -> None:
        """End the connection, wait for the back-end to let go of everything, and free the engine."""
        self.client.close()
        self._thread.join()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def guest(self, *, start: bool = True, **options: Any) -> Guest:
        """A guest on the connection; there is one connection, so one guest."""
        guest = Guest(self.client, **options)
        if start:
            guest.start()
        return guest

    def features(self, *, packed: bool = False, in_order: bool = False, without: int = 0) -> int:
        """What is offered, with the ring format chosen."""
        offered = int(self.engine.offered_features) | wire.F_PROTOCOL_FEATURES
        chosen = (0 if packed else wire.F_RING_PACKED) | (0 if in_order else wire.F_IN_ORDER)
        return offered & ~chosen & ~without

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call the engine from the thread that owns it."""
        try:
            return trio.from_thread.run_sync(function, *args, trio_token=self._token)
        except trio.RunFinishedError:
            return function(*args)

    # What a device behind the IOMMU would see

    def translate(self, endpoint: int, iova: int, access: int = iommu.READ) -> int | None:
        """Guest-physical address that an access of an endpoint reaches; None: it is blocked."""
        return self.call(self.engine.translate, endpoint, iova, access)

    def mappings(self, domain: int) -> list[Mapping] | None:
        """Everything a domain maps; None: there is no such domain."""
        try:
            return self.call(self.engine.mappings, domain, 0, 1 << 16)
        except KeyError:
            return None

    def domains(self) -> list[int]:
        """IDs of the domains that exist."""
        return [found.id for found in self.call(lambda: list(self.engine.domains()))]

    def domain_of(self, endpoint: int) -> int | None:
        """Where an endpoint is attached."""
        found = self.call(lambda: {info.id: info.domain for info in self.engine.endpoints()})
        return found.get(endpoint)

    def fault(self, endpoint: int, reason: int, flags: int = 0, address: int = 0) -> bool:
        """A device's access has failed."""
        return self.call(self.engine.raise_fault, endpoint, reason, flags, address)

    def status(self) -> int:
        """The status register as the back-end shows it."""
        return self.client.ask(wire.GET_STATUS).u64

    def served(self) -> None:
        """Wait until the worker has nothing more to do and sleeps."""
        wait_until(lambda: self.engine.stats().asleep, "the worker to sleep")


def pages(first: int, count: int = 1) -> tuple[int, int]:
    """First and last address of pages, by number."""
    return first * PAGE, (first + count) * PAGE - 1
