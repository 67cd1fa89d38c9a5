"""scripts/conformance: what it reads, what it makes of results, and that its document is current."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from conformance import __main__ as command
from conformance import registry, results, table
from conformance.registry import BINDING, ROOT, Proof, RegistryError, Rule, check, load_rules, marked_tests
from conformance.results import FAILED, PASSED, SKIPPED

MUST = Rule("R-A-1", "MUST", "5.1", "be good")
MAY = Rule("R-A-2", "MAY", "5.2", "be better")
ONE, TWO = Proof("tests/a/test_a.py", "test_one"), Proof("csrc/tests/test_b.c", "test_two")


# The register


def test_the_rules() -> None:
    """All there are, each with a section and a line; the levels are those of the specification and our own."""
    rules = load_rules()
    assert len(rules) > 100
    assert all(rule.summary and rule.section[0].isdigit() for rule in rules.values())
    assert {rule.level for rule in rules.values()} == {"MUST", "SHOULD", "MAY", "text", "own"}


@pytest.mark.parametrize("entry", ['["MUST", "5.1"]', '["WILL", "5.1", "x"]', '"MUST"', '["MUST", 5.1, "x"]'])
def test_a_rule_that_is_none(tmp_path: Path, entry: str) -> None:
    """It is named."""
    path = tmp_path / "rules.toml"
    path.write_text(f"[rules]\nR-A-1 = {entry}\n")
    with pytest.raises(RegistryError, match=r"R-A-1: must be level, section and summary"):
        load_rules(path)


def test_marks_in_files(tmp_path: Path) -> None:
    """In Python and in C, several on a function, one rule in several functions; parameters and others are left out."""
    python, c = tmp_path / "tests/sub/test_a.py", tmp_path / "csrc/tests/test_b.c"
    python.parent.mkdir(parents=True)
    c.parent.mkdir(parents=True)
    python.write_text(
        'import pytest\n@pytest.mark.rule("R-A-1", "R-A-2")\n@pytest.mark.parametrize("x", [1])\n'
        'def test_one(x): ...\n@pytest.mark.rule("R-A-1")\nasync def test_two(): ...\n'
        '@pytest.mark.slow("R-A-1")\ndef test_three(): ...\n@pytest.mark.rule("R-A-1")\ndef helper(): ...\n'
    )
    c.write_text(
        "/* rule: R-A-1 */\n/* rule: R-A-3, R-A-2 */\n/* rule: H7 */\n/* What it is about. */\n"
        "static void test_four(void)\n{\n}\nstatic void test_five(void)\n{\n    test_four();\n}\n"
        "/* rule: R-A-1 */\nint test_six(void)\n{\n}\n"
    )
    one, two = Proof("tests/sub/test_a.py", "test_one"), Proof("tests/sub/test_a.py", "test_two")
    four, six = Proof("csrc/tests/test_b.c", "test_four"), Proof("csrc/tests/test_b.c", "test_six")
    assert marked_tests(tmp_path) == {"R-A-1": [four, six, one, two], "R-A-2": [four, one], "R-A-3": [four]}


def test_a_rule_that_cannot_be_read(tmp_path: Path) -> None:
    """A name that is computed would be missed."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text('@pytest.mark.rule("R-" + X)\ndef test_one(): ...\n')
    with pytest.raises(RegistryError, match="test_one: a rule must be written out"):
        marked_tests(tmp_path)


def test_a_mark_of_no_rule() -> None:
    """Most likely a slip of the pen; never silently left out."""
    with pytest.raises(RegistryError, match=r"test_b\.c: test_two: there is no rule R-B-9"):
        check({"R-A-1": MUST}, {"R-A-1": [ONE], "R-B-9": [TWO]})


def test_every_mark_here_names_a_rule() -> None:
    """In the whole repository."""
    check(load_rules(), marked_tests())


# Results


def test_parameters_are_taken_together() -> None:
    """The worst counts: a test that is skipped or fails with one of them has not passed."""

    def lines(*outcomes: str) -> list[str]:
        return [json.dumps({"test": f"t/test_a.py::test_x[{n}]", "outcome": o}) for n, o in enumerate(outcomes)]

    test = Proof("t/test_a.py", "test_x")
    assert results.read_lines(lines("passed", "passed")) == {test: PASSED}
    assert results.read_lines(lines("passed", "skipped")) == {test: SKIPPED}
    assert results.read_lines(lines("failed", "skipped", "passed")) == {test: FAILED}
    assert results.read_lines([]) == {}


def test_what_ctest_says() -> None:
    """Passed, failed and skipped programs."""
    text = (
        '<testsuite><testcase name="test_a" status="run"/><testcase name="test_b" status="fail"><failure/></testcase>'
        '<testcase name="test_c" status="notrun"/></testsuite>'
    )
    assert results.read_junit(text) == {"test_a": PASSED, "test_b": FAILED, "test_c": SKIPPED}


