"""Builds the device programs when their sources changed. Needs cmake, ninja and a C compiler."""

from __future__ import annotations

import fcntl
import functools
import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE.parents[1] / "build" / "devices"


@functools.cache
def device_program(name: str) -> Path:
    """The path of a device program, "dma_engine" or "nvme", built from the sources as they are now.

    Raises:
        RuntimeError: the build failed; the message is what the compiler said.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        configure = ["cmake", "-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja"]
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return BUILD / name
