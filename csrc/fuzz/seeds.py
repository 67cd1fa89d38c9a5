#!/usr/bin/env python3
"""Inputs to start the fuzzers of the C engine from: seeds.py TARGET DIRECTORY.

Each is what a test does, in the instructions of its target: a guest that attaches, maps, is served and leaves.  From
nothing, the fuzzers take minutes to find such sequences.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ATTACH, DETACH, MAP, UNMAP, PROBE = 1, 2, 3, 4, 5
NEXT, WRITE, INDIRECT = 1, 2, 4


def iova_map() -> Iterator[bytes]:
    """Mappings in order, backwards and at random, then removed."""
    for seed in range(4):
        pick = random.Random(seed)  # noqa: S311 - the same in every run
        runs = [(2, 64, 0, 4), (3, 64, 0x4000, 2), (4, 3, 0, 0), (6, 200, 0, 4), (5, 255, 0, 255)]
        single = [(pick.randrange(2), pick.randrange(16), pick.randrange(0x1000), 0) for _ in range(100)]
        yield b"".join(
            struct.pack("=BBHBBBB", code | seed << 6, length, at, step, 0, 3, index % 8)
            for index, (code, length, at, step) in enumerate(runs[: seed + 1] + single + runs)
        )


def _ask(
    code: int,
    *,
    domain: int = 3,
    endpoint: int = 0,
    flags: int = 0,
    room: int = 0,
    cut: int = 0,
    first: int = 0,
    pages: int = 0,
    phys: int = 0,
    bytes_: int = 0,
    check: int = 0,
) -> bytes:
    fields = (code, 0, room, cut, domain, endpoint, flags, 0, 0, 0, first, pages, phys, bytes_, check)
    return struct.pack("=BbBBBBBBBBHHHHH", *fields)


def request() -> Iterator[bytes]:
    """The life of a domain, in each personality and several shapes of the device."""
    for personality in range(3):
        for shape in (0, 1, 4):
            for cut in (0, 1, 255):
                yield bytes((personality, 2 * (shape & 1), shape, 2)) + b"".join(
                    (
                        _ask(PROBE, endpoint=8, room=4, cut=cut),
                        _ask(ATTACH, endpoint=1, cut=cut),
                        _ask(ATTACH, endpoint=8, check=1),
                        _ask(MAP, first=32, pages=16, flags=3, cut=cut),
                        _ask(MAP, first=48, pages=16, phys=16, flags=1),
                        _ask(MAP, first=40, pages=16, phys=16, flags=1),
                        _ask(0x42, endpoint=1, first=33, bytes_=5, flags=1),
                        _ask(ATTACH, endpoint=2, domain=4, flags=1),
                        _ask(0x42, endpoint=2, first=33, flags=2),
                        _ask(UNMAP, first=32, pages=8),
                        _ask(UNMAP, first=32, pages=32, check=1),
                        _ask(DETACH, endpoint=1),
                        _ask(0x41, flags=1),
                        _ask(0x42, endpoint=1, first=33, flags=1),
                        _ask(0x40),
                    )
                )


def _ring(code: int, index: int = 0, flags: int = 0, addr: int = 0, length: int = 0, other: int = 0) -> bytes:
    return struct.pack("=BBHIHHI", code, index, flags, addr, length, other, 0)


def _rings(heads: tuple[int, int]) -> Iterator[bytes]:
    """Chains, direct and indirect, served one by one and in batches; stopping and going on between."""
    first, second = heads
    offset = 256  # what an address begins at in the image
    chain = (
        _ring(3, second, WRITE, offset + 0x3000, 64, 1)
        + _ring(2, first, NEXT, offset + 0x2800, 36, 1)
        + _ring(4, length=64, other=0)
    )
    table = _ring(1, 0, NEXT, offset + 0x2800, 20, 1) + _ring(1, 1, WRITE, offset + 0x3000, 4, 0)
    indirect = table + _ring(2, first, INDIRECT, 0, 2, 5) + _ring(12, length=4)
    for features in range(8):
        for size in (1, 3, 7, 63):
            yield (
                struct.pack("=BBHHH", size, features, 0, 0, 0)
                + chain * 3
                + _ring(6, other=1)
                + indirect * 2
                + _ring(4, length=4)
                + _ring(7)
                + chain * size
                + _ring(6)
            )


def split_ring() -> Iterator[bytes]:
    """With heads that are indices in the ring."""
    return _rings((0, 1))


def packed_ring() -> Iterator[bytes]:
    """With heads counted from the next descriptor on."""
    return _rings((0, 1))


def _say(
    code: int,
    *,
    by: int = 0,
    command: int = 0,
    ident: int = 0,
    flags: int = 0,
    fds: int = 0,
    access: int = 0,
    address: int = 0,
    pages: int = 0,
    offset: int = 0,
    bytes_: int = 0,
    cut: int = 0,
    far: int = 0,
) -> bytes:
    fields = (code, command, ident, flags, fds, 0, access, address, pages, offset, bytes_, cut, 0, by, far, 0)
    return struct.pack("=BBHBBbBHHHHBBBBI", *fields)


def vfio_user() -> Iterator[bytes]:
    """A client shares memory, a guest maps it, a server reaches it, and all of it goes again."""
    answer = _say(5, far=0x40)
    share = _say(2, command=0, ident=1, fds=1, access=3, pages=16) + answer
    unshare = _say(2, command=1, ident=2, pages=16) + answer
    dma = _say(3, command=1, ident=9, address=8, pages=100) + _say(3, command=0, ident=9, address=8, pages=100, cut=20)
    registers = _say(0, command=9, ident=3, bytes_=16) + answer + _say(0, command=10, ident=4, flags=0x10, bytes_=24)
    irqs = _say(0, command=8, ident=5, fds=0x11, bytes_=20) + answer + _say(0, command=5, ident=6) + answer
    mapped = _say(10, ident=0, address=8, pages=1, offset=2, access=2) + answer
    unmapped = _say(12, ident=0, address=8, pages=4) + answer
    for strict in (0, 1):
        for direct in (b"", _say(0, command=5, ident=7) + _say(5, fds=0x11)):
            head = struct.pack("=BBBB", strict, 100, 9, 8)
            domain = share + direct + _say(9, ident=1) + mapped
            deaf, shrunk = _say(14, flags=3), _say(2, command=0, ident=1, fds=0x21, access=3, pages=1)
            yield head + domain + deaf + (dma + registers + mapped) * 8 + _say(14) + dma + registers
            yield head + shrunk + answer + _say(9, ident=4) + answer + _say(14, by=0xDD) + _say(3, address=0, pages=100)
            yield head + domain + dma + registers + irqs + unmapped + unshare
            yield head + domain + _say(2, command=1, ident=2, pages=16) + _say(13, bytes_=0xFFFF, far=24) + registers
            yield head + domain + _say(12, ident=0, address=8, pages=4) + _say(13, bytes_=0xFFFF, far=24) + share
            yield head + _say(9, ident=4) + share + dma + _say(9, ident=0) + answer + unshare
            yield head + mapped + _say(9, ident=1) + share + dma + _say(9, ident=2) + answer + _say(9, ident=1) + answer


SEEDS = {
    "iova_map": iova_map,
    "request": request,
    "split_ring": split_ring,
    "packed_ring": packed_ring,
    "vfio_user": vfio_user,
}


def write(directory: Path, seeds: Iterable[bytes]) -> None:
    """Write each seed to a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (directory / f"seed-{number:03}").write_bytes(seed)


if __name__ == "__main__":
    write(Path(sys.argv[2]), SEEDS[sys.argv[1]]())
