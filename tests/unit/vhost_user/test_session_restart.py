"""A guest that was paused keeps everything; a guest that was reset starts from nothing.

QEMU does not say which it is, so these tests play what it sends (hw/virtio/vhost-user-base.c, vhost.c).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from frontend import wire

from unit.vhost_user.fake_device import CONFIG_SIZE, FEATURES, Harness

SPLIT = FEATURES & ~wire.F_RING_PACKED | wire.F_PROTOCOL_FEATURES
PACKED_BASE = wire.PACKED_INITIAL_BASE


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A session whose rings run for the first time."""
    with Harness() as harness:
        yield harness.ready().start()


def stop_after(harness: Harness, *processed: int) -> list[int]:
    """Stop rings that have got that far."""
    harness.device.processed = dict(enumerate(processed))
    return harness.stop()


def start_again(harness: Harness, *bases: int, features: int = SPLIT) -> None:
    """What QEMU sends before rings run again."""
    harness.grant(wire.SET_FEATURES, wire.u64(features))
    harness.start(*bases)


def restarts(harness: Harness) -> list[str]:
    """What was logged about it."""
    return [call.kwargs["reason"] for call in harness.lines if call.method_name == "info"]


def test_first_start_is_no_reset(harness: Harness) -> None:
    """There is nothing to forget, and nothing to say."""
    assert harness.device.resets == 0
    assert restarts(harness) == []


def test_pause_keeps_everything(harness: Harness) -> None:
    """QMP stop and cont: the bases come back."""
    bases = stop_after(harness, 100, 3)
    assert bases == [100, 3]
    start_again(harness, *bases)
    assert harness.device.resets == 0
    assert harness.device.running[0].base == 100


def test_pause_with_an_idle_event_queue(harness: Harness) -> None:
    """One ring at its beginning does not make a reset of a pause."""
    start_again(harness, *stop_after(harness, 100, 0))
    assert harness.device.resets == 0


def test_reset_forgets_everything(harness: Harness) -> None:
    """A driver that binds anew starts every ring from its beginning; the reset comes before the rings run."""
    stop_after(harness, 100, 3)
    start_again(harness, 0, 0)
    assert harness.device.resets == 1
    names = harness.device.names()
    assert names.index("reset") < names.index("start_queue", names.index("reset"))
    assert restarts(harness) == ["rings start from the beginning"]


def test_reset_is_decided_once(harness: Harness) -> None:
    """Not again for the second ring, nor when a ring is switched off and on later."""
    stop_after(harness, 100, 3)
    start_again(harness, 0, 0)
    for value in (0, 1):
        harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, value))
        harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(1, value))
    assert harness.device.resets == 1


def test_switching_rings_off_and_on_after_a_pause(harness: Harness) -> None:
    """What GET_VRING_BASE returned before the pause is of no account any more."""
    start_again(harness, *stop_after(harness, 100, 3))
    harness.device.processed = {0: 150, 1: 4}
    for value in (0, 1):
        for index in (0, 1):
            harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(index, value))
    assert harness.device.resets == 0
    assert harness.device.running[0].base == 150


def test_many_pauses_and_resets_in_turn(harness: Harness) -> None:
    """Each is judged by itself."""
    for round_ in range(1, 20):
        start_again(harness, *stop_after(harness, round_, 0))
        assert harness.device.resets == round_ - 1
        stop_after(harness, round_ + 7, 0)
        start_again(harness, 0, 0)
        assert harness.device.resets == round_


def test_restarts_do_not_flood_the_log(harness: Harness) -> None:
    """A guest can reset its device as often as it likes."""
    for _ in range(1000):
        stop_after(harness, 5, 0)
        start_again(harness, 0, 0)
    assert harness.device.resets == 1000
    assert len(restarts(harness)) == 8 + 6


def test_another_place_is_a_reset(harness: Harness) -> None:
    """Neither where it stopped nor the beginning: another driver's ring."""
    stop_after(harness, 100, 3)
    start_again(harness, 99, 3)
    assert harness.device.resets == 1


def test_other_features_are_a_reset(harness: Harness) -> None:
    """A paused driver has negotiated what it had; the switch for logging is not the driver's."""
    bases = stop_after(harness, 100, 3)
    start_again(harness, *bases, features=SPLIT | wire.F_LOG_ALL)
    assert harness.device.resets == 0
    bases = stop_after(harness, 101, 3)
    start_again(harness, *bases, features=wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES)
    assert harness.device.resets == 1


# Rings that stopped at the base of an unused ring


def test_nothing_was_processed(harness: Harness) -> None:
    """A reset loses nothing then."""
    start_again(harness, *stop_after(harness, 0, 0))
    assert harness.device.resets == 1


def test_counter_has_wrapped_and_the_guest_continues(harness: Harness) -> None:
    """65536 requests later the base is 0 again; the used ring in guest memory shows that it has been in service."""
    bases = stop_after(harness, 0, 0)
    harness.device.looks_used = True
    start_again(harness, *bases)
    assert harness.device.resets == 0
    assert restarts(harness) == ["ring counters wrapped: the rings in guest memory have been in service"]


def test_counter_has_wrapped_and_the_guest_was_reset(harness: Harness) -> None:
    """Its driver hands over zeroed rings."""
    bases = stop_after(harness, 0, 0)
    harness.device.looks_used = False
    start_again(harness, *bases)
    assert harness.device.resets == 1


