"""Did the guest only pause, or did it reset the device?

QEMU's generic vhost-user device says neither.  A guest's device reset, a system reset, QMP stop and quitting all
look the same: SET_VRING_ENABLE 0 and GET_VRING_BASE for every ring.  Only what follows tells them apart.  When a
paused guest continues, SET_VRING_BASE repeats what GET_VRING_BASE returned (hw/virtio/vhost.c restores
last_avail_idx); after a reset every base is that of an unused ring (virtio_reset() cleared it).

What cannot be told apart by the bases is a ring that had returned the base of an unused ring: either it processed
nothing, and then a reset loses nothing, or its counter has wrapped around (a split ring's after a multiple of 65536
requests, a packed ring's after two rounds).  Then two more witnesses are asked, in this order:

- the front-end read configuration space while all rings were stopped: the guest's processors ran, so it was not
  paused; drivers read the configuration when they bind.  This alone says nothing when the bases are clear, because
  QEMU also reads the configuration for reasons of its own;
- the used ring in guest memory: drivers hand over zeroed rings, so an entry with a length is from before the stop,
  and the driver that wrote the ring is still there.

Without a witness for either it is a reset: the harmless answer for a ring that has processed nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass


class Verdict(enum.Enum):
    """What the device must do before its rings run again."""

    RESUME = "resume"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class StoppedRing:
    """A ring that ran, was stopped by GET_VRING_BASE, and is about to run again."""

    returned: int
    """The base that GET_VRING_BASE returned."""
    base: int
    """The base it is to start from."""
    looks_used: Callable[[], bool]
    """Ask guest memory whether the ring has been in service."""


def judge(rings: Iterable[StoppedRing], initial_base: int, *, config_was_read: bool) -> tuple[Verdict, str]:
    """Decide from every ring whose new base is known; at least one.

    :param initial_base: of a ring that has never run, in this ring format.
    :param config_was_read: GET_CONFIG came while all rings were stopped.
    :returns: the verdict and its reason, for the log.
    """
    known = list(rings)
    unchanged = all(ring.base == ring.returned for ring in known)
    initial = all(ring.base == initial_base for ring in known)
    if unchanged and not initial:
        return Verdict.RESUME, "rings continue where they stopped"
    if not unchanged:
        return Verdict.RESET, "rings start from the beginning" if initial else "rings start from another place"
    if config_was_read:
        return Verdict.RESET, "configuration was read while all rings were stopped"
    if any(ring.looks_used() for ring in known):
        return Verdict.RESUME, "ring counters wrapped: the rings in guest memory have been in service"
    return Verdict.RESET, "no ring has been in service"
