"""Man pages and completions: as the parsers are."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from viommud.ctl.parser import build_parser

ROOT = Path(__file__).parents[2]
SHARE = ROOT / "share"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """scripts/generate-share."""
    loader = SourceFileLoader("generate_share", str(ROOT / "scripts" / "generate-share"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option and command, at any depth."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield name
                yield from options(sub)


def test_everything_is_in_the_pages_and_completions(generator: ModuleType) -> None:
    """Whatever the version of Python that wrote them."""
    for parser, page in ((generator.whole_viommud(), "man8/viommud.8"), (build_parser(), "man1/viommuctl.1")):
        text = (SHARE / "man" / page).read_text().replace("\\-", "-").replace("\\", "")
        bash = (SHARE / "bash-completion/completions" / parser.prog).read_text()
        zsh = (SHARE / "zsh/site-functions" / f"_{parser.prog}").read_text()
        for option in options(parser):
            assert option in text or option == "--help", option
            assert option in bash, option
            assert option in zsh, option


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="they are written with Python 3.11; others wrap help anew")
def test_they_are_current(generator: ModuleType) -> None:
    """scripts/generate-share would write them as they are."""
    pytest.importorskip("shtab")
    pytest.importorskip("argparse_manpage")
    stale = [path for path, text in generator.files().items() if path.read_text("utf-8") != text]
    assert not stale, "run scripts/generate-share"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_understand_the_completions(shell: str) -> None:
    """At least as far as their syntax goes; and bash offers the commands."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    directory = "bash-completion/completions" if shell == "bash" else "zsh/site-functions"
    for path in (SHARE / directory).iterdir():
        subprocess.run([shell, "-n", str(path)], check=True)
    if shell == "bash":
        script = (
            f"source {SHARE}/bash-completion/completions/viommuctl; COMP_WORDS=(viommuctl tr); COMP_CWORD=1; "
            'COMP_LINE="viommuctl tr"; COMP_POINT=12; _shtab_viommuctl; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["translate"]
