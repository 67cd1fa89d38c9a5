"""`viommud check` on a machine that has nothing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from viommud.cli import run

QEMU = """#!/bin/sh
case "$*" in
*help*) echo 'name "{device}", bus PCI' ;;
*) echo QEMU emulator version {version} ;;
esac
"""


def fake_qemu(directory: Path, device: str, version: str) -> Path:
    """A program that answers as QEMU does."""
    path = directory / "qemu"
    path.write_text(QEMU.format(device=device, version=version))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def findings(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, str]]:
    """By what was looked at."""
    run(["check", "--json", *words])
    return {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_qemu_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that has the device is good, one that lacks it is not, and one that is not there is said to be missing."""
    good = fake_qemu(tmp_path, "vhost-user-test-device-pci", "11.1.3")
    assert findings(capsys, "--qemu", str(good))["qemu"]["verdict"] == "ok"
    old = fake_qemu(tmp_path, "e1000", "7.2.0")
    found = findings(capsys, "--qemu", str(old))["qemu"]
    assert (found["verdict"], found["remedy"]) == ("error", "QEMU 10.2 or later has it")
    assert findings(capsys, "--qemu", str(tmp_path / "none"))["qemu"]["verdict"] == "warning"


@pytest.mark.skipif(os.path.exists("/sys/bus/pci/devices/ffff:1f:1f.7"), reason="no machine has this function")
def test_a_device_that_is_missing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And so the exit status is 4; text and JSON say the same."""
    config = tmp_path / "vm.toml"
    config.write_text('[[endpoint]]\nid = "00:02.0"\nhost.device = "ffff:1f:1f.7"\n')
    found = findings(capsys, "--config", str(config))["00:02.0.device"]
    assert found["found"] == "the host has no PCI function ffff:1f:1f.7"
    assert run(["check", "--config", str(config)]) == 4
    assert "error    00:02.0.device: the host has no PCI function ffff:1f:1f.7" in capsys.readouterr().out


def test_faults_of_the_host_are_not_promised(capsys: pytest.CaptureFixture[str]) -> None:
    """The limitation is said where the user looks."""
    assert "the guest gets no fault report" in findings(capsys)["kernel.faults"]["found"]
