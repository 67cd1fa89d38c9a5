"""The end of the process at the latest.

Ending in order means to stop the worker, and a worker can be made to wait for ever: in the kernel, for memory or a
device that somebody else serves, or by injection.  The conventions promise an end within a second all the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

SECONDS = 0.8
EXIT_STUCK = 3
"""Exit status of a process that could not end in order."""


class Deadline:
    """Ends the process some time after it was armed; a thread, since the one that would end it is the one stuck.

    A call into the engine lets other threads run while it waits.
    """

    def __init__(self, last_words: Callable[[], None], seconds: float = SECONDS) -> None:
        """:param last_words: called just before the end, from the thread."""
        self._last_words = last_words
        self._seconds = seconds
        self._met = threading.Event()
        self._thread: threading.Thread | None = None

    def arm(self) -> None:
        """From now on there is so much time; again is the same as once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="deadline", daemon=True)
            self._thread.start()

    def met(self) -> None:
        """Everything has ended in order."""
        self._met.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        if not self._met.wait(self._seconds):
            try:
                self._last_words()
            finally:
                os._exit(EXIT_STUCK)
