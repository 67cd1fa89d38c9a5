"""One vfio-user endpoint over time: a client comes, the handshake is made, the engine relays until the client goes.

Nothing here happens per message.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

import trio
from structlog.typing import FilteringBoundLogger

from viommud.endpoint_id import show
from viommud.engine import VfioUser, VfioUserState
from viommud.log import RateLimiter
from viommud.vfio_user.config import VfioUserSection
from viommud.vfio_user.handshake import shake_hands
from viommud.vfio_user.messages import VfioUserError

ACCEPT_PAUSE = 0.2
"""Seconds to wait when a connection cannot be accepted for lack of something."""
_EVENTS = struct.Struct("=Q")


@dataclass
class Relay:
    """An endpoint and the socket where its client connects."""

    user: VfioUser
    section: VfioUserSection
    granule: int
    log: FilteringBoundLogger
    _limiter: RateLimiter = field(default_factory=RateLimiter)

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Serve one client after the other; the listener stays the caller's."""
        while True:
            client = await self._accept(listener)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._refuse_others, listener)
                await self._serve(client)
                nursery.cancel_scope.cancel()

    async def _accept(self, listener: trio.socket.SocketType) -> trio.socket.SocketType:
        while True:
            try:
                client, _ = await listener.accept()
            except OSError as error:
                self._line("warning", "vfio-user-cannot-accept", reason=error.strerror)
                await trio.sleep(ACCEPT_PAUSE)
            else:
                return client

    async def _refuse_others(self, listener: trio.socket.SocketType) -> None:
        while True:
            other = await self._accept(listener)
            other.close()
            self._line("warning", "vfio-user-second-client-refused")

    async def _serve(self, client: trio.socket.SocketType) -> None:
        try:
            try:
                server, limits = await shake_hands(client, self.section.server, self.granule)
            except VfioUserError as error:
                self._line("error", "vfio-user-not-connected", reason=error.sentence)
                return
            try:
                self.user.connect(client.fileno(), server.fileno(), limits)
            except OSError as error:
                self._line("error", "vfio-user-not-connected", reason=error.strerror)
                return
            finally:
                server.close()  # the engine has its own
        finally:
            client.close()
        self._line(
            "info",
            "vfio-user-connected",
            server=self.section.server,
            mode=self.section.mode,
            max_transfer=limits.max_transfer,
            max_dma_maps=limits.max_dma_maps,
        )
        try:
            await self._watch()
        finally:
            self.summarise()

    async def _watch(self) -> None:
        """Until the client has gone; says when the server is cut off."""
        told = 0
        while True:
            stats = self.user.stats()
            if stats.failures != told:
                told = stats.failures
                self._line("error", "vfio-user-server-cut-off", reason=stats.cause, failures=stats.failures)
            if stats.state == VfioUserState.ABSENT:
                return
            await trio.lowlevel.wait_readable(self.user.event_fd)
            try:
                os.read(self.user.event_fd, _EVENTS.size)
            except BlockingIOError:
                continue

    def summarise(self) -> None:
        """What has come and gone on this endpoint so far."""
        stats = self.user.stats()
        self._line(
            "info",
            "vfio-user-summary",
            mode=self.section.mode,
            memory_bytes=stats.peak_memory_bytes,
            peak_reachable_bytes=stats.peak_reachable_bytes,
            requests=stats.requests,
            dma_maps=stats.maps,
            dma_unmaps=stats.unmaps,
            reads=stats.reads,
            read_bytes=stats.read_bytes,
            writes=stats.writes,
            write_bytes=stats.write_bytes,
            refused=stats.refused,
            server_failures=stats.failures,
        )

    def _line(self, level: str, event: str, **fields: object) -> None:
        extra = self._limiter.admit(event)
        if extra is not None:
            getattr(self.log, level)(event, endpoint=show(self.user.endpoint), **fields, **extra)
