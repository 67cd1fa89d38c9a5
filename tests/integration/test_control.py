"""A running daemon looked at and steered as its users do: viommuctl, Prometheus, and a guest behind it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from frontend import iommu
from frontend.guest import Guest
from frontend.ring import wait_until

from integration.daemon import Daemon
from viommud.ctl.client import MONITOR, STEER, Client, pages

ENDPOINT = 0x10
RAM = 0x4000_0000
PAGE = 0x1000

CONFIG = """
[device]
msi = "x86"
bypass = false
[control]
allow-injection = true
[worker]
time-every = 1
[[endpoint]]
id = "00:02.0"
[[endpoint]]
id = "00:03.0"
"""


class Observed(Daemon):
    """A daemon with all its control sockets."""

    def __init__(self, directory: Path, *options: str, config: str = CONFIG) -> None:
        self.directory = directory
        sockets = [f"--{name}-path={directory / name}" for name in ("control", "steer", "metrics")]
        super().__init__(directory, *sockets, *options, config=config)
        wait_until(lambda: (directory / "metrics").exists() or self.process.poll() is not None, "the sockets")
        self.logged("started")

    def ctl(self, *arguments: str, socket: str = "steer", check: bool = True) -> str:
        """What viommuctl prints."""
        done = subprocess.run(
            [sys.executable, "-m", "viommud.ctl.main", "--socket", str(self.directory / socket), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == check, done.stderr
        return done.stdout if check else done.stderr

    def json(self, *arguments: str, **options: Any) -> Any:
        """What viommuctl prints with --json."""
        return json.loads(self.ctl("--json", *arguments, **options))

    def client(self, socket: str = "steer") -> Client:
        """A varlink connection."""
        return Client(self.directory / socket)

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self.directory / "metrics"))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while data := sock.recv(1 << 16):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200 OK\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        return parse_metrics(body.decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Samples by name and labels; every line must be one, or a comment of the format."""
    found = {}
    for line in text.splitlines():
        if line.startswith("# "):
            assert re.fullmatch(r"# (HELP|TYPE) viommud_\w+ .+", line), line
            continue
        match = re.fullmatch(r'(viommud_\w+(?:\{\w+="[^"]*"(?:,\w+="[^"]*")*\})?) (-?[0-9.e+-]+)', line)
        assert match, line
        assert match[1] not in found
        found[match[1]] = float(match[2])
    return found


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Observed]:
    """A daemon that is looked at."""
    with Observed(tmp_path) as running:
        yield running


@pytest.fixture
def guest(daemon: Observed) -> Iterator[Guest]:
    """A guest behind it, with an endpoint in domain 1 and four pages mapped."""
    with daemon.guest() as running:
        running.start()
        assert running.attach(1, ENDPOINT) == iommu.OK
        for page in range(4):
            assert running.map(1, page * PAGE, (page + 1) * PAGE - 1, RAM + page * PAGE) == iommu.OK
        yield running


def test_looking(daemon: Observed, guest: Guest) -> None:
    """What the guest did is what is seen, on the socket to look."""
    status = daemon.json("status", socket="control")
    assert (status["pid"], status["session"]["running"], status["paused"]) == (daemon.process.pid, True, False)
    assert status["session"]["memory_bytes"] == sum(ram.size for ram in guest.memory.rams)
    assert status["counters"]["requests"] == {"attach": {"ok": 1}, "map": {"ok": 4}}
    (endpoint,) = daemon.json("endpoints", socket="control")
    assert (endpoint["name"], endpoint["domain"], endpoint["bypass"]) == ("00:02.0", 1, False)
    assert endpoint["reserved"] == [{"first": "0xfee00000", "last": "0xfeefffff", "type": "msi"}]
    assert daemon.json("domains", socket="control") == [{"id": 1, "endpoints": 1, "mappings": 4, "bypass": False}]
    mappings = [json.loads(line) for line in daemon.ctl("--json", "map", "1", socket="control").splitlines()]
    assert [(m["first"], m["last"], m["phys"]) for m in mappings][1] == ("0x1000", "0x1fff", f"{RAM + PAGE:#x}")
    assert daemon.json("translate", "00:02.0", "0x2468", socket="control") == {"phys": f"{RAM + 0x2468:#x}"}
    assert daemon.json("translate", "16", "0x4000", socket="control") == {"phys": None}
    limits = {limit["name"]: limit for limit in daemon.json("limits", socket="control")}
    assert limits["mappings"]["used"] == 4


