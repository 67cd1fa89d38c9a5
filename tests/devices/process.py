"""A device program as a running process: its events, its summary, its end."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from devices.build import device_program

PATIENCE = 60.0
"""Seconds to wait for anything a device does at once; only a broken one meets it."""


class Device:
    """A device process listening on `socket`. Ends with the `with` block."""

    def __init__(self, program: str, socket: Path, *options: str) -> None:
        """Start `program` ("dma_engine", "nvme") and wait until its socket listens."""
        self.socket = socket
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._process = subprocess.Popen(
            [str(device_program(program)), "--socket", str(socket), *options], stdout=subprocess.PIPE
        )
        try:
            self.wait_event("ready")
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait_event(self, name: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The first event of that name, seen already or still to come."""
        deadline = time.monotonic() + patience
        while True:
            for event in self.events:
                if event["event"] == name:
                    return event
            if not self._read(deadline):
                raise RuntimeError(f"the device ended or said nothing: no {name!r} event among {self.events}")

    def _read(self, deadline: float) -> bool:
        """Take what the device printed; False at the end of its output or past the deadline."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        data = self._process.stdout.read1() if ready else b""  # type: ignore[attr-defined]
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.events += [json.loads(line) for line in lines]
        return bool(data)

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit status, once the device has ended."""
        status = self._process.wait(patience)
        while self._read(time.monotonic()):
            pass
        return status

    def stop(self) -> dict[str, Any]:
        """End the device as an operator would and return its summary."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self.wait()
        return self.wait_event("summary")

    def kill(self) -> None:
        """End the device without ceremony, if it still runs."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
