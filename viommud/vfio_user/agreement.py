"""What client, viommud and server agree on, from the VERSION messages of the two peers.

What passes through is limited by the least of the three: descriptors and data in one message, batched register
writes.  DMA mappings do not pass through: a client shares memory with viommud, a server is told mappings by viommud,
so each hears a limit of its own.  Migration is not offered: it would have to know of the mappings.
"""

from __future__ import annotations

from dataclasses import dataclass

from viommud.vfio_user.messages import (
    MAX_FDS,
    MAX_TRANSFER,
    MIN_TRANSFER,
    OWN_DMA_MAPS,
    Capabilities,
    Version,
    VfioUserError,
)

_U32_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What the relay keeps to; mirrors struct viommu_vfio_user_limits."""

    max_fds: int
    max_dma_maps: int
    max_transfer: int


def offer(client: Version, granule: int) -> Capabilities:
    """What the server is told that its client can do.

    :param granule: bytes, the smallest mapping that the guest may make.
    :raises VfioUserError: the client cannot be worked with.
    """
    if client.major != 0:
        raise VfioUserError(f"the client speaks version {client.major}.{client.minor}, not 0.x")
    theirs = client.capabilities
    _check(theirs, "client")
    return Capabilities(
        max_msg_fds=min(theirs.max_msg_fds, MAX_FDS),
        max_data_xfer_size=min(theirs.max_data_xfer_size, MAX_TRANSFER),
        max_dma_maps=65535,
        pgsizes=granule,
        write_multiple=theirs.write_multiple,
    )


def agree(offered: Capabilities, server: Version, granule: int) -> tuple[Capabilities, Limits]:
    """What the client is told that its server can do, and what the relay keeps to.

    :raises VfioUserError: the server cannot be worked with.
    """
    if (server.major, server.minor) != (0, 0):
        raise VfioUserError(f"the server answers with version {server.major}.{server.minor} to 0.0")
    theirs = server.capabilities
    _check(theirs, "server")
    if theirs.max_dma_maps < 1:
        raise VfioUserError("the server keeps no DMA mapping")
    if theirs.pgsizes & -theirs.pgsizes > granule:
        raise VfioUserError(
            f"the server maps pages of {theirs.pgsizes & -theirs.pgsizes} bytes, the guest of {granule}",
            hint="a larger device.granule would do",
        )
    fds = min(offered.max_msg_fds, theirs.max_msg_fds)
    transfer = min(offered.max_data_xfer_size, theirs.max_data_xfer_size)
    told = Capabilities(
        max_msg_fds=fds,
        max_data_xfer_size=transfer,
        max_dma_maps=OWN_DMA_MAPS,
        pgsizes=4096,
        write_multiple=offered.write_multiple and theirs.write_multiple,
    )
    return told, Limits(fds, min(theirs.max_dma_maps, _U32_MAX), transfer)


def _check(capabilities: Capabilities, who: str) -> None:
    if capabilities.max_msg_fds < 1:
        raise VfioUserError(f"the {who} takes no file descriptor (max_msg_fds {capabilities.max_msg_fds})")
    if capabilities.max_data_xfer_size < MIN_TRANSFER:
        raise VfioUserError(
            f"the {who} takes {capabilities.max_data_xfer_size} bytes of data in a message; {MIN_TRANSFER} are needed"
        )
    if capabilities.pgsizes < 1:
        raise VfioUserError(f"the {who} has no page size (pgsizes {capabilities.pgsizes})")
