"""Long random runs, status by status and mapping by mapping against the model."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from frontend import iommu
from frontend.guest import POISON, Guest
from frontend.ring import Buffer

from conformance.backend import (
    CONFIG,
    ENDPOINT,
    GUARDED,
    HOLE_FIRST,
    HOLE_LAST,
    MSI_FIRST,
    MSI_LAST,
    NOBODY,
    PAGE,
    RAM,
    SIBLING,
    U64,
    Backend,
)
from conformance.conftest import MakeBackend
from conformance.model import Limits, Model

BATCH = 128
PROBE_ROOM = 512 + iommu.TAIL
LIMITS = "[limits]\ndomains = 2\nmappings = 12\nmappings-per-domain = 8\n"
ENDPOINTS = (ENDPOINT, SIBLING, GUARDED)
REGIONS = [(MSI_FIRST, MSI_LAST), (HOLE_FIRST, HOLE_LAST)]


def model_of(guest: Guest) -> Model:
    """The model of the configuration that the runs use."""
    return Model(
        endpoints={ENDPOINT: [], SIBLING: [], GUARDED: REGIONS},
        memory=[(ram.gpa, ram.gpa + ram.size - 1) for ram in guest.memory.rams],
        limits=Limits(domains=2, mappings=12, mappings_per_domain=8),
        mmio=bool(guest.features & iommu.F_MMIO),
        bypass_config=bool(guest.features & iommu.F_BYPASS_CONFIG),
    )


class Requests:
    """Requests as a careless driver might make them: most are nearly right, few addresses, many meetings."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Readable part and size of the writable part, for ever."""
        rng = self._random
        while True:
            roll = rng.random()
            if roll < 0.50:
                body, room = self._map(), iommu.TAIL
            elif roll < 0.80:
                body, room = self._unmap(), iommu.TAIL
            elif roll < 0.90:
                body, room = self._attach(), iommu.TAIL
            elif roll < 0.96:
                body, room = iommu.detach(self._domain(), self._endpoint()), iommu.TAIL
            elif roll < 0.985:
                body, room = iommu.probe(self._endpoint()), rng.choice((PROBE_ROOM, PROBE_ROOM, PROBE_ROOM - 1, 40))
            else:
                body, room = self._garbage()
            if rng.random() < 0.01:
                body = body[: rng.randrange(1, len(body) + 1)]
            if rng.random() < 0.01:
                room = rng.choice((0, 1, 3, 5, 64))
            yield body, room

    def _domain(self) -> int:
        return self._random.choice((0, 1, 2, 3, 4, 5, 1, 2, 3))

    def _endpoint(self) -> int:
        return self._random.choice((*ENDPOINTS, *ENDPOINTS, *ENDPOINTS, NOBODY))

    def _range(self) -> tuple[int, int]:
        rng = self._random
        base = rng.choice((0, 0, 0, 0, MSI_FIRST, HOLE_LAST + 1 - 4 * PAGE, U64 + 1 - 40 * PAGE))
        first = base + rng.randrange(40) * PAGE
        last = first + rng.choice((1, 1, 1, 2, 3, 8)) * PAGE - 1
        if rng.random() < 0.02:
            first ^= rng.choice((1, 0x800, PAGE - 1))
        if rng.random() < 0.02:
            last ^= rng.choice((1, 0x800, PAGE - 1, 1 << 63))
        if rng.random() < 0.01:
            first, last = rng.choice(((0, U64), (last & U64, first), (U64, U64), (0, 0)))
        return first & U64, last & U64

    def _map(self) -> bytes:
        rng = self._random
        phys = RAM + rng.randrange(64) * PAGE
        if rng.random() < 0.05:
            phys = rng.choice((0, RAM - PAGE, RAM + (4 << 20), U64 - PAGE + 1, RAM + 1, RAM - 2 * PAGE))
        flags = 3 if rng.random() < 0.8 else rng.choice((0, 1, 2, 4, 5, 6, 7, 8, 1 << 31))
        return iommu.map_(self._domain(), *self._range(), phys, flags=flags)

    def _unmap(self) -> bytes:
        rng = self._random
        first, last = self._range()
        if rng.random() < 0.15:
            first, last = rng.choice(((0, 40 * PAGE - 1), (0, U64), (first & ~0xFFFF, last | 0xFFFF)))
        return iommu.unmap(self._domain(), first, last, reserved=rng.choice((bytes(4), bytes(4), b"\1\2\3\4")))

    def _attach(self) -> bytes:
        rng = self._random
        flags = rng.choice((0, 0, 0, 0, 0, 0, 1, 1, 2, 1 << 31))
        reserved = b"\0\0\0\1" if rng.random() < 0.02 else bytes(4)
        return iommu.attach(self._domain(), self._endpoint(), flags=flags, reserved=reserved)

    def _garbage(self) -> tuple[bytes, int]:
        rng = self._random
        return rng.randbytes(rng.randrange(1, 80)), rng.choice((4, 4, 8, PROBE_ROOM))