def test_refused_requests_are_seen(daemon: Observed, guest: Guest) -> None:
    """A driver ignores most statuses; who looks does not."""
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL
    assert guest.unmap(7, 0, PAGE - 1) == iommu.NOENT
    wait_until(lambda: len(daemon.ctl("refused").splitlines()) == 2, "both")
    first, second = (json.loads(line) for line in daemon.ctl("--json", "refused").splitlines())
    assert (first["request"], first["status"], first["domain"], first["first"]) == ("map", "inval", 1, "0x0")
    assert (second["request"], second["status"], second["domain"]) == ("unmap", "noent", 7)


def test_every_command_has_something_to_say_to_a_person(daemon: Observed, guest: Guest, tmp_path: Path) -> None:
    """Text that names what is there."""
    assert "4 mappings" in daemon.ctl("status")
    assert "00:02.0" in daemon.ctl("endpoints")
    assert daemon.ctl("domains").splitlines()[1].split() == ["1", "1", "4", "mapped"]
    drawn = daemon.ctl("map", "1")
    assert "16 KiB" in drawn
    assert "unmapped" in drawn
    assert "reserved" in drawn
    assert len(daemon.ctl("map", "1", "--list").splitlines()) == 4
    daemon.ctl("map", "1", "--svg", str(tmp_path / "map.svg"))
    assert "<title>0x0-0x3fff rw</title>" in (tmp_path / "map.svg").read_text()
    assert daemon.ctl("translate", "00:02.0", "0x1000").strip() == f"{RAM + PAGE:#x}"
    assert "mappings" in daemon.ctl("limits")
    top = daemon.ctl("top", "--once")
    assert "00:02.0" in top
    assert "p99" in top
    assert daemon.json("top")["counters"]["mappings"] == 4


