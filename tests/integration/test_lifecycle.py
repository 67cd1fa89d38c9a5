"""How the daemon starts and ends: sockets, signals, clients that come and go."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.client import Client
from frontend.guest import Guest
from frontend.ring import wait_until

from integration.daemon import COMMAND, Daemon

ONE_SECOND = 1.0
"""What the conventions promise after SIGTERM.  The machine may be slow; a daemon that hangs is slower still."""

AS_SYSTEMD = """
import fcntl, os, sys
split = sys.argv.index("--")
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 50) for fd in sys.argv[1:split]]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
os.execv(sys.argv[split + 1], sys.argv[split + 1:])
"""
"""Starts a program with descriptors from 3 on, in the same process, as the service manager does."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that listens."""
    with Daemon(tmp_path) as running:
        yield running


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening UNIX socket to hand to a daemon."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


def test_exits_with_0_when_the_front_end_goes(daemon: Daemon) -> None:
    """The life of the daemon is the life of the VM, and its socket goes with it."""
    with daemon.connect() as client:
        client.negotiate()
    assert daemon.wait() == 0
    assert not daemon.socket_path.exists()
    (line,) = daemon.log("session-ended")
    assert line["features"] == daemon.log("started")[0]["features"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("served", [False, True], ids=["waiting", "serving"])
def test_a_signal_ends_it_within_a_second(daemon: Daemon, number: signal.Signals, served: bool) -> None:
    """With exit status 0 and without leaving the socket behind, whether a front-end is there or not."""
    with contextlib.ExitStack() as stack:
        if served:
            stack.enter_context(daemon.guest()).start()
        else:
            daemon.logged("started")
            wait_until(daemon.socket_path.exists, "a socket")
        began = time.monotonic()
        assert daemon.terminate(number) == 0
        assert time.monotonic() - began < ONE_SECOND
    assert not daemon.socket_path.exists()
    assert len(daemon.log("session-ended")) == served


def test_a_second_client_is_turned_away(daemon: Daemon) -> None:
    """One line in the log, and the first client notices nothing."""
    with daemon.connect() as first:
        first.negotiate()
        with daemon.connect() as second:
            assert second.ended()
        assert first.ask(wire.GET_QUEUE_NUM).u64 == 2
    assert daemon.wait() == 0
    (line,) = daemon.log("second-client-refused")
    assert line["pid"] == os.getpid()


def test_many_clients_turned_away_do_not_flood_the_log(daemon: Daemon) -> None:
    """What a local process can repeat at will is logged a few times and then counted."""
    with daemon.connect() as first:
        first.negotiate()
        for _ in range(200):
            with daemon.connect() as other:
                assert other.ended()
    assert daemon.wait() == 0
    assert len(daemon.log("second-client-refused")) < 10


def test_keep_listening_serves_the_next_client(tmp_path: Path) -> None:
    """Again and again, each at once after the one before, with a device that knows nothing of it."""
    with Daemon(tmp_path, "--keep-listening") as daemon:
        for _ in range(20):
            with daemon.guest() as guest:
                guest.start()
                assert guest.map(1, 0x1000, 0x1FFF, 0x1000) == 6  # NOENT: no such domain
                assert guest.attach(1, 8) == 0
                assert guest.map(1, 0x1000, 0x1FFF, 0x4000_0000) == 0
        assert daemon.process.poll() is None
        assert daemon.terminate() == 0


def test_nothing_stays_open_after_a_connection(tmp_path: Path) -> None:
    """Descriptors, mapped guest memory and threads are as before, however often a guest comes and goes."""
    with Daemon(tmp_path, "--keep-listening") as daemon:

        def visit(number: int) -> None:
            with daemon.guest() as guest:
                guest.start()
                assert guest.attach(1, 8) == 0
                assert guest.map(1, 0x1000, 0x1FFF, 0x4000_0000) == 0
                assert daemon.guest_mappings()
            wait_until(lambda: len(daemon.log("session-ended")) == number, "the end of a session")

        visit(1)
        wait_until(lambda: not daemon.guest_mappings(), "guest memory to be unmapped")
        wait_until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/task")) == 2, "one engine and nothing else")
        before = daemon.open_descriptors()
        for number in range(2, 6):
            visit(number)
        wait_until(lambda: daemon.open_descriptors() == before, f"only these descriptors: {before}")
        assert daemon.guest_mappings() == []
        assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) == 2
        assert daemon.terminate() == 0


def test_broken_protocol_ends_the_connection_with_one_line(daemon: Daemon) -> None:
    """A syntax error closes that connection, says why once, and gives exit status 1."""
    with daemon.connect() as client:
        client.send_raw(b"\xff" * 12)
        assert client.ended()
    assert daemon.wait() == 1
    (line,) = daemon.log("protocol-error")
    assert "version" in line["reason"]


def test_broken_protocol_is_survived_where_it_keeps_listening(tmp_path: Path) -> None:
    """The next front-end is served."""
    with Daemon(tmp_path, "--keep-listening") as daemon:
        with daemon.connect() as client:
            client.send_raw(b"\xff" * 12)
            assert client.ended()
        daemon.logged("session-ended")
        with daemon.connect() as client:
            client.negotiate()
            assert client.ask(wire.GET_QUEUE_NUM).u64 == 2
        assert daemon.terminate() == 0


