"""A control socket: connections, their calls one after another, and what bounds them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import trio
from structlog.typing import FilteringBoundLogger

from viommud.control.errors import MONITOR, SERVICE, STEER, CallError
from viommud.control.methods import find
from viommud.control.monitor import Reply
from viommud.control.subject import Subject
from viommud.control.wire import Call, Framer, WireError, failure, reply
from viommud.log import RateLimiter
from viommud.peer import accept, peer_credentials

CONNECTIONS_MAX = 32
"""At once, on one socket."""
MESSAGE_SECONDS = 10.0
"""For a call to be whole once it has begun."""
SEND_SECONDS = 10.0
"""For a reply to be taken by the client."""
READ_SIZE = 16 << 10
STREAM_SEND_BUFFER = 256 << 10
"""Bytes the kernel keeps for a client that is slow."""

MONITOR_ONLY = (MONITOR,)
EVERYTHING = (MONITOR, STEER)


@dataclass
class ControlServer:
    """One listening socket, and the interfaces that are served on it."""

    subject: Subject
    interfaces: tuple[str, ...]
    log: FilteringBoundLogger
    connections_max: int = CONNECTIONS_MAX
    send_seconds: float = SEND_SECONDS
    message_seconds: float = MESSAGE_SECONDS
    _limiter: RateLimiter = field(default_factory=RateLimiter)
    _connections: int = 0

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                sock = await accept(listener, lambda reason: self._limited("warning", "cannot-accept", reason=reason))
                if self._connections >= self.connections_max:
                    self.subject.counts.control_refused += 1
                    self._limited("warning", "control-connection-refused", **peer_credentials(sock))
                    sock.close()
                    continue
                self._connections += 1
                nursery.start_soon(self._connection, sock)

    def _limited(self, level: str, event: str, **fields: object) -> None:
        extra = self._limiter.admit(event)
        if extra is not None:
            getattr(self.log, level)(event, **fields, **extra)

    async def _connection(self, sock: trio.socket.SocketType) -> None:
        peer: dict[str, Any] = {}
        try:
            with sock:
                peer = peer_credentials(sock)
                self._limited("debug", "control-connected", steering=STEER in self.interfaces, **peer)
                await self._calls(sock, peer)
        except WireError as error:
            self.subject.counts.control_broken += 1
            self._limited("warning", "control-protocol-error", reason=str(error), **peer)
        except _SlowClientError:
            self.subject.counts.control_slow += 1
            self._limited("warning", "control-client-too-slow", **peer)
        except OSError:
            pass  # the client has gone
        except Exception:  # a mistake of ours here is no reason to take the IOMMU away from a running guest
            self.log.exception("control-failed", **peer)
        finally:
            self._connections -= 1

    async def _calls(self, sock: trio.socket.SocketType, peer: dict[str, Any]) -> None:
        framer = Framer()
        while True:
            call = framer.next_call()
            if call is not None:
                await self._answer(sock, call, peer)
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_after(self.message_seconds if framer.incomplete else float("inf")) as scope:
                data = await sock.recv(READ_SIZE)
            if scope.cancelled_caught:
                raise WireError(f"a call was not whole after {self.message_seconds:g} seconds")
            if not data:
                return
            framer.feed(data)

    async def _answer(self, sock: trio.socket.SocketType, call: Call, peer: dict[str, Any]) -> None:
        self.subject.counts.control_calls += 1
        try:
            if call.upgrade:
                raise CallError(f"{SERVICE}.MethodNotImplemented", method=call.method)
            method, parameters = find(call, self.interfaces)
            if call.method.startswith(STEER):
                self._note_steering(call, peer)
            if method.one is not None:
                answer = reply(await method.one(self.subject, parameters))
            else:
                assert method.stream is not None
                await self._stream(sock, method.stream(self.subject, parameters))
                answer = reply(method.end)
        except CallError as error:
            answer = failure(error.error, error.parameters)
        if not call.oneway:
            await self._send(sock, answer)

    def _note_steering(self, call: Call, peer: dict[str, Any]) -> None:
        """Who changed what; rate-limited by method, as a script may well ask a thousand times."""
        extra = self._limiter.admit(call.method)
        if extra is not None:
            parameters = bytes(call.parameters)[:200].decode("utf-8", "replace")
            self.log.info("steered", method=call.method, parameters=parameters, **peer, **extra)

    async def _stream(self, sock: trio.socket.SocketType, replies: AsyncGenerator[Reply, None]) -> None:
        trouble: CallError | OSError | _SlowClientError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, sock, nursery.cancel_scope)
            try:
                async for parameters in replies:
                    await self._send(sock, reply(parameters, continues=True))
            except (CallError, OSError, _SlowClientError) as error:
                trouble = error
            finally:
                with trio.CancelScope(shield=True):
                    await replies.aclose()
            nursery.cancel_scope.cancel()
        if trouble is not None:
            raise trouble

    async def _send(self, sock: trio.socket.SocketType, data: bytes) -> None:
        with trio.move_on_after(self.send_seconds) as scope:
            view = memoryview(data)
            while view:
                view = view[await sock.send(view) :]
        if scope.cancelled_caught:
            raise _SlowClientError


class _SlowClientError(Exception):
    """A client does not read what it asked for."""


async def _until_gone(sock: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    """A client that has a stream says nothing more: whatever comes from it, or its end, ends the stream."""
    await trio.lowlevel.wait_readable(sock)
    scope.cancel()
