"""The topology in configuration space, as a driver of 2020 reads it over the socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from viommud import device_setup
from viommud.config import load
from viommud.engine import Engine
from viommud.errors import UsageError
from viommud.settings import FEATURE_TOPOLOGY

BASE = """
[device]
bypass-config = false
bypass = false
[topology]
machine = "virt"
builtin = "{shape}"
iommu = "00:01.0"
[[endpoint]]
id = "00:02.0"
"""


def engine_for(tmp_path: Path, text: str) -> Engine:
    """An engine as the daemon makes it from this configuration."""
    path = tmp_path / "vm.toml"
    path.write_text(text)
    setup = load(path, device_setup.plan)
    return Engine(setup.settings, setup.topology)


@pytest.mark.parametrize("shape", ["2019-11", "2020-02", "2020-08"])
def test_topology_stands_in_configuration_space(tmp_path: Path, shape: str) -> None:
    """Feature bit 6 is offered, space is longer, and one PCI range names the endpoint; over a reset it stays."""
    with engine_for(tmp_path, BASE.format(shape=shape)) as engine:
        assert engine.offered_features & FEATURE_TOPOLOGY
        assert engine.config_size > 40
        space = engine.config_read(0, engine.config_size)
        assert (0x10).to_bytes(4, "little") in space[36:]
        engine.set_driver_features(engine.offered_features)
        engine.config_write(36, b"\0", migration=False)
        engine.reset()
        assert engine.config_read(0, engine.config_size) == space


def test_topology_and_bypass_config_exclude_each_other(tmp_path: Path) -> None:
    """They are one feature bit and one offset, so a configuration with both is refused."""
    with pytest.raises(UsageError, match="bypass-config"):
        engine_for(tmp_path, BASE.format(shape="2020-08").replace("bypass-config = false\n", ""))