class Player:
    """Plays requests through the ring, as many at once as its buffers allow."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._buffers = [(guest.memory.allocate(96), guest.memory.allocate(PROBE_ROOM)) for _ in range(BATCH)]
        self._poison = bytes([POISON]) * PROBE_ROOM

    def play(self, batch: list[tuple[bytes, int]]) -> list[int | None]:
        """Statuses; None: unanswered and untouched.  Every byte of every answer is looked at."""
        memory, ring = self.guest.memory, self.guest.rings[0]
        for (readable, writable), (source, target) in zip(batch, self._buffers, strict=False):
            memory.write(source, readable)
            memory.write(target, self._poison[:writable])
            chain = [Buffer(source, len(readable))]
            if writable:
                chain.append(Buffer(target, writable, writable=True))
            ring.add(chain)
        ring.publish()
        if ring.kick_is_wanted():
            ring.kick()
        answers: list[int | None] = []
        for (readable, writable), (_, target), used in zip(batch, self._buffers, ring.wait(len(batch)), strict=False):
            data = memory.read(target, writable)
            if used.length == 0:
                assert data == self._poison[:writable], f"an unanswered buffer was written: {readable.hex()}"
                answers.append(None)
                continue
            assert used.length == writable, f"used length {used.length} of {writable}: {readable.hex()}"
            status, reserved = struct.unpack("<B3s", data[-iommu.TAIL :])
            assert reserved == bytes(3)
            if readable[0] != iommu.PROBE or status != iommu.OK:
                assert not any(data[: -iommu.TAIL])
            answers.append(status)
        return answers


def same_state(backend: Backend, model: Model) -> None:
    """Domains, mappings, attachments and translations are the model's."""
    assert backend.domains() == sorted(model.domains)
    for number, domain in model.domains.items():
        found = backend.mappings(number) or []
        expected = sorted(domain.mappings, key=lambda mapping: mapping.first)
        assert [(m.first, m.last, m.phys, m.flags) for m in found] == [
            (m.first, m.last, m.phys, m.flags) for m in expected
        ]
    edges = model.interesting(model.domains)
    for endpoint in ENDPOINTS:
        assert backend.domain_of(endpoint) == model.attached.get(endpoint)
        for iova in edges[:: max(1, len(edges) // 64)]:
            for access in (iommu.READ, iommu.WRITE):
                assert backend.translate(endpoint, iova, access) == model.translate(endpoint, iova, access)


@pytest.mark.rule("R-OPS-1", "R-ATTACH-7", "R-MAP-4", "R-UNMAP-5", "R-UNMAP-6", "R-DETACH-5", "R-OPS-7")
@pytest.mark.parametrize(
    ("packed", "without", "count", "seed"),
    [
        (False, 0, 102_400, 20241),
        (True, 0, 25_600, 20242),
        (False, iommu.F_MMIO, 12_800, 20243),
        (True, iommu.F_BYPASS_CONFIG, 12_800, 20244),
    ],
    ids=["split", "packed", "without MMIO", "without BYPASS_CONFIG"],
)
def test_random_requests(make_backend: MakeBackend, packed: bool, without: int, count: int, seed: int) -> None:
    """Every status and every answered byte, through one ring that is paused, continued and reset on the way."""
    backend = make_backend(CONFIG + LIMITS)
    features = backend.features(packed=packed, without=without)
    with backend.guest(features=features, queue_size=1024) as guest:
        model, player, requests = model_of(guest), Player(guest), iter(Requests(seed))
        seen: dict[int | None, int] = {}
        for number in range(count // BATCH):
            batch = [next(requests) for _ in range(BATCH)]
            answers = player.play(batch)
            for (readable, writable), status in zip(batch, answers, strict=True):
                expected = model.serve(readable, writable)
                assert status == expected, f"seed {seed}, batch {number}: {readable.hex()} with {writable}"
                seen[status] = seen.get(status, 0) + 1
            if number % 40 == 39:
                same_state(backend, model)
            if number % 100 == 60:
                guest.pause_and_continue()
            if number % 100 == 99:
                guest.reset_and_start()
                model.reset()
        same_state(backend, model)
        refusals = {iommu.UNSUPP, iommu.INVAL, iommu.RANGE, iommu.NOENT, iommu.NOMEM, iommu.FAULT, None}
        if without:
            refusals -= {iommu.FAULT, iommu.UNSUPP}
        assert refusals | {iommu.OK} <= set(seen), "the run must meet every status"
        assert seen[iommu.OK] > count // 8


@pytest.mark.rule("R-Q-USED-1", "R-Q-FRAME")
def test_more_requests_than_an_index_counts(backend: Backend) -> None:
    """More than 65 536 through one ring without a stop: indices wrap, nothing else changes."""
    with backend.guest(features=backend.features(), queue_size=256) as guest:
        ring, memory = guest.rings[0], guest.memory
        assert guest.attach(1, ENDPOINT) == iommu.OK
        body, tail = memory.allocate(36), memory.allocate(4)
        memory.write(body, iommu.unmap(1, 0, PAGE - 1))
        chain = [Buffer(body, 28), Buffer(tail, 4, writable=True)]
        for _ in range(66_000 // 120):
            for _ in range(120):
                ring.add(chain)
            ring.publish()
            if ring.kick_is_wanted():
                ring.kick()
            assert {used.length for used in ring.wait(120)} == {4}
        assert memory.read(tail, 4) == bytes(4)
        assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
