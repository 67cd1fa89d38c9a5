"""A QEMU without a guest, and viommud or QEMU's own IOMMU in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from integration.daemon import Daemon
from vm import backend, qtest
from vm.iommu import Iommu
from vm.qtest import Board, Machine

CONFIG = """
[device]
msi = "none"
packed-ring = true
[[endpoint]]
id = "00:00.0-00:1f.7"
"""
ENDPOINT = 0x10
SIBLING = 0x18


@dataclass(frozen=True)
class Rig:
    """A machine with an IOMMU, not brought up yet."""

    machine: Machine
    iommu: Iommu
    daemon: Daemon

    def finish(self) -> dict[str, object]:
        """End QEMU; both must have ended well.  What the daemon says of the session."""
        self.iommu.close()
        assert self.machine.qemu.quit() == 0
        assert self.daemon.wait() == 0
        said = self.machine.qemu.log.read_text()
        assert said == "", f"QEMU said: {said}"
        return self.daemon.logged("session-ended")


MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeRig]:
    """Makes a rig: make_rig(board, config=..., arguments=..., and options of vm.qtest.start); it ends with the test."""
    with ExitStack() as stack:

        def make(board: Board, *, config: str = CONFIG, arguments: tuple[str, ...] = (), **options: Any) -> Rig:
            daemon = stack.enter_context(backend.start(tmp_path, config=config))
            devices = qtest.vhost_user_iommu(daemon.socket_path)
            machine = stack.enter_context(qtest.start(tmp_path, board, [*arguments, *devices], **options))
            iommu = Iommu(machine)
            stack.callback(iommu.close)
            return Rig(machine, iommu, daemon)

        yield make


@pytest.fixture(params=["virt", "q35"])
def rig(request: pytest.FixtureRequest, make_rig: MakeRig) -> Rig:
    """A rig on each board in turn."""
    board: Board = request.param
    return make_rig(board)


@pytest.fixture
def qemus_own(tmp_path: Path) -> Iterator[Iommu]:
    """QEMU's own IOMMU, to compare with."""
    with qtest.start(tmp_path, "virt", qtest.qemu_iommu()) as machine:
        iommu = Iommu(machine)
        yield iommu
        iommu.close()