def test_c_tests_that_cannot_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them have failed, and what the compiler said is shown."""
    calls: list[Sequence[str]] = []

    def call(step: Sequence[str], **_: object) -> SimpleNamespace:
        calls.append(step)
        return SimpleNamespace(returncode=1, stdout="test_b.c:7: error: expected ';'\n")

    assert results.run_c([TWO], call) == {TWO: FAILED}
    assert len(calls) == 1
    assert "test_b.c:7: error" in capsys.readouterr().err


def test_the_plug_in(tmp_path: Path) -> None:
    """Within a real pytest: marked tests are run and told of, others are not run."""
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        '@pytest.mark.rule("R-A-1")\n@pytest.mark.parametrize("x", [1, 2])\ndef test_one(x): assert x == 1\n'
        '@pytest.mark.rule("R-A-1")\ndef test_two(): pytest.skip("not here")\n'
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        '@pytest.mark.rule("R-A-2")\ndef test_three(broken): ...\n'
        "def test_other(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = rule\n")
    output = tmp_path / "out.jsonl"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conformance.results", "-p", "no:cacheprovider", "test_a.py"],
        cwd=tmp_path,
        env={results.OUTPUT_VARIABLE: str(output), "PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    found = results.read_lines(output.read_text().splitlines())
    names = ("test_one", "test_two", "test_three")
    assert found == dict(zip((Proof("test_a.py", name) for name in names), (FAILED, SKIPPED, FAILED), strict=True))


# The table


@pytest.mark.parametrize(
    ("rule", "outcomes", "result", "good"),
    [
        (MUST, {ONE: PASSED, TWO: PASSED}, PASSED, True),
        (MUST, {ONE: PASSED, TWO: FAILED}, FAILED, False),
        (MUST, {ONE: PASSED, TWO: SKIPPED}, PASSED, True),
        (MUST, {ONE: SKIPPED, TWO: SKIPPED}, SKIPPED, False),
        (MUST, {ONE: PASSED}, table.NOT_RUN, False),
        (MUST, {}, table.NO_TEST, False),
        (MAY, {}, table.NO_TEST, True),
        (MAY, {ONE: FAILED}, FAILED, False),
    ],
)
def test_result_of_a_rule(rule: Rule, outcomes: dict[Proof, str], result: str, good: bool) -> None:
    """A MUST or SHOULD needs a test that passed; no rule may have one that failed."""
    tests = {} if not outcomes else {rule.id: [ONE] if rule is MAY else [ONE, TWO]}
    (row,) = table.rows({rule.id: rule}, tests, outcomes)
    assert (row.result, row.good) == (result, good)


def test_rendering() -> None:
    """Every rule is a line, with its tests where there is room for them."""
    rows = table.rows({"R-A-1": MUST, "R-A-2": MAY}, {"R-A-1": [ONE, TWO]}, None)
    assert "R-A-1  MUST        2  pass     be good" in table.plain(rows)
    assert "1 of 1 rules that a device MUST or SHOULD follow hold, and 0 of 1 others; 2 test" in table.plain(rows)
    text = table.markdown(rows)
    assert "| R-A-1 | MUST | 5.1 | be good | `a/test_a.py: one`<br>`tests/test_b.c: two` | pass |" in text
    assert "| R-A-2 | MAY | 5.2 | be better | no test | no test |" in text


# The command


def test_the_document_is_current() -> None:
    """Rules and tests in it are those of the repository; results are written after a run that passed, and only then."""
    rows = table.rows(load_rules(), marked_tests(), None)
    assert [row.rule.id for row in rows if row.rule.level in BINDING and not row.tests] == []
    assert command.DOCUMENT.read_text() == table.markdown(rows), "scripts/conformance --write makes it current"


@pytest.mark.parametrize("outcome", [PASSED, FAILED])
def test_only_a_good_run_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: str) -> None:
    """One failed test, and the document stays as it is."""
    document = tmp_path / "docs/conformance.md"
    monkeypatch.setattr(command, "DOCUMENT", document)
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(results, "run", lambda tests, _: dict.fromkeys(tests, PASSED) | {min(tests): outcome})
    assert command.main(["--write"]) == (outcome != PASSED)
    assert document.exists() == (outcome == PASSED)


def test_a_mark_that_only_pytest_sees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be missing in the document: the run fails and says where it is."""
    monkeypatch.setattr(results, "run", lambda tests, _: dict.fromkeys([*tests, ONE], PASSED))
    assert command.main([]) == 1
    assert "test_a.py: test_one names rules in a way that cannot be read" in capsys.readouterr().err
