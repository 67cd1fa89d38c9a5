"""Configuration change notices: how a front-end is told to look at the device again.

VIRTIO 1.3, 2.1.2: a device that sets DEVICE_NEEDS_RESET while its driver runs sends one.  QEMU 11.1's generic
vhost-user device crashes when a notice arrives while the driver does not run (hw/virtio/vhost.c: dev->vdev is NULL
then), and a guest can stop its driver at any moment; so they are sent only where the user asks for them.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.transport import BackendChannel, PeerGoneError


class ConfigNotices:
    """Sends one notice for each reason that has come up, over the channel that the front-end gave last."""

    def __init__(self, needed: Callable[[], bool], on_failure: Callable[[str], None]) -> None:
        """When a reason comes up, needed says at the moment of sending whether it still stands."""
        self._needed = needed
        self._on_failure = on_failure
        self._channel: BackendChannel | None = None
        self._wanted = trio.Event()

    def adopt(self, channel: BackendChannel) -> None:
        """The front-end's channel from now on; whoever received it closes it."""
        self._channel = channel

    def want(self) -> None:
        """A reason has come up."""
        self._wanted.set()

    async def run(self) -> None:
        """Send notices until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            channel = self._channel
            if channel is None or not self._needed():
                continue
            try:
                if not await channel.config_changed():
                    self._on_failure("the front-end answered that it failed")
            except RemoteProtocolError as error:
                self._give_up(channel, error.sentence)
            except (PeerGoneError, trio.ClosedResourceError, OSError) as error:
                self._give_up(channel, str(error) or "the channel is closed")

    def _give_up(self, channel: BackendChannel, reason: str) -> None:
        """What is broken is not used again."""
        if self._channel is channel:
            self._channel = None
        self._on_failure(reason)
