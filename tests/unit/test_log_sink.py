"""Log lines to who does not read them, and to the journal."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from viommud import log as viommud_log
from viommud.log_sink import DescriptorSink, JournalSink, is_journal, journal_entry


def lost_line(count: int) -> str:
    """What is written for lost lines."""
    return f"lost {count}\n"


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads yet."""
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def drain(fd: int) -> str:
    """Everything that is in a pipe."""
    os.set_blocking(fd, False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(fd, 1 << 16):
            data += more
    return data.decode()


@pytest.mark.parametrize("openable", [True, False], ids=["own description", "poll"])
@pytest.mark.parametrize("length", [50, 3000, 10000])
def test_a_pipe_that_nobody_reads(length: int, openable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing goes on; what did not fit is counted and told when there is room again, and no line is torn."""
    if not openable:

        def refuse(*_: object) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)
    with pipe() as (reading, writing), contextlib.ExitStack() as stack:
        sink = DescriptorSink(writing, lost_line)
        stack.callback(sink.close)
        count = 2000
        for number in range(count):
            sink.write(f"{number:06} {'x' * length}\n")
        assert sink.dropped > 0
        assert os.get_blocking(writing), "the description that we were given is as it was"
        text = ""
        while True:  # a line that was begun is finished first, and the count of the lost comes before the last
            text += drain(reading)
            sink.write("end\n")
            text += drain(reading)
            if text.endswith("end\n"):
                break
        lines = text.splitlines()
        told = sum(int(line.split()[1]) for line in lines if line.startswith("lost "))
        whole = [line for line in lines if line[0] == "0"]
        assert all(len(line) == 7 + length for line in whole)
        ends = lines.count("end")
        assert len(whole) + ends + told >= count + 1
        assert told == sink.dropped


def test_a_reader_that_is_gone() -> None:
    """A broken pipe is a lost line and nothing else."""
    reading, writing = os.pipe()
    sink = DescriptorSink(writing, lost_line)
    os.close(reading)
    sink.write("x\n")
    assert sink.dropped == 1
    os.close(writing)
    sink.close()


def test_a_socket_as_standard_error() -> None:
    """As systemd gives one: never waited for either."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        sink = DescriptorSink(theirs.fileno(), lost_line)
        for _ in range(10_000):
            sink.write("x" * 1000 + "\n")
        assert sink.dropped > 0
        assert ours.recv(10) == b"x" * 10
        sink.close()


def test_a_file(tmp_path: Path) -> None:
    """Every line is there."""
    with (tmp_path / "log").open("wb") as file:
        sink = DescriptorSink(file.fileno(), lost_line)
        for number in range(100):
            sink.write(f"{number}\n")
    assert (tmp_path / "log").read_text().split() == [str(number) for number in range(100)]


def parse_entry(data: bytes) -> dict[str, str]:
    """An entry of the journal's native protocol."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_journal_entries() -> None:
    """A message to read, a priority, and every field by its name; values with newlines too."""
    line = {"level": "warning", "event": "request-refused", "range": "0x0-0xfff", "domain": 7, "two-words": "a\nb"}
    found = parse_entry(journal_entry(dict(line), json.dumps))
    assert found == {
        "MESSAGE": "request-refused range=0x0-0xfff domain=7 two-words=a\nb",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "viommud",
        "VIOMMUD_EVENT": "request-refused",
        "VIOMMUD_RANGE": "0x0-0xfff",
        "VIOMMUD_DOMAIN": "7",
        "VIOMMUD_TWO_WORDS": "a\nb",
    }


def test_logging_to_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole chain, to a socket that stands for the journal's; nobody there is no trouble."""
    path = str(tmp_path / "journal")
    monkeypatch.setattr(viommud_log, "JournalSink", lambda: JournalSink(path))
    try:
        log = viommud_log.configure("info", "journal")
        log.info("lost")
        assert viommud_log.lines_dropped() == 1
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.bind(path)
            journal.settimeout(30)
            log.debug("unwanted")
            log.error("ring-broken", ring="request", features=["A", "B"])
            found = parse_entry(journal.recv(1 << 16))
        assert (found["VIOMMUD_EVENT"], found["PRIORITY"], found["VIOMMUD_RING"]) == ("ring-broken", "3", "request")
        assert found["VIOMMUD_FEATURES"] == '["A", "B"]'
    finally:
        sink = viommud_log._State.sink
        assert isinstance(sink, JournalSink)
        sink._sock.close()
        structlog.reset_defaults()


def test_journal_stream(tmp_path: Path) -> None:
    """JOURNAL_STREAM names device and inode of what leads to the journal; anything else does not."""
    with (tmp_path / "f").open("wb") as file:
        status = os.fstat(file.fileno())
        assert is_journal(file.fileno(), f"{status.st_dev}:{status.st_ino}")
        assert not is_journal(file.fileno(), f"{status.st_dev}:{status.st_ino + 1}")
        for nonsense in ("", ":", "a:b", "1"):
            assert not is_journal(file.fileno(), nonsense)


def test_the_level_changes_under_a_logger_in_use() -> None:
    """Also under one that was bound before."""
    import io

    stream = io.StringIO()
    try:
        log = viommud_log.configure("warning", "json", stream).bind(x=1)
        log.info("first")
        viommud_log.set_level("debug")
        assert viommud_log.level() == "debug"
        log.debug("second")
        viommud_log.set_level("error")
        log.warning("third")
    finally:
        structlog.reset_defaults()
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["second"]