def test_ring_memory_is_asked_only_where_the_bases_are_silent(harness: Harness) -> None:
    """Otherwise it may hold anything."""
    harness.device.looks_used = True
    stop_after(harness, 100, 3)
    start_again(harness, 0, 0)
    assert harness.device.resets == 1
    start_again(harness, *stop_after(harness, 5, 0))
    assert "ring_looks_used" not in harness.device.names()


def test_config_read_while_stopped_is_a_witness_of_a_reset(harness: Harness) -> None:
    """A paused guest reads nothing; a driver that binds reads its configuration."""
    bases = stop_after(harness, 0, 0)
    harness.device.looks_used = True
    harness.ask(wire.GET_CONFIG, wire.config(0, bytes(CONFIG_SIZE)))
    start_again(harness, *bases)
    assert harness.device.resets == 1


def test_config_read_alone_is_no_reset(harness: Harness) -> None:
    """QEMU reads the configuration for reasons of its own; the bases are the better witness."""
    bases = stop_after(harness, 100, 3)
    harness.ask(wire.GET_CONFIG, wire.config(0, bytes(CONFIG_SIZE)))
    start_again(harness, *bases)
    assert harness.device.resets == 0


def test_config_read_counts_for_one_restart_only(harness: Harness) -> None:
    """And not while rings run."""
    bases = stop_after(harness, 100, 3)
    harness.ask(wire.GET_CONFIG, wire.config(0, bytes(CONFIG_SIZE)))
    start_again(harness, *bases)
    harness.ask(wire.GET_CONFIG, wire.config(0, bytes(CONFIG_SIZE)))
    harness.device.looks_used = True
    start_again(harness, *stop_after(harness, 0, 0))
    assert harness.device.resets == 0


# Packed rings


@pytest.mark.parametrize(("stopped", "again", "resets"), [(0x800A_800A, 0x800A_800A, 0), (0x800A_800A, PACKED_BASE, 1)])
def test_packed_rings(stopped: int, again: int, resets: int) -> None:
    """The base of an unused packed ring has both wrap counters set."""
    with Harness() as harness:
        harness.ready(features=FEATURES).start(PACKED_BASE, PACKED_BASE)
        stop_after(harness, stopped, PACKED_BASE)
        start_again(harness, again, PACKED_BASE, features=FEATURES | wire.F_PROTOCOL_FEATURES)
        assert harness.device.resets == resets


def test_packed_base_0_is_not_the_beginning() -> None:
    """Slot 0 with the wrap counters clear is the second round, and comes back after a pause."""
    with Harness() as harness:
        harness.ready(features=FEATURES).start(PACKED_BASE, PACKED_BASE)
        start_again(harness, *stop_after(harness, 0, PACKED_BASE), features=FEATURES | wire.F_PROTOCOL_FEATURES)
        assert harness.device.resets == 0


# Without SET_VRING_ENABLE, where a ring runs before the next one is configured


@pytest.mark.parametrize(("bases", "resets"), [((100, 3), 0), ((0, 0), 1)])
def test_rings_that_start_one_by_one(bases: tuple[int, int], resets: int) -> None:
    """The first ring's base decides; what the second one had before does not count."""
    with Harness() as harness:
        harness.ready()
        harness.grant(wire.SET_FEATURES, wire.u64(wire.F_VERSION_1))
        harness.configure(0)
        harness.configure(1)
        harness.device.processed = {0: 100, 1: 3}
        for index in (0, 1):
            harness.ask(wire.GET_VRING_BASE, wire.vring_state(index))
        harness.configure(0, base=bases[0])
        harness.configure(1, base=bases[1])
        assert harness.device.resets == resets
        assert sorted(harness.device.running) == [0, 1]


def test_one_ring_restarts_beside_a_running_one(harness: Harness) -> None:
    """The driver is alive, so nothing is decided."""
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 0))
    harness.ask(wire.GET_VRING_BASE, wire.vring_state(0))
    harness.configure(0, base=0)
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert harness.device.resets == 0


def test_a_failed_start_does_not_hide_the_reset(harness: Harness) -> None:
    """The first attempt to run again fails; the second, from the beginning, is still a reset."""
    bases = stop_after(harness, 100, 3)
    harness.grant(wire.SET_FEATURES, wire.u64(SPLIT))
    for index in (0, 1):
        harness.configure(index, base=bases[index])
    harness.device.refuse = "start_queue"
    harness.refuse(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    harness.device.refuse = ""
    start_again(harness, 0, 0)
    assert harness.device.resets == 1


# Front-ends that say it


@pytest.mark.parametrize("how", [(wire.RESET_DEVICE, b""), (wire.SET_STATUS, wire.u64(0))])
def test_reset_while_rings_run(harness: Harness, how: tuple[int, bytes]) -> None:
    """RESET_DEVICE and status 0: rings stop and are unconfigured, the device is reset once."""
    harness.grant(*how)
    assert not harness.device.running
    assert harness.device.resets == 1
    assert len(harness.device.memory) == 1
    harness.grant(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    assert not harness.device.running
    start_again(harness, 0, 0)
    assert harness.device.resets == 1
    assert sorted(harness.device.running) == [0, 1]


def test_status_0_after_a_stop_waits_for_the_bases(harness: Harness) -> None:
    """QEMU's vhost_dev_stop() writes status 0 for a paused guest, too."""
    bases = stop_after(harness, 100, 3)
    harness.grant(wire.SET_STATUS, wire.u64(0))
    assert harness.device.resets == 0
    start_again(harness, *bases)
    assert harness.device.resets == 0
    stop_after(harness, 101, 3)
    harness.grant(wire.SET_STATUS, wire.u64(0))
    start_again(harness, 0, 0)
    assert harness.device.resets == 1
