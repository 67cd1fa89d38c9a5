"""The vfio-user server under clients that are wrong, rude or gone, and its options for misbehaviour."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from devices.client import (
    CONFIG,
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    REGION_READ,
    REPLY,
    SET_IRQS,
    Client,
    RefusedError,
    shared_memory,
)
from devices.process import Device


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Device]:
    """A running DMA engine, the smallest device there is."""
    with Device("dma_engine", tmp_path / "engine.sock") as device:
        yield device


def descriptors(device: Device) -> int:
    """How many descriptors the process holds."""
    return len(os.listdir(f"/proc/{device.pid}/fd"))


def test_a_client_that_goes_away_leaves_nothing_behind(engine: Device) -> None:
    """Mappings, interrupts and register state of a client end with its connection; the next one starts afresh."""
    before = descriptors(engine)
    for _ in range(3):
        with shared_memory(0x1000) as (fd, _), Client(engine.socket) as client:
            client.version()
            client.bus_master()
            client.dma_map(0x1000, 0x1000, fd)
            irq = os.eventfd(0)
            client.set_irqs(0x24, 2, 0, 1, [irq])
            os.close(irq)
            client.write(4, 7)
    with Client(engine.socket) as client:
        client.version()
        assert client.read(4) == 0
        assert client.read(4, 2, CONFIG) == 0
        with pytest.raises(RefusedError) as refused:
            client.dma_unmap(0x1000, 0x1000)
        assert refused.value.errno == errno.ENOENT
        assert descriptors(engine) == before + 1
    assert engine.stop()["clients"] == 4


def test_version_comes_first_and_must_be_0_0(engine: Device) -> None:
    """Nothing is served before VERSION; a major version other than 0 is refused."""
    with Client(engine.socket) as client:
        with pytest.raises(RefusedError):
            client.read(0)
        with pytest.raises(RefusedError):
            client.request(1, struct.pack("<HH", 1, 0))
        assert client.version()["max_data_xfer_size"] == 1 << 20


def test_overlap_and_partial_unmap(engine: Device) -> None:
    """DMA_MAP may not overlap; DMA_UNMAP takes whole mappings, several at once, and all of them with its flag."""
    with Client(engine.socket) as client:
        client.version()
        for iova in (0x1000, 0x2000, 0x3000):
            client.dma_map(iova, 0x1000)
        client.dma_map((1 << 64) - 0x1000, 0x1000)
        for call, number in (
            (partial(client.dma_map, 0x2800, 0x10), errno.EEXIST),
            (partial(client.dma_map, 0x4000, 0), errno.EINVAL),
            (partial(client.dma_map, (1 << 64) - 0x1000, 0x2000), errno.EINVAL),
            (partial(client.dma_unmap, 0x1000, 0x1800), errno.EINVAL),
            (partial(client.dma_unmap, 0x9000, 0x1000), errno.ENOENT),
        ):
            with pytest.raises(RefusedError) as refused:
                call()
            assert refused.value.errno == number
        client.dma_unmap(0x1000, 0x2000)
        client.dma_map(0x1000, 0x2000)
        client.dma_unmap(0, 0, flags=2)
        client.dma_map(0, 0x100000)
    assert engine.stop()["reachable_peak_bytes"] == 0x100000


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(HEADER.pack(1, 4, 15, 0, 0), id="size below the header"),
        pytest.param(HEADER.pack(1, 4, 1 << 31, 0, 0), id="size of 2 GiB"),
        pytest.param(HEADER.pack(1, 11, 16, REPLY, 0), id="reply to nothing"),
        pytest.param(HEADER.pack(1, 4, 16, 7, 0), id="neither request nor reply"),
    ],
)
def test_a_broken_stream_ends_the_connection_only(engine: Device, message: bytes) -> None:
    """What cannot be a message ends the connection; the server serves the next client."""
    with Client(engine.socket) as client:
        client.version()
        client.send_raw(message)
        with pytest.raises(ConnectionResetError):
            client.receive_raw(1)
    with Client(engine.socket) as client:
        client.version()
        assert client.read(0) == 0x010000ED


@pytest.mark.parametrize(
    ("command", "payload", "fds"),
    [
        (DMA_MAP, b"", 0),
        (DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0x1000, 0x1000), 2),
        (DMA_MAP, struct.pack("<IIQQQ", 32, 3, 1, 0x1000, 0x1000), 1),
        (DMA_UNMAP, bytes(8), 0),
        (REGION_READ, struct.pack("<QII", 0x4000, 0, 4), 0),
        (REGION_READ, struct.pack("<QII", 0, 9, 4), 0),
        (REGION_READ, struct.pack("<QII", 2**64 - 2, 7, 4), 0),
        (SET_IRQS, struct.pack("<IIIII", 20, 0x24, 2, 0, 2), 2),
        (SET_IRQS, struct.pack("<IIIII", 20, 0x24, 9, 0, 1), 1),
        (14, b"", 0),
        (0xFFFF, b"", 0),
    ],
)
def test_a_bad_request_is_refused_and_keeps_no_descriptor(
    engine: Device, command: int, payload: bytes, fds: int
) -> None:
    """An error reply, the descriptors that came along closed, and the connection goes on."""
    with shared_memory(0x1000) as (fd, _), Client(engine.socket) as client:
        client.version()
        before = descriptors(engine)
        with pytest.raises(RefusedError):
            client.request(command, payload, [fd] * fds)
        assert client.read(0) == 0x010000ED
        assert descriptors(engine) == before


def test_mute_answers_nothing(tmp_path: Path) -> None:
    """With --mute not even VERSION is answered, and the connection stays."""
    with (
        Device("dma_engine", tmp_path / "s", "--mute") as engine,
        Client(engine.socket, patience=0.2) as client,
        pytest.raises(TimeoutError),
    ):
        client.version()


def test_no_unmap_reply(tmp_path: Path) -> None:
    """With --no-unmap-reply everything else is answered."""
    with Device("dma_engine", tmp_path / "s", "--no-unmap-reply") as engine, Client(engine.socket) as client:
        client.version()
        client.dma_map(0x1000, 0x1000)
        client.send(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x1000, 0x1000))
        assert client.read(0) == 0x010000ED
        client.dma_map(0x1000, 0x1000)


def test_once_ends_with_its_client(tmp_path: Path) -> None:
    """With --once the program ends when the first client has gone, with status 0 and its summary."""
    with Device("dma_engine", tmp_path / "s", "--once") as engine:
        with Client(engine.socket) as client:
            client.version()
        assert engine.wait() == 0
        assert engine.wait_event("summary")["clients"] == 1


def test_function_level_reset(engine: Device) -> None:
    """The bit in PCI Express Device Control resets registers and configuration, and reads as 0."""
    with Client(engine.socket) as client:
        client.version()
        client.bus_master()
        client.write(4, 7)
        client.write(0x48, 0x8000, 2, CONFIG)
        assert client.read(4) == 0
        assert client.read(4, 2, CONFIG) == 0
        assert client.read(0x48, 2, CONFIG) == 0