def test_faults(daemon: Observed, guest: Guest) -> None:
    """Injected, seen by the guest, seen by who follows."""
    follower = subprocess.Popen(
        [sys.executable, "-m", "viommud.ctl.main", "-s", str(daemon.directory / "control"), "--json", "faults", "-f"],
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and so would this be.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert follower.stdout is not None
    try:
        posted = guest.post_event_buffers(2)
        inject = ("inject", "fault", "00:02.0", "--reason", "mapping", "--access", "write", "--address", "0x1234000")
        assert daemon.json(*inject) == {"queued": True}
        (used,) = guest.rings[iommu.EVENT_QUEUE].wait()
        report = iommu.fault(guest.memory.read(posted[used.id], iommu.FAULT_SIZE))
        assert report == iommu.Fault(2, 0x102, ENDPOINT, 0x1234000)
        event = json.loads(follower.stdout.readline())
        assert (event["endpoint"], event["reason"], event["first"]) == (ENDPOINT, "mapping", "0x1234000")
        assert "no endpoint 9" in daemon.ctl("inject", "fault", "9", check=False)
    finally:
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 0
        follower.stdout.close()


def test_injection(daemon: Observed, guest: Guest) -> None:
    """The next requests go wrong as asked, and no others; it is logged."""
    daemon.ctl("inject", "status", "nomem", "--count", "2", "--request", "map")
    daemon.ctl("inject", "status", "range", "--endpoint", "00:03.0")
    assert len(daemon.json("inject", "list")) == 2
    assert guest.map(1, 0x10_0000, 0x10_0FFF, RAM) == iommu.NOMEM
    assert guest.unmap(1, 0, PAGE - 1) == iommu.OK
    assert guest.map(1, 0x10_0000, 0x10_0FFF, RAM) == iommu.NOMEM
    assert guest.map(1, 0x10_0000, 0x10_0FFF, RAM) == iommu.OK
    assert guest.attach(1, 0x18) == iommu.RANGE
    assert daemon.json("inject", "list") == []
    line = daemon.logged("injected")
    assert (line["request"], line["action"]) == ("map", "status")
    steered = daemon.logged("steered")
    assert (steered["uid"], steered["method"]) == (os.getuid(), f"{STEER}.Inject")
    daemon.ctl("inject", "delay", "600s")
    assert daemon.json("inject", "clear") == {"cleared": 1}


def test_injection_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    """With a hint at the configuration; whatever socket is used."""
    with Observed(tmp_path, config="") as daemon:
        said = daemon.ctl("inject", "drop", check=False)
        assert "allow-injection = true" in said
        assert "steering socket" in daemon.ctl("inject", "drop", socket="control", check=False)
        assert daemon.terminate() == 0


def test_pause_and_resume(daemon: Observed, guest: Guest) -> None:
    """Nothing is answered meanwhile, and everything afterwards."""
    daemon.ctl("pause")
    assert daemon.json("status")["paused"]
    ring = guest.rings[iommu.REQUEST_QUEUE]
    guest.queue_request(iommu.unmap(1, 0, PAGE - 1), iommu.TAIL)
    ring.publish()
    ring.kick()
    assert daemon.json("domains")[0]["mappings"] == 4
    daemon.ctl("resume")
    (used,) = ring.wait()
    assert used.length == iommu.TAIL
    assert daemon.json("domains")[0]["mappings"] == 3


def test_limits_and_log_level(daemon: Observed, guest: Guest) -> None:
    """Changed while it runs."""
    daemon.ctl("set-limits", "--mappings", "5")
    assert guest.map(1, 0x10_0000, 0x10_0FFF, RAM) == iommu.OK
    assert guest.map(1, 0x20_0000, 0x20_0FFF, RAM) == iommu.NOMEM
    assert daemon.logged("request-refused")["limit"] == "limits.mappings"
    assert daemon.json("log-level", "debug") == {"before": "info"}
    guest.config()
    assert daemon.logged("frontend-request")["request"] == "GET_CONFIG"


def test_recording_and_replay(daemon: Observed, tmp_path: Path) -> None:
    """From before the first request; played, every status is the same; what is not a recording is said to be none."""
    file = tmp_path / "requests"
    recorder = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "viommud.ctl.main",
            "-s",
            str(daemon.directory / "steer"),
            "--json",
            "record",
            str(file),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: daemon.json("status")["recording"], "the recording")
    assert "somebody records already" in daemon.ctl("record", str(tmp_path / "other"), check=False)
    with daemon.guest() as guest:
        guest.start()
        assert guest.attach(1, ENDPOINT) == iommu.OK
        for page in range(2000):
            assert guest.map(1, page * PAGE, (page + 1) * PAGE - 1, RAM) == iommu.OK
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL
        assert guest.unmap(1, 0, 2000 * PAGE - 1) == iommu.OK
    assert daemon.wait() == 0
    said, _ = recorder.communicate(timeout=30)
    told = json.loads(said)
    assert told["lost"] == 0
    assert told["entries"] >= 2003
    play = [sys.executable, "-m", "viommud", "replay", str(file), "--json"]
    done = subprocess.run(play, capture_output=True, text=True, check=True)
    played = json.loads(done.stdout)
    assert (played["requests"], played["different"], played["lost"], played["complete"]) == (2003, 0, 0, True)
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut off" in subprocess.run(play, capture_output=True, text=True, check=False).stderr
    file.write_bytes(b"something else")
    done = subprocess.run(play, capture_output=True, text=True, check=False)
    assert (done.returncode, "not a recording" in done.stderr) == (2, True)


