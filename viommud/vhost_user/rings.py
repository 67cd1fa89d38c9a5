"""All rings of a device: when one runs, when it stops, and what their first run after a stop means for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from viommud.vhost_user.device import Device, QueueSetup
from viommud.vhost_user.errors import Refused
from viommud.vhost_user.features import F_RING_PACKED, VHOST_USER_BITS
from viommud.vhost_user.memory import MemorySnapshot
from viommud.vhost_user.payloads import F_PROTOCOL_FEATURES
from viommud.vhost_user.restart import StoppedRing, Verdict, judge
from viommud.vhost_user.ring import PACKED, SPLIT, Ring, RingFormat

REPEATS_LOGGED = 8
"""How often an event that a guest or front-end can repeat at will gets a line each time."""

_RESTART_LINES = {
    Verdict.RESET: "driver-starts-anew",
    Verdict.RESUME: "driver-continues",
}


def worth_a_line(count: int) -> bool:
    """Log the first few of a kind, then the 16th, the 32nd, ...: a peer cannot flood the log, and nothing is hidden."""
    return count <= REPEATS_LOGGED or count & (count - 1) == 0


@dataclass(frozen=True, slots=True)
class Environment:
    """What a ring depends on and does not own."""

    features: int
    """As acknowledged, with vhost-user's own bits."""
    memory: MemorySnapshot
    addresses_are_gpa: bool

    @property
    def format(self) -> RingFormat:
        """Split or packed."""
        return PACKED if self.features & 1 << F_RING_PACKED else SPLIT

    @property
    def driver_features(self) -> int:
        """What the guest's driver has negotiated."""
        return self.features & ~VHOST_USER_BITS

    @property
    def rings_need_enabling(self) -> bool:
        """Without PROTOCOL_FEATURES every ring counts as enabled (vhost-user.rst, ring states)."""
        return bool(self.features & 1 << F_PROTOCOL_FEATURES)


class Rings:
    """The rings, and what the session must remember between their runs."""

    def __init__(self, device: Device, log: FilteringBoundLogger) -> None:
        self._device = device
        self._log = log
        self._rings = [Ring(index) for index in range(device.num_queues)]
        self._features_of_run = 0
        self._config_was_read = False
        self.restarts: Counter[Verdict] = Counter()
        """How often the guest's driver ran its rings again, continuing or anew."""

    def __iter__(self) -> Iterator[Ring]:
        return iter(self._rings)

    def __getitem__(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise Refused(f"ring {index} does not exist, there are {len(self._rings)}")
        return self._rings[index]

    def stopped(self, index: int) -> Ring:
        """A ring that does not run.

        :raises Refused: it runs, or does not exist.
        """
        ring = self[index]
        if ring.running:
            raise Refused(f"ring {index} runs; GET_VRING_BASE stops it")
        return ring

    @property
    def running(self) -> bool:
        """Does the device run any ring?"""
        return any(ring.running for ring in self._rings)

    @property
    def suspended(self) -> bool:
        """Have rings run, and been stopped by GET_VRING_BASE, so that it is open what comes next?"""
        return not self.running and any(ring.returned is not None for ring in self._rings)

    def config_was_read(self) -> None:
        """GET_CONFIG came; a witness if it came while the rings were suspended."""
        if self.suspended:
            self._config_was_read = True

    def run_if_complete(self, ring: Ring, environment: Environment) -> None:
        """Run a ring as soon as it has every piece and is enabled.

        :raises Refused: it cannot run.  The caller takes back the piece that it just set, so that no ring is ever
            complete, enabled and stopped.
        """
        enabled = ring.enabled or not environment.rings_need_enabling
        if ring.running or not ring.complete or not enabled:
            return
        setup = self._setup(ring, environment)
        self._settle_restart(ring, environment)
        self._device.start_queue(ring.index, setup)
        ring.running = ring.has_run = True
        for known in self._rings:
            known.returned = None
        self._log.debug("ring-started", ring=ring.index, size=setup.size, base=setup.base)

    def stop(self, ring: Ring) -> None:
        """Stop a ring if it runs; it can run again from where it stopped."""
        if ring.running:
            ring.base = self._device.stop_queue(ring.index)
            ring.running = False
            self._log.debug("ring-stopped", ring=ring.index, base=ring.base)

    def disable(self) -> None:
        """Disable and stop every ring."""
        for ring in self._rings:
            ring.enabled = False
            self.stop(ring)

    def forget(self) -> None:
        """Stop every ring, and forget how they were configured and what they did: the device is being reset."""
        for ring in self._rings:
            self.stop(ring)
            ring.forget()
        self._config_was_read = False

    def _setup(self, ring: Ring, environment: Environment) -> QueueSetup:
        return ring.setup(
            environment.format,
            environment.memory,
            max_size=self._device.max_queue_size,
            addresses_are_gpa=environment.addresses_are_gpa,
        )

    def _settle_restart(self, starting: Ring, environment: Environment) -> None:
        """Before the first ring runs again: continue, or reset the device?"""
        if self.running:
            return
        verdict, reason = self._judge_restart(starting, environment)
        if verdict is Verdict.RESET:
            self._device.reset()
            for ring in self._rings:
                ring.forget_history()
        if reason:
            self.restarts[verdict] += 1
            if worth_a_line(self.restarts[verdict]):
                self._log.info(_RESTART_LINES[verdict], reason=reason, count=self.restarts[verdict])
        self._config_was_read = False
        self._features_of_run = environment.driver_features

    def _judge_restart(self, starting: Ring, environment: Environment) -> tuple[Verdict, str]:
        """The verdict and its reason; no reason where there is nothing to tell."""
        if not any(ring.has_run for ring in self._rings):
            return Verdict.RESUME, ""
        if environment.driver_features != self._features_of_run:
            return Verdict.RESET, "other features are negotiated"
        # Without PROTOCOL_FEATURES a ring runs before the front-end has spoken of the next one.
        known = [
            self._witness(ring, environment)
            for ring in self._rings
            if ring.returned is not None and (ring.base_is_new or ring is starting)
        ]
        if not known:
            return Verdict.RESUME, ""
        return judge(known, environment.format.initial_base, config_was_read=self._config_was_read)

    def _witness(self, ring: Ring, environment: Environment) -> StoppedRing:
        def looks_used() -> bool:
            try:
                return self._device.ring_looks_used(ring.index, self._setup(ring, environment))
            except Refused:
                return False

        assert ring.returned is not None
        base = environment.format.initial_base if ring.base is None else ring.base
        return StoppedRing(ring.returned, base, looks_used)
