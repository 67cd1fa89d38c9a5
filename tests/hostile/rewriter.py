"""Another processor that rewrites guest memory while the device reads it.

A process of its own, so that no interpreter lock keeps its writes and the test's from meeting: as a program it maps the
file on descriptor 3 and writes until its standard input ends.
"""

from __future__ import annotations

import json
import mmap
import random
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from frontend.memory import Ram

ROUNDS = 2000
"""Writes between two looks at standard input."""


class Rewriter:
    """Writes while the context lasts."""

    def __init__(self, ram: Ram, writes: Sequence[tuple[int, bytes]], seed: int) -> None:
        """:param writes: guest addresses and what is written there, one after the other in any order."""
        plan = {"size": ram.size, "seed": seed, "writes": [(at - ram.gpa, data.hex()) for at, data in writes]}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(ram.fd), json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[ram.fd],
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"writing\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
        assert kind is not None or self._process.returncode == 0


def main(fd: int, plan: str) -> None:
    """The program."""
    spec = json.loads(plan)
    rng = random.Random(spec["seed"])
    writes = [(at, bytes.fromhex(data)) for at, data in spec["writes"]]
    with mmap.mmap(fd, spec["size"]) as memory:
        print("writing", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(ROUNDS):
                at, data = rng.choice(writes)
                memory[at : at + len(data)] = data


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
