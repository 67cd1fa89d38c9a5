"""H11: front-ends that leave, come back, and do not listen."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.client import Client, ConnectionEndedError
from frontend.guest import Guest
from frontend.ring import Buffer
from frontend.split import SplitRing
from integration.daemon import Daemon

from hostile.victim import CONFIG, ENDPOINT, PAGE, RAM, Victim


class Recorder(Client):
    """A client that hangs up after so many messages."""

    left = 1 << 30

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:  # type: ignore[override]  # noqa: D102
        if not self.left:
            self.close()
            raise ConnectionEndedError("as planned")
        self.left -= 1
        super().send_raw(data, fds)


def session(client: Client) -> None:
    """A whole life: start, requests, pause, reset."""
    with Guest(client) as guest:
        guest.start()
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
        guest.pause_and_continue()
        guest.reset_and_start()


def test_leaving_after_every_message(victim: Victim) -> None:
    """Nothing stays mapped, open or running. DPDK 73ea44370d, 21d9fb6bad: cleaning up raced with the data plane."""
    messages = 0
    while True:
        client = victim.connect()
        recorder = Recorder(client.sock)
        recorder.left = messages
        try:
            session(recorder)
        except (ConnectionEndedError, OSError):
            messages += 1
            continue
        break
    assert messages > 40


def test_leaving_in_the_middle_of_a_batch(victim: Victim) -> None:
    """Requests under way are finished or dropped; the next guest starts from nothing."""
    for _ in range(10):
        with victim.guest(queue_size=1024) as guest:
            guest.start()
            for _ in range(400):
                mark = guest.memory.mark()
                guest.queue_request(iommu.attach(1, ENDPOINT), 4)
                guest.memory.release(mark)
            guest.rings[0].publish()
            guest.rings[0].kick()


def test_a_reader_of_nothing(victim: Victim) -> None:
    """Requests without end whose answers nobody reads: what waits is bounded by the socket, not by us."""
    with victim.connect() as client:
        client.sock.settimeout(0.5)

        def ask_without_end() -> None:
            while True:
                client.send_raw(wire.message(wire.GET_FEATURES) * 100)

        with pytest.raises(TimeoutError):
            ask_without_end()
        assert victim.daemon.status("VmRSS") < 80 << 10


def test_a_second_client_meanwhile(victim: Victim) -> None:
    """Hundreds are turned away; the first is served, and notices nothing."""
    with victim.guest() as guest:
        guest.start()
        for _ in range(200):
            with victim.daemon.connect() as other:
                assert other.ended()
        assert guest.attach(1, ENDPOINT) == iommu.OK


def test_stopping_and_starting_without_end(victim: Victim) -> None:
    """Thousands of pauses, with requests before and after each."""
    with victim.guest() as guest:
        guest.start()
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
        for _ in range(1000):
            bases = [guest.client.get_base(index) for index in range(2)]
            for index, base in enumerate(bases):
                guest.client.send(wire.SET_VRING_BASE, wire.vring_state(index, base))
                guest.client.send(wire.SET_VRING_KICK, wire.u64(index), [guest.rings[index].kick_fd])
            assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL


def test_the_event_queue_stops_while_requests_are_served(victim: Victim) -> None:
    """One ring comes and goes, the other is served all the time."""
    with victim.guest() as guest:
        guest.start()
        for _ in range(200):
            base = guest.client.get_base(1)
            assert guest.attach(1, ENDPOINT) == iommu.OK
            guest.client.send(wire.SET_VRING_BASE, wire.vring_state(1, base))
            guest.client.send(wire.SET_VRING_KICK, wire.u64(1), [guest.rings[1].kick_fd])
            assert guest.attach(1, ENDPOINT) == iommu.OK


def test_a_signal_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    """SIGTERM while a guest asks without a pause: the daemon ends in an orderly way, status 0."""
    config = CONFIG.replace("packed-ring = true", "packed-ring = false")
    with Daemon(tmp_path, config=config) as daemon, daemon.guest(queue_size=1024) as guest:
        guest.start()
        ring, stop = guest.rings[0], threading.Event()
        assert isinstance(ring, SplitRing)
        body, answer = guest.memory.allocate(20), guest.memory.allocate(4)
        guest.memory.write(body, iommu.attach(1, ENDPOINT))

        def ask() -> None:
            while not stop.is_set():
                if len(ring.free) > 2:
                    ring.submit([Buffer(body, 20), Buffer(answer, 4, writable=True)])
                ring.take()

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            assert guest.client.ask(wire.GET_STATUS)
            assert daemon.terminate(signal.SIGTERM) == 0
        finally:
            stop.set()
            thread.join()
