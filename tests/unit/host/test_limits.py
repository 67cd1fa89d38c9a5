"""What the host's IOMMU can do narrows what the guest is told, and nothing is told twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommud.config import parse
from viommud.device_setup import RESV_MEM_BYTES, DeviceSetup, plan
from viommud.errors import UsageError
from viommud.host.limits import apply, holes, reserve
from viommud.host.uapi import IovaRanges
from viommud.settings import Reserved, ReservedKind

MSI = Reserved(0x0800_0000, 0x080F_FFFF, ReservedKind.MSI)
SMMU = IovaRanges(((0, 0x07FF_FFFF), (0x0810_0000, (1 << 48) - 1)), 4096)


def setup(text: str = "") -> DeviceSetup:
    """With one device of the host at 00:02.0."""
    return plan(parse(f'{text}\n[[endpoint]]\nid = "00:02.0"\nhost.fd = "disk"\n'))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_holes_are_what_no_range_has(pairs: list[tuple[int, int]], a: int, b: int) -> None:
    """Address by address; ranges in order, apart or not."""
    ranges = sorted((min(pair), max(pair)) for pair in pairs)
    first, last = min(a, b), max(a, b)
    covered = {address for start, end in ranges for address in range(start, end + 1)}
    found = holes(ranges, first, last)
    assert {address for start, end in found for address in range(start, end + 1)} == set(
        range(first, last + 1)
    ) - covered
    assert found == sorted(found)


def test_the_msi_window_is_told_once() -> None:
    """The host's hole for interrupts is the MSI region already; other holes are reserved."""
    assert reserve([MSI], SMMU, 0, (1 << 48) - 1) == (MSI,)
    more = IovaRanges(((0, 0x07FF_FFFF), (0x0820_0000, (1 << 48) - 1)), 4096)
    assert reserve([MSI], more, 0, (1 << 48) - 1) == (MSI, Reserved(0x0810_0000, 0x081F_FFFF))


def test_settings_are_narrowed() -> None:
    """Input range and pages are those that all devices can have."""
    narrowed = apply(setup('[device]\nmsi = "arm64"'), {0x10: IovaRanges(SMMU.ranges, 65536)}, RESV_MEM_BYTES)
    assert narrowed.settings.page_size_mask & -narrowed.settings.page_size_mask == 65536
    assert (narrowed.settings.input_first, narrowed.settings.input_last) == (0, (1 << 48) - 1)
    (entry,) = narrowed.endpoints
    assert entry.reserved == (MSI,)


@pytest.mark.parametrize(
    ("text", "ranges", "sentence"),
    [
        (
            "[device]\npage-size-mask = 4096",
            IovaRanges(SMMU.ranges, 65536),
            "device.page-size-mask: the host's IOMMU maps no less than 0x10000 bytes",
        ),
        (
            '[device]\ninput-range.start = "0x1000000000000"',
            SMMU,
            "device.input-range: the host's IOMMU translates none of it for all devices",
        ),
        (
            '[device]\nmsi = "arm64"\nprobe-size = 24',
            IovaRanges(((0x1000, 0x07FF_FFFF), (0x0820_0000, 0xFFFF_FFFF)), 4096),
            "device.probe-size = 24: must be at least 48 for the regions that the host reserves for 00:02.0",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_line(text: str, ranges: IovaRanges, sentence: str) -> None:
    """The key, and what is allowed."""
    with pytest.raises(UsageError) as error:
        apply(setup(text), {0x10: ranges}, RESV_MEM_BYTES)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            'id = "00:02.0"\nhost = {}',
            'endpoint[0].host = "empty": must be a table with one of device, fd and container',
        ),
        ('id = "00:02.0"\nhost.device = "x"', 'must be a PCI function of the host as "0000:65:00.0"'),
        ('id = "00:02.0-00:03.0"\nhost.fd = "a"', "must be a table of a single endpoint: it is one device"),
        (
            'id = "00:02.0"\nhost.device = "65:00.0"\n[[endpoint]]\nid = "00:03.0"\nhost.device = "0000:65:00.0"',
            "endpoint[1].host.device",
        ),
    ],
)
def test_mistakes_in_the_configuration(text: str, sentence: str) -> None:
    """Found before any device is touched."""
    with pytest.raises(UsageError) as error:
        plan(parse(f"[[endpoint]]\n{text}\n"))
    assert sentence in str(error.value)
