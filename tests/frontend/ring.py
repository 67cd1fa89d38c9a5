"""What both ring formats have for the tests in common."""

from __future__ import annotations

import os
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from frontend.memory import GuestMemory

NEXT = 1
WRITE = 2
INDIRECT = 4

DEADLINE = 30.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Poll a condition; the deadline is for a back-end that will never make it true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0)


def quiet(eventfd: int) -> bool:
    """Is an eventfd not signalled?"""
    return not select.select([eventfd], [], [], 0)[0]


class Buffer(NamedTuple):
    """One element of a chain."""

    address: int
    length: int
    writable: bool = False


@dataclass(frozen=True)
class Used:
    """A buffer that the device has used."""

    id: int
    length: int


class Ring(ABC):
    """The driver's side of one queue: memory, eventfds, and what it has given and taken."""

    base: int
    """Of the ring before its first use, as SET_VRING_BASE wants it."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = False) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.desc = self.avail = self.used = 0
        self.kicks = 0
        """How often the device asked to be kicked, and was."""

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    @abstractmethod
    def reset(self) -> None:
        """Zero the ring and forget everything, as a driver does before the first use."""

    @abstractmethod
    def want_calls(self, wanted: bool) -> None:
        """Ask the device for notifications of used buffers, or for none."""

    @abstractmethod
    def add(self, chain: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Put a chain where the device will find it, without publishing it; its id."""

    @abstractmethod
    def publish(self) -> None:
        """Make everything that was added available."""

    @abstractmethod
    def kick_is_wanted(self) -> bool:
        """Does the device want to hear of what was published last?"""

    @abstractmethod
    def take(self) -> Used | None:
        """The next buffer that the device has used, or None."""

    def kick(self) -> None:
        """Signal the device, wanted or not."""
        os.eventfd_write(self.kick_fd, 1)

    def submit(self, chain: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Add, publish, and kick if the device wants it."""
        head = self.add(chain, indirect=indirect)
        self.publish()
        if self.kick_is_wanted():
            self.kicks += 1
            self.kick()
        return head

    def wait(self, count: int = 1, seconds: float = DEADLINE) -> list[Used]:
        """Wait until the device has used that many buffers."""
        taken: list[Used] = []

        def enough() -> bool:
            used = self.take()
            if used is not None:
                taken.append(used)
            return len(taken) >= count

        wait_until(enough, f"{count} used buffers", seconds)
        return taken

    def called(self, seconds: float = DEADLINE) -> bool:
        """Wait for a notification and clear it."""
        if not select.select([self.call_fd], [], [], seconds)[0]:
            return False
        os.eventfd_read(self.call_fd)
        return True

    def broken(self, seconds: float = DEADLINE) -> bool:
        """Wait for the device to signal an error of this ring, and clear it."""
        if not select.select([self.err_fd], [], [], seconds)[0]:
            return False
        os.eventfd_read(self.err_fd)
        return True