def test_inherited_listening_socket(tmp_path: Path) -> None:
    """--fd with a listening socket: its file is not ours to remove."""
    path = tmp_path / "inherited"
    with (
        listening(path) as sock,
        Daemon(tmp_path, "--fd", str(sock.fileno()), pass_fds=[sock.fileno()], own_socket=False) as daemon,
    ):
        with Client.connect(str(path)) as client:
            client.negotiate()
        assert daemon.wait() == 0
        assert path.exists()


def test_inherited_connected_socket(tmp_path: Path) -> None:
    """--fd with a connection that is there already."""
    client, theirs = Client.pair()
    with (
        client,
        Daemon(tmp_path, "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()], own_socket=False) as daemon,
    ):
        theirs.close()
        client.negotiate()
        client.close()
        assert daemon.wait() == 0


@pytest.mark.parametrize("names", [None, "control:vhost"], ids=["alone", "named"])
def test_socket_activation(tmp_path: Path, names: str | None) -> None:
    """LISTEN_FDS as systemd passes it: one socket, or the one named vhost; READY=1 goes to NOTIFY_SOCKET."""
    path = tmp_path / "activated"
    with (
        listening(path) as sock,
        listening(tmp_path / "other") as other,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        passed = [sock.fileno()] if names is None else [other.fileno(), sock.fileno()]
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")} | ({"LISTEN_FDNAMES": names} if names else {})
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, *map(str, passed), "--", *COMMAND, "--log-format", "json"],
            stderr=subprocess.PIPE,
            env={**os.environ, **environ},
            pass_fds=passed,
        )
        try:
            assert b"READY=1" in manager.recv(1000)
            with Client.connect(str(path)) as client:
                client.negotiate()
            log = process.communicate(timeout=30)[1]
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0
        assert json.loads(log.splitlines()[0])["socket"] == "the socket in LISTEN_FDS"
    assert path.exists()


def test_socket_mode_and_group(tmp_path: Path) -> None:
    """Private unless the user says otherwise."""
    with Daemon(tmp_path) as daemon, daemon.connect():
        assert stat.S_IMODE(daemon.socket_path.stat().st_mode) == 0o700
    daemon.socket_path.unlink()
    with Daemon(tmp_path, "--socket-mode", "660", "--socket-group", str(os.getgid())) as daemon, daemon.connect():
        status = daemon.socket_path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, os.getgid())


def test_a_socket_of_others_is_not_touched(tmp_path: Path) -> None:
    """Neither one that is in use, nor one left behind, nor a file; each with a line of its own."""
    path = tmp_path / "vhost.sock"
    with listening(path):
        inode = path.stat().st_ino
        with Daemon(tmp_path) as daemon:
            assert daemon.wait() == 2
        assert "another process listens there" in daemon.log_text
    with Daemon(tmp_path) as daemon:
        assert daemon.wait() == 2
    assert "nobody listens on any more" in daemon.log_text
    assert path.stat().st_ino == inode
    path.unlink()
    path.write_text("kept")
    with Daemon(tmp_path) as daemon:
        assert daemon.wait() == 2
    assert "something other than a socket" in daemon.log_text
    assert path.read_text() == "kept"


def test_a_socket_put_in_its_place_stays(daemon: Daemon) -> None:
    """What the daemon removes in the end is what it made, not what stands at its path by then."""
    with daemon.connect():
        daemon.socket_path.unlink()
        with listening(daemon.socket_path):
            assert daemon.terminate() == 0
            assert daemon.socket_path.exists()


def test_idle_memory(daemon: Daemon) -> None:
    """An idle guest costs at most 60 MiB of resident memory."""
    with daemon.guest() as guest:
        guest.start()
        assert guest.attach(1, 8) == 0
        assert daemon.status("VmRSS") <= 60 << 10


def test_a_front_end_that_makes_the_worker_wait(daemon: Daemon) -> None:
    """A call eventfd that is full and blocks: all goes on, and a signal ends it in order, not by its deadline."""
    with daemon.guest() as guest:
        guest.start()
        call = guest.rings[iommu.REQUEST_QUEUE].call_fd
        assert guest.attach(1, 8) == iommu.OK
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(call)
        os.eventfd_write(call, (1 << 64) - 2)
        os.set_blocking(call, True)
        guest.queue_request(iommu.map_(1, 0x1000, 0x1FFF, 0x4000_0000), iommu.TAIL)
        guest.rings[iommu.REQUEST_QUEUE].publish()
        guest.rings[iommu.REQUEST_QUEUE].kick()
        guest.rings[iommu.REQUEST_QUEUE].wait()
        guest.config()
        assert daemon.terminate() == 0
    assert daemon.log("session-ended")


def test_a_log_that_nobody_reads(tmp_path: Path) -> None:
    """Standard error is a pipe, full to the brim: the guest is served, and the daemon ends as it should."""
    reading, writing = os.pipe()
    path = tmp_path / "vhost.sock"
    process = subprocess.Popen([*COMMAND, "--log-level", "debug", "--socket-path", str(path)], stderr=writing)
    os.close(writing)
    try:
        wait_until(path.exists, "a socket")
        with Guest(Client.connect(str(path))) as guest:
            guest.start()
            for _ in range(2000):
                guest.config()
            assert guest.attach(1, 8) == iommu.OK
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
