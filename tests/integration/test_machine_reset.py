"""A reset of the machine, told by QMP: config.bypass is again what the user configured."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
from frontend import iommu, wire
from frontend.guest import Guest
from frontend.ring import wait_until

from integration.daemon import Daemon

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 0}}, "capabilities": ["oob"]}}


class FakeQemu:
    """The QMP side of QEMU: a socket for one client, and whatever a test wants to say on it."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._listener.settimeout(30)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._path.unlink(missing_ok=True)

    def accept(self) -> socket.socket:
        """The next client."""
        client, _ = self._listener.accept()
        client.settimeout(30)
        return self._stack.enter_context(client)

    def greet(self) -> socket.socket:
        """The next client, after capabilities are negotiated."""
        client = self.accept()
        self.say(client, GREETING)
        command = json.loads(client.makefile("rb").readline())
        assert command == {"execute": "qmp_capabilities"}
        self.say(client, {"return": {}})
        return client

    @staticmethod
    def say(client: socket.socket, message: Any) -> None:
        """One line of JSON, as QEMU ends it."""
        client.sendall(json.dumps(message).encode() + b"\r\n")

    def reset(self, client: socket.socket, *, guest: bool) -> None:
        """The event of a reset."""
        reason = "guest-reset" if guest else "host-qmp-system-reset"
        stamp = {"seconds": 1, "microseconds": 2}
        self.say(client, {"timestamp": stamp, "event": "RESET", "data": {"guest": guest, "reason": reason}})


def config(path: Path, *, boot: int) -> str:
    """A configuration with a QMP socket."""
    return f'[device]\nbypass = {"true" if boot else "false"}\nmsi = "none"\n[qemu]\nqmp = "{path}"\n'


def write_bypass(guest: Guest, value: int) -> None:
    """As the driver does."""
    guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, bytes([value])))
    assert guest.config().bypass == value


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[FakeQemu]:
    """QEMU's QMP socket."""
    with FakeQemu(tmp_path / "qmp") as qemu:
        yield qemu


@pytest.mark.rule("R-CONF-4", "R-CONF-5")
@pytest.mark.parametrize("boot", [0, 1])
@pytest.mark.parametrize("by_guest", [True, False])
def test_reset_of_the_machine_and_of_the_device(tmp_path: Path, qmp: FakeQemu, boot: int, by_guest: bool) -> None:
    """The one gives bypass its initial value, whoever asked for it; the other leaves what the driver wrote."""
    with Daemon(tmp_path, config=config(tmp_path / "qmp", boot=boot)) as daemon, daemon.guest() as guest:
        guest.start()
        qemu = qmp.greet()
        for _ in range(2):
            write_bypass(guest, 1 - boot)
            guest.reset_and_start()
            assert guest.config().bypass == 1 - boot
            qmp.reset(qemu, guest=by_guest)
            wait_until(lambda: guest.config().bypass == boot, "bypass to be as at the start")
        assert daemon.logged("machine-reset")["bypass"] == bool(boot)


@pytest.mark.rule("R-CONF-5")
def test_other_events_are_no_reset(tmp_path: Path, qmp: FakeQemu) -> None:
    """STOP, RESUME, SHUTDOWN and what QEMU may invent."""
    with Daemon(tmp_path, config=config(tmp_path / "qmp", boot=1)) as daemon, daemon.guest() as guest:
        guest.start()
        qemu = qmp.greet()
        write_bypass(guest, 0)
        for event in ("STOP", "RESUME", "SHUTDOWN", "RTC_CHANGE", "reset"):
            qmp.say(qemu, {"event": event, "data": {"guest": True}})
        qmp.say(qemu, {"return": {}})
        qmp.say(qemu, {"event": "DEVICE_DELETED", "data": {"path": "x" * 100_000}})
        assert guest.config().bypass == 0
        qmp.reset(qemu, guest=True)
        wait_until(lambda: guest.config().bypass == 1, "the one reset")
        assert len(daemon.log("machine-reset")) == 1


def test_qemu_comes_late_and_comes_again(tmp_path: Path) -> None:
    """The socket is awaited; when it is gone, the next one is."""
    path = tmp_path / "qmp"
    with Daemon(tmp_path, config=config(path, boot=1)) as daemon, daemon.guest() as guest:
        guest.start()
        write_bypass(guest, 0)
        for _ in range(2):
            with FakeQemu(path) as qmp:
                qemu = qmp.greet()
                qmp.reset(qemu, guest=True)
                wait_until(lambda: guest.config().bypass == 1, "bypass to be as at the start")
                write_bypass(guest, 0)
        assert guest.attach(1, 0x10) == iommu.OK


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello\n",
        b"[]\n",
        b'{"return": {}}\n' * 3 + b"\xff\xfe\n",
        b'{"a":' * 100_000 + b"\n",
        b'{"error": "no"}\n',
        b"",
    ],
    ids=["not JSON", "no object", "not UTF-8", "deep", "error", "silence"],
)
def test_whoever_answers_there(tmp_path: Path, qmp: FakeQemu, nonsense: bytes) -> None:
    """Nonsense costs a line in the log, now and then; the guest is served on."""
    with Daemon(tmp_path, config=config(tmp_path / "qmp", boot=1)) as daemon, daemon.guest() as guest:
        guest.start()
        client = qmp.accept()
        if nonsense:
            client.sendall(nonsense)
            daemon.logged("qmp-failed")
        client.close()
        assert guest.attach(1, 0x10) == iommu.OK
        qemu = qmp.greet()
        write_bypass(guest, 0)
        qmp.reset(qemu, guest=False)
        wait_until(lambda: guest.config().bypass == 1, "bypass to be as at the start")
        assert len(daemon.log("qmp-failed")) <= 1
