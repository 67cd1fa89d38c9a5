"""The topology in configuration space, read as the drivers of each proposal read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from unit.topology import tables
from unit.topology.making import TWO_SEGMENTS, topology
from viommud.topology import builtin
from viommud.topology.errors import TopologyError
from viommud.topology.section import BuiltinShape

READERS: dict[BuiltinShape, Callable[[bytes], Iterator[dict[str, Any]]]] = {
    "2019-11": tables.list_2019,
    "2020-02": tables.array_2020,
    "2020-08": tables.records_2020,
}
SHAPES = list(READERS)


def space(shape: BuiltinShape, made: Any) -> bytes:
    """A whole configuration space, with something else before the topology."""
    return b"\xee" * builtin.OFFSET + builtin.render(shape, made)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_endpoint_is_listed(shape: BuiltinShape) -> None:
    """PCI ranges of two segments and an MMIO endpoint come out as they went in."""
    made = topology(
        [(0x10, 0x17), (0x1_0020, 0x1_0020), (0x9_0000, 0x9_0000)],
        bridge=TWO_SEGMENTS,
        platform=[{"id": 0x9_0000, "base": 0x1_2345_6000}],
    )
    assert list(READERS[shape](space(shape, made))) == [
        {"endpoint": 0x10, "segment": 0, "first": 0x10, "last": 0x17},
        {"endpoint": 0x1_0020, "segment": 1, "first": 0x20, "last": 0x20},
        {"endpoint": 0x9_0000, "address": 0x1_2345_6000},
    ]


@pytest.mark.parametrize(("shape", "most"), [("2019-11", 13), ("2020-02", 13), ("2020-08", 13)])
def test_what_does_not_fit_is_refused(shape: BuiltinShape, most: int) -> None:
    """As many ranges as 256 bytes of configuration space hold are listed; one more is refused with a remedy."""
    fitting = topology([(number, number) for number in range(0x10, 0x10 + 2 * most, 2)])
    whole = space(shape, fitting)
    assert len(whole) <= 256
    assert len(list(READERS[shape](whole))) == most
    one_more = topology([(number, number) for number in range(0x10, 0x12 + 2 * most, 2)])
    with pytest.raises(TopologyError, match=r"14 ranges and devices need 2[0-9][0-9] bytes of configuration") as caught:
        builtin.render(shape, one_more)
    assert caught.value.hint


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_to_list_is_refused(shape: BuiltinShape) -> None:
    """A list without an item is what no driver of the time expects."""
    with pytest.raises(TopologyError, match="there is no endpoint to list"):
        builtin.render(shape, topology())
