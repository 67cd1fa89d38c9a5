"""What the control sockets look at: the daemon's state, held in one place and changed by the daemon alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from viommud.control.errors import MONITOR, CallError
from viommud.device_setup import DeviceSetup
from viommud.engine import Engine
from viommud.events import EventLog
from viommud.vhost_user.session import Session

STUCK_SECONDS = 1.0
"""A worker that makes no round for so long is not asked for anything."""
PAUSE = 0.001
"""Seconds between two questions to the worker, at least ..."""
SHARE = 20
"""... and so many times what the last one took ..."""
PAUSE_MAX = 0.1
"""... but no longer than this, as it may have been the machine that was slow."""

T = TypeVar("T")


@dataclass
class Counts:
    """What the daemon itself counts, over all front-ends."""

    sessions: int = 0
    protocol_errors: int = 0
    control_calls: int = 0
    control_refused: int = 0
    """Connections closed at once: too many."""
    control_broken: int = 0
    """Connections that did not speak varlink."""
    control_slow: int = 0
    """Connections closed because they were not read."""


@dataclass
class Subject:
    """The daemon, as far as it is looked at and steered."""

    setup: DeviceSetup
    socket: str
    """Where the front-end's socket came from."""
    allow_injection: bool = False
    engine: Engine | None = None
    """The engine that serves now, or waits for a front-end."""
    session: Session | None = None
    session_started: float = 0.0
    events: EventLog = field(default_factory=EventLog)
    counts: Counts = field(default_factory=Counts)
    started: float = field(default_factory=time.monotonic)
    pid: int = field(default_factory=os.getpid)
    _recorder: trio.Event | None = None
    _turn: trio.Lock = field(default_factory=trio.Lock)
    _not_before: float = -math.inf
    _left_over: list[bytes] = field(default_factory=list)

    def begin(self) -> None:
        """A front-end has come."""
        self.counts.sessions += 1
        self.session_started = time.monotonic()
        self.events.clear()
        self.events.note("session", reason="began")

    def attend(self, session: Session) -> None:
        """Its session."""
        self.session = session

    def let_go(self) -> None:
        """The engine is about to be closed; what was recorded and not read yet is kept for who records."""
        if self.session is not None:
            self.events.note("session", reason="ended")
        engine, self.engine, self.session = self.engine, None, None
        while engine is not None and self.recording:
            entries, _ = engine.instruments.take_recorded()
            if not entries:
                break
            self._left_over.append(entries)

    async def settled(self) -> None:
        """Wait until who records has been given everything."""
        if self._recorder is not None:
            await self._recorder.wait()

    @property
    def recording(self) -> bool:
        """Does somebody record?"""
        return self._recorder is not None

    def recording_began(self) -> None:
        """Somebody records."""
        self._recorder = trio.Event()

    def recording_ended(self) -> None:
        """And has been given everything, or does not want any more."""
        if self._recorder is not None:
            self._recorder.set()
            self._recorder = None
        self._left_over.clear()

    def take_left_over(self) -> list[bytes]:
        """What was recorded and not read when the engine went."""
        left_over, self._left_over = self._left_over, []
        return left_over

    def require_engine(self) -> Engine:
        """The engine.

        :raises CallError: there is none just now.
        """
        if self.engine is None:
            raise CallError(f"{MONITOR}.NotNow")
        return self.engine

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """Ask something that the worker has to answer, between two batches of requests.

        However many clients ask however fast, the worker is asked at most once in PAUSE, and spends only a small
        part of its time on answers.

        :raises CallError: there is no engine, or its worker is stuck.
        """
        async with self._turn:
            await trio.sleep_until(self._not_before)
            engine = await self._responsive_engine()
            began = trio.current_time()
            try:
                return question(engine)
            finally:
                took = trio.current_time() - began
                self._not_before = trio.current_time() + min(max(PAUSE, took * SHARE), PAUSE_MAX)

    async def _responsive_engine(self) -> Engine:
        engine = self.require_engine()
        before = engine.stats()
        deadline = trio.current_time() + STUCK_SECONDS
        while True:
            now = engine.stats()
            if now.asleep or now.heartbeat != before.heartbeat:
                return engine
            if trio.current_time() > deadline:
                raise CallError(f"{MONITOR}.WorkerStuck")
            await trio.sleep(0.001)
            if self.engine is not engine:
                return await self._responsive_engine()
