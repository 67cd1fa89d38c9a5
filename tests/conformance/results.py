"""Runs the tests that name a rule, and tells which passed.

Python tests are run by pytest with this module as a plug-in, which writes one line of JSON for each; C tests by ctest,
where every test function of a program has passed when the program has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conformance.registry import ROOT, Proof

OUTPUT_VARIABLE = "VIOMMUD_CONFORMANCE_RESULTS"
_BUILD = ROOT / "build/conformance"

PASSED, FAILED, SKIPPED = "pass", "FAIL", "skipped"


# The plug-in, within pytest


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._rules: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests that name a rule."""
        kept = [item for item in items if any(item.iter_markers("rule"))]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        for item in kept:
            self._rules[item.nodeid] = [rule for mark in item.iter_markers("rule") for rule in mark.args]
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line for each phase that says something: every call, and a failed or skipped set-up."""
        if report.when != "call" and report.passed:
            return
        line = {"test": report.nodeid, "rules": self._rules[report.nodeid], "outcome": report.outcome}
        with self._path.open("a") as output:
            output.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    config.pluginmanager.register(_Recorder(Path(os.environ[OUTPUT_VARIABLE])))


# Outside of it


def run(tests: Iterable[Proof], pytest_options: list[str]) -> dict[Proof, str]:
    """Run tests; PASSED, FAILED or SKIPPED for each that was run.

    A test with parameters has passed when it has with all of them.
    """
    wanted = set(tests)
    results = run_python(sorted({test.file for test in wanted if not test.is_c}), pytest_options)
    results |= run_c(sorted(test for test in wanted if test.is_c))
    return results


def run_python(files: list[str], options: list[str]) -> dict[Proof, str]:
    """Run those tests of some files that name a rule."""
    if not files:
        return {}
    _BUILD.mkdir(parents=True, exist_ok=True)
    output = _BUILD / "pytest.jsonl"
    output.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conformance.results", *options, *files]
    subprocess.run(command, cwd=ROOT, env={**os.environ, OUTPUT_VARIABLE: str(output), "PYTHONPATH": path}, check=False)
    return read_lines(output.read_text().splitlines() if output.exists() else [])


def read_lines(lines: Iterable[str]) -> dict[Proof, str]:
    """What the plug-in wrote, parameters taken together: the worst outcome counts."""
    worst: dict[Proof, str] = {}
    order = [PASSED, SKIPPED, FAILED]
    for line in lines:
        entry: dict[str, Any] = json.loads(line)
        file, _, name = entry["test"].partition("::")
        test = Proof(file, name.partition("[")[0])
        outcome = {"passed": PASSED, "skipped": SKIPPED}.get(entry["outcome"], FAILED)
        worst[test] = max(worst.get(test, PASSED), outcome, key=order.index)
    return worst


def run_c(tests: list[Proof], call: Callable[..., Any] = subprocess.run) -> dict[Proof, str]:
    """Build the C tests and run the programs that some tests are in."""
    if not tests:
        return {}
    programs = sorted({Path(test.file).stem for test in tests})
    report = _BUILD / "ctest.xml"
    report.unlink(missing_ok=True)
    steps = (
        ["cmake", "-S", "csrc", "-B", str(_BUILD), "-G", "Ninja", "-DVIOMMU_TESTS=ON"],
        ["cmake", "--build", str(_BUILD), "--target", *programs],
        [
            "ctest",
            "--test-dir",
            str(_BUILD),
            "--tests-regex",
            f"^({'|'.join(programs)})$",
            "--output-junit",
            str(report),
        ],
    )
    for step in steps:
        done = call(step, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            if step[0] == "cmake":
                return dict.fromkeys(tests, FAILED)
    passed = read_junit(report.read_text()) if report.exists() else {}
    return {test: passed.get(Path(test.file).stem, FAILED) for test in tests}


def read_junit(text: str) -> dict[str, str]:
    """Outcomes of ctest's programs by name."""
    outcomes = {"run": PASSED, "notrun": SKIPPED, "disabled": SKIPPED}
    root = ElementTree.fromstring(text)
    return {case.attrib["name"]: outcomes.get(case.attrib["status"], FAILED) for case in root.iter("testcase")}
