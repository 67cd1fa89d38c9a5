"""What the documents say is what the program does."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from viommud.__main__ import CAPABILITIES
from viommud.cli import build_parser, parse
from viommud.config import Config
from viommud.config import parse as parse_config
from viommud.device_setup import plan
from viommud.endpoint_id import parse_endpoints

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Code blocks of the README."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[list[str]]:
    """Commands in shell blocks, with continued lines joined and comments gone."""
    for line in "".join(blocks("sh")).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def test_configuration_example_is_right_and_shows_the_defaults() -> None:
    """It loads, every key is in it, and what it says are the defaults are the defaults."""
    (text,) = blocks("toml")
    example = parse_config(text)
    made = plan(example)
    assert made.settings == plan(Config()).settings
    assert [(entry.first, entry.last) for entry in made.endpoints] == [(0x10, 0x10), (0x100, 0x1FF)]

    def keys(kind: type[msgspec.Struct]) -> set[str]:
        return {field.encode_name for field in msgspec.structs.fields(kind)}

    for section in (type(example.device), type(example.limits), type(example.worker)):
        for key in keys(section):
            assert re.search(rf"(^|\W){re.escape(key)}\b", text, re.MULTILINE), key
    assert parse_endpoints("0000:00:02.0", "") == parse_endpoints(16, "") == (0x10, 0x10)


def test_every_option_is_in_the_table() -> None:
    """And none that does not exist."""
    table = README[README.index("### Options") : README.index("### Configuration")]
    documented = set(re.findall(r"--[a-z][a-z-]+", table))
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert documented == {option for option in options if option.startswith("--")}


def test_command_lines_of_the_daemon_are_accepted() -> None:
    """Those that start it."""
    lines = [words[1:] for words in command_lines() if words[0] == "viommud"]
    assert lines
    for words in lines:
        parse(words)


def test_scripts_that_are_named_exist() -> None:
    """And can be run."""
    named = set(re.findall(r"\bscripts/[a-z]+\b", README))
    assert {"scripts/demo", "scripts/test", "scripts/check", "scripts/bench"} <= named
    for name in named:
        path = ROOT / name
        assert path.is_file(), name
        assert path.stat().st_mode & 0o111, name


def test_qemu_line_is_whole() -> None:
    """What a front-end must be told, on one command line."""
    (words,) = (words for words in command_lines() if words[0].startswith("qemu-system"))
    line = " ".join(words)
    for needed in ("share=on", "virtio-id=23", "num_vqs=2", "config_size=40", "path=/run/viommud/vm1.sock"):
        assert needed in line
    options = list(itertools.pairwise(words))
    (device,) = (value for option, value in options if option == "-device")
    (chardev,) = (value for option, value in options if option == "-chardev")
    assert "chardev=iommu" in device
    assert "id=iommu" in chardev


def test_messages_of_the_troubleshooting_table_are_real() -> None:
    """What is quoted as a message of viommud is in its source."""
    table = README[README.index("## Troubleshooting") : README.index("## Licence")]
    source = "".join(path.read_text() for path in (ROOT / "viommud").rglob("*.py"))
    quoted = []
    for row in table.splitlines():
        first = row.removeprefix("| ").split(" | ")[0]
        if row.startswith("| `"):
            quoted += re.findall(r"`([^`]+)`", first)
    assert len(quoted) > 8
    for message in quoted:
        assert message in source, message


def test_back_end_description() -> None:
    """QEMU docs/interop/vhost-user.json, VhostUserBackendInfo; type as the program itself says."""
    description = json.loads((ROOT / "systemd" / "50-viommud.json").read_text())
    assert set(description) == {"description", "type", "binary"}
    assert description["type"] == CAPABILITIES["type"]
    assert description["binary"].startswith("/")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_units(tmp_path: Path) -> None:
    """systemd understands every line, and thinks well of the service's confinement."""
    units = [tmp_path / name for name in ("viommud@vm1.service", "viommud@vm1.socket")]
    for unit in units:
        text = (ROOT / "systemd" / unit.name.replace("vm1", "")).read_text()
        unit.write_text(text.replace("/usr/bin/viommud", shutil.which("true") or "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in verified.stderr.splitlines() if "viommud" in line]
    assert (verified.returncode, complaints) == (0, [])
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", str(units[0])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert rated.returncode == 0, rated.stdout