def test_metrics(daemon: Observed, guest: Guest) -> None:
    """Prometheus sees what the guest did, and a histogram that adds up."""
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL
    wait_until(lambda: daemon.metrics()["viommud_request_seconds_count"] == 6, "six requests timed")
    found = daemon.metrics()
    assert found['viommud_requests_total{type="map",status="ok"}'] == 4
    assert found['viommud_requests_total{type="map",status="inval"}'] == 1
    assert found['viommud_objects{kind="mappings"}'] == 4
    assert found["viommud_front_end"] == 1
    buckets = [value for name, value in found.items() if name.startswith("viommud_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 6
    assert found["viommud_request_seconds_sum"] > 0


def test_lines_of_metrics_are_bounded(daemon: Observed, guest: Guest) -> None:
    """However many domains and endpoints a guest makes, there are as many lines as before."""
    before = set(daemon.metrics())
    for domain in range(2, 200):
        assert guest.attach(domain, ENDPOINT) == iommu.OK
        guest.map(domain, 0, 0, 0)
    assert set(daemon.metrics()) == before


def test_textfile(tmp_path: Path) -> None:
    """Written whole, again and again, readable for everybody, and by no other name left behind."""
    directory = tmp_path / "collector"
    directory.mkdir()
    config = f'[metrics]\ntextfile = "{directory / "vm1.prom"}"\ntextfile-seconds = 1\n'
    with Daemon(tmp_path, config=config) as daemon:
        path = directory / "vm1.prom"
        wait_until(path.exists, "the file")
        first = parse_metrics(path.read_text())["viommud_up_seconds"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        wait_until(lambda: parse_metrics(path.read_text())["viommud_up_seconds"] > first, "a newer file")
        assert daemon.terminate() == 0
    assert os.listdir(directory) == ["vm1.prom"]


def test_sockets_have_the_modes_that_are_asked_for(tmp_path: Path) -> None:
    """Looking for a group, steering for nobody else; and they go with the daemon."""
    config = f"""
[control]
path = "{tmp_path / "monitor"}"
mode = "660"
group = "{os.getgid()}"
steer-path = "{tmp_path / "steer"}"
"""
    with Daemon(tmp_path, config=config) as daemon:
        daemon.logged("started")
        assert stat.S_IMODE((tmp_path / "monitor").stat().st_mode) == 0o660
        assert stat.S_IMODE((tmp_path / "steer").stat().st_mode) == 0o600
        assert daemon.terminate() == 0
    assert not (tmp_path / "monitor").exists()
    assert not (tmp_path / "steer").exists()


def test_a_large_listing_does_not_hold_up_the_guest(daemon: Observed, guest: Guest) -> None:
    """Fetched page by page while the guest goes on asking: both get done, and no page is long in coming."""
    assert guest.attach(2, 0x18) == iommu.OK
    count = 5000
    for page in range(count):
        assert guest.map(2, 2 * page * PAGE, 2 * page * PAGE + PAGE - 1, RAM) == iommu.OK
    stop = threading.Event()
    served = []

    def work() -> None:
        while not stop.is_set():
            assert guest.map(1, 0x10_0000, 0x10_0FFF, RAM) == iommu.OK
            assert guest.unmap(1, 0x10_0000, 0x10_0FFF) == iommu.OK
            served.append(1)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with daemon.client("control") as client:
            for _ in range(3):
                before = len(served)
                found = list(pages(client, f"{MONITOR}.ListMappings", "mappings", domain=2, limit=1000))
                assert [int(mapping["first"], 16) for mapping in found] == [2 * page * PAGE for page in range(count)]
                wait_until(lambda before=before: len(served) > before, "the guest to go on")  # type: ignore[misc]
    finally:
        stop.set()
        worker.join()


def test_a_worker_that_hangs(daemon: Observed, guest: Guest) -> None:
    """What can be told without it is told, the rest is refused; and the process ends within a second all the same."""
    daemon.ctl("inject", "hang", "--request", "unmap")
    guest.queue_request(iommu.unmap(1, 0, PAGE - 1), iommu.TAIL)
    guest.rings[iommu.REQUEST_QUEUE].publish()
    guest.rings[iommu.REQUEST_QUEUE].kick()
    with daemon.client() as client:
        before = client.call(f"{MONITOR}.GetCounters")["counters"]["heartbeat"]
        wait_until(
            lambda: "no progress" in daemon.ctl("endpoints", check=False) if before is not None else False, "the hang"
        )
        assert client.call(f"{MONITOR}.GetStatus")["session"] is not None
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(10) == 3
    assert daemon.log("worker-stuck")
    assert not daemon.socket_path.exists()
    assert not (daemon.directory / "control").exists()
