"""What is agreed on: the least of all for what passes through, limits of its own for each side."""

from __future__ import annotations

import pytest

from viommud.vfio_user.agreement import Limits, agree, offer
from viommud.vfio_user.messages import Capabilities, Version, VfioUserError

GRANULE = 4096


def test_the_least_of_three() -> None:
    """Descriptors, data and batched writes are limited by client, viommud and server alike."""
    offered = offer(Version(0, 1, Capabilities(100, 1 << 30, 65535, 4096, True)), GRANULE)
    assert offered == Capabilities(64, 1 << 20, 65535, 4096, True)
    told, limits = agree(offered, Version(0, 0, Capabilities(8, 65536, 500, 4096, False)), GRANULE)
    assert told == Capabilities(8, 65536, 1024, 4096, False)
    assert limits == Limits(max_fds=8, max_dma_maps=500, max_transfer=65536)


def test_a_small_client_limits_the_server() -> None:
    """What the client cannot take, the server is not told of."""
    offered = offer(Version(0, 0, Capabilities(2, 8192, 10, 4096, False)), GRANULE)
    assert offered == Capabilities(2, 8192, 65535, 4096, False)
    _, limits = agree(offered, Version(0, 0, Capabilities(16, 1 << 20, 1 << 40, 4096, True)), GRANULE)
    assert limits == Limits(max_fds=2, max_dma_maps=(1 << 32) - 1, max_transfer=8192)


@pytest.mark.parametrize(
    "client",
    [
        Version(1, 0, Capabilities()),
        Version(0, 0, Capabilities(max_msg_fds=0)),
        Version(0, 0, Capabilities(max_data_xfer_size=4095)),
        Version(0, 0, Capabilities(pgsizes=-1)),
    ],
)
def test_clients_that_cannot_be_served(client: Version) -> None:
    """Another major version, or less than a message needs."""
    with pytest.raises(VfioUserError):
        offer(client, GRANULE)


@pytest.mark.parametrize(
    "server",
    [
        Version(0, 1, Capabilities()),
        Version(1, 0, Capabilities()),
        Version(0, 0, Capabilities(max_msg_fds=-1)),
        Version(0, 0, Capabilities(max_data_xfer_size=0)),
        Version(0, 0, Capabilities(max_dma_maps=0)),
        Version(0, 0, Capabilities(pgsizes=0)),
        Version(0, 0, Capabilities(pgsizes=65536)),
    ],
)
def test_servers_that_cannot_be_used(server: Version) -> None:
    """A version that was not offered, nothing to map, or pages larger than the guest's."""
    with pytest.raises(VfioUserError):
        agree(offer(Version(0, 0, Capabilities()), GRANULE), server, GRANULE)
