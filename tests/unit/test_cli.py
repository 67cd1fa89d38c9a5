"""The command line: conventions of back-end programs, and the sentence for every mistake."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import viommud
from viommud.__main__ import main
from viommud.cli import parse
from viommud.errors import UsageError
from viommud.service import listen_fds, notify


def run(*arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    """The program with these arguments, to its end."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "NOTIFY_"))}
    return subprocess.run(
        [sys.executable, "-m", "viommud", *arguments],
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environ,
    )


def test_capabilities_ignore_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU docs/interop/vhost-user.rst: JSON on standard output, exit status 0, whatever else is said."""
    assert main(["--nonsense", "--fd", "x", "--print-capabilities", "--version"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["type"] == "iommu"
    # A feature names an option.
    for feature in answer["features"]:
        parse([f"--{feature}"] + (["x"] if feature == "config" else []))


@pytest.mark.parametrize("option", ["--print-capabilities", "--version", "--help"])
def test_questions_are_answered_without_the_heavy_modules(option: str) -> None:
    """A manager asks every back-end there is: trio, structlog and the engine stay unloaded."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['viommud', {option!r}]\n"
        "try:\n"
        "    runpy.run_module('viommud', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print(sorted({'trio', 'structlog', 'msgspec', 'viommud._core'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """One version, in the program and in the package."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"viommud {viommud.__version__}\n"
    assert importlib.metadata.version("viommud") == viommud.__version__


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fd", "x"], "argument --fd: 'x' is not the number of a file descriptor"),
        (["--fd", "-1"], "argument --fd"),
        (["--fd", "99999999999"], "argument --fd: '99999999999' is not the number of a file descriptor"),
        (["--fd", "0", "--socket-path", "s"], "argument --socket-path: not allowed with argument --fd"),
        (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud' (choose from"),
        (
            ["--log-format", "xml"],
            "argument --log-format: invalid choice: 'xml' (choose from",
        ),
        (["--socket-mode", "888", "--socket-path", "s"], "argument --socket-mode: '888' is not a file mode"),
        (["--socket-mode", "1777", "--socket-path", "s"], "argument --socket-mode: '1777' is not a file mode"),
        (["--socket-mode", "660", "--fd", "0"], "--socket-mode is for the socket that --socket-path creates"),
        (["--socket-group", "kvm", "--fd", "0"], "--socket-group is for the socket that --socket-path creates"),
        (["--socket-group", "no such group", "--socket-path", "s"], "--socket-path s: there is no group no such group"),
        (["--check-config"], "--check-config checks the file that --config names, and --config is missing"),
        (["--confg", "x"], "unrecognized arguments: --confg"),
        (["--sock", "x"], "unrecognized arguments: --sock x"),
        ([], "no socket: give --socket-path PATH or --fd N, or start through socket activation"),
        (["--config", "/no/such/file"], "/no/such/file: cannot be read: No such file or directory"),
        (["--fd", "1234"], "--fd 1234: Bad file descriptor; a UNIX stream socket, listening or connected, is needed"),
        (["--fd", "0"], "--fd 0: not a socket; a UNIX stream socket, listening or connected, is needed"),
        (["--socket-path", "/no/such/directory/s"], "--socket-path /no/such/directory/s: No such file or directory"),
        (["--socket-path", "/tmp/" + "x" * 120], "a socket's path has at most 107 bytes"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], sentence: str) -> None:
    """What, where, and what is allowed; nothing on standard output."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("viommud: error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_sockets_of_another_kind_are_refused() -> None:
    """UDP, UNIX datagram, and a stream socket that is neither listening nor connected."""
    for family, kind, problem in (
        (socket.AF_INET, socket.SOCK_DGRAM, "a socket of another kind"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, "a socket of another kind"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "neither listening nor connected"),
    ):
        with socket.socket(family, kind) as sock:
            done = run("--fd", "0", stdin=sock.fileno())
        assert done.returncode == 2
        assert f"--fd 0: {problem}" in done.stderr


def test_keep_listening_needs_a_listener() -> None:
    """A connection is one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = run("--fd", "0", "--keep-listening", stdin=theirs.fileno())
    assert done.returncode == 2
    assert "--keep-listening needs a listening socket, and --fd 0 is connected already" in done.stderr


def test_check_config(tmp_path: Path) -> None:
    """Right: status 0 and a word about it; wrong: status 2 and the mistake.  No socket is needed."""
    path = tmp_path / "vm.toml"
    path.write_text('[[endpoint]]\nid = "00:02.0"\n')
    done = run("--config", str(path), "--check-config")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: good, 1 endpoint\n", "")
    path.write_text("[limits]\nmapings = 3\n")
    done = run("--config", str(path), "--check-config")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}: limits.mapings: unknown key, did you mean mappings?" in done.stderr


def test_settings_that_do_not_go_together_need_no_process() -> None:
    """parse() is where a caller in Python finds the same mistakes."""
    with pytest.raises(UsageError):
        parse(["--check-config"])


def test_passed_descriptors_of_another_process_are_left_alone() -> None:
    """LISTEN_PID says whom they are for; the variables go in any case."""
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}
    assert listen_fds(environ) == []
    assert environ == {}


def test_several_passed_descriptors_need_a_name(tmp_path: Path) -> None:
    """Which of them is the vhost-user socket must not be guessed."""
    script = (
        "import os, sys\n"
        "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '2', 'LISTEN_FDNAMES': 'a:b'}\n"
        "for fd in (3, 4): os.dup2(0, fd)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'viommud'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "LISTEN_FDS passes 2 descriptors (a, b): exactly one must be named vhost" in done.stderr


def test_notify(tmp_path: Path) -> None:
    """Paths and abstract names; nobody there is no error."""
    assert not notify("READY=1", environ={})
    assert not notify("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    for address in (str(tmp_path / "manager"), f"@viommud-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            assert notify("READY=1", "STATUS=x", environ={"NOTIFY_SOCKET": address})
            assert manager.recv(100) == b"READY=1\nSTATUS=x"
