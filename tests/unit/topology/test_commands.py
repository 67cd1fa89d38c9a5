"""`viommud topology` and `viommud qemu-args` as a user runs them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unit.topology import tables, trees
from viommud.__main__ import main

CONFIG = """
[topology]
machine = "virt"
iommu = "00:01.0"

[[endpoint]]
id = "00:02.0"

[[endpoint]]
id = "00:03.0-00:03.7"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a configuration and a base tree, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm.toml").write_text(CONFIG)
    (tmp_path / "base.dtb").write_bytes(trees.blob(trees.virt(), pad=1 << 20))
    return tmp_path


def run(line: str) -> int:
    """The exit status of a command line."""
    try:
        return main(line.split())
    except SystemExit as ended:
        return int(ended.code or 0)


def test_a_device_tree_is_written_packed(here: Path) -> None:
    """`topology dt` writes a tree that maps the configured endpoints."""
    assert run("topology dt --config vm.toml --base base.dtb -o guest.dtb") == 0
    image = (here / "guest.dtb").read_bytes()
    assert len(image) < 8192
    mapped = trees.cells(trees.read(image)["/pcie@10000000"]["iommu-map"])
    assert [(mapped[at], mapped[at + 2], mapped[at + 3]) for at in (0, 4)] == [(0x10, 0x10, 1), (0x18, 0x18, 8)]


def test_an_overlay_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--overlay` shows the changes and writes nothing."""
    before = sorted(here.iterdir())
    assert run("topology dt --config vm.toml --base base.dtb --overlay") == 0
    assert "iommu-map = <0x10 &viommu 0x10 0x1 0x18 &viommu 0x18 0x8>;" in capsys.readouterr().out
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("kind", "signature"), [("viot", b"VIOT"), ("iort", b"IORT"), ("iort --its 0", b"IORT"), ("viot-v5", b"VIOT")]
)
def test_acpi_tables_are_written(here: Path, kind: str, signature: bytes) -> None:
    """Each table is written plain, or as an archive for an initial RAM disk."""
    assert run(f"topology {kind} --config vm.toml -o table.aml") == 0
    table = (here / "table.aml").read_bytes()
    tables.body(table, signature)
    assert run(f"topology {kind} --config vm.toml -o table.cpio --initrd-override") == 0
    ((name, content),) = tables.newc((here / "table.cpio").read_bytes()).items()
    assert name.startswith("kernel/firmware/acpi/")
    assert content == table


MISTAKES = [
    ("topology dt --config vm.toml --base missing.dtb -o out", "", "missing.dtb: cannot be read: No such file"),
    ("topology dt --config vm.toml --base vm.toml -o out", "", "vm.toml: not a flattened device tree"),
    ("topology dt --config vm.toml --base base.dtb", "", "give either -o FILE"),
    ("topology dt --config vm.toml --base base.dtb -o out --overlay", "", "give either -o FILE"),
    ("topology dt --config vm.toml --base base.dtb -o no/such/out", "", "no/such/out: cannot be written: No such file"),
    ("topology viot --config vm.toml -o out", "[[endpoint]]\nid = 8", "endpoint 0x8: 0000:00:01.0 is the IOMMU's own"),
    ("topology viot --config vm.toml -o out", "[[endpoint]]\nid = 0x10000", "not every ID has a place"),
    ("topology viot --config vm.toml -o out", "[[endpoint]]\nid = 0x18", "apart from the endpoints of endpoint[1]"),
    ("topology viot --config vm.toml -o out", "[[topology.bridge]]\nbus = 1", "topology.bridge[0].bus: unknown key"),
    ("topology viot --config missing.toml -o out", "", "missing.toml: cannot be read"),
    ("topology viot --config vm.toml", "", "the following arguments are required: -o/--output"),
    ("topology iort --config vm.toml -o out --its x", "", "'x' is not a number from 0 to 2^32-1"),
    ("topology viot-v5 --config vm.toml -o out --its 0", "", "unrecognized arguments: --its 0"),
    ("topology check --config vm.toml", "", "nothing to check against: give --dt, --viot or --qmp"),
    ("topology check --config vm.toml --viot base.dtb", "", "base.dtb: no ACPI table with the signature VIOT"),
    ("topology check --config vm.toml --qmp missing.sock", "", "missing.sock: no QMP server answers"),
    ("qemu-args --config vm.toml --socket-path s --memory 0G", "", "'0G' is not a size of memory"),
    ("qemu-args --config vm.toml --socket-path s --memory 1T", "", "'1T' is not a size of memory"),
    ("qemu-args --config vm.toml --socket-path s --cpus 0", "", "'0' is not a number from 1 up"),
    ("qemu-args --config vm.toml --socket-path s --device 00:02.0=nvme", "", "is not ENDPOINT=vfio-pci:0000:65:00.0"),
    ("qemu-args --config vm.toml --socket-path s --device 9:z=vfio-user:x", "", "must be a PCI function"),
    ("qemu-args --config vm.toml", "", "the following arguments are required: --socket-path"),
    ("qemu-args --config vm.toml --socket-path s", "[topology.x]", "topology.x: unknown key"),
]


@pytest.mark.parametrize(("line", "more", "sentence"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, more: str, sentence: str
) -> None:
    """Status 2, one line on standard error, and not even a temporary file."""
    (here / "vm.toml").write_text(CONFIG + more + "\n")
    before = sorted(here.iterdir())
    assert run(line) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('[[endpoint]]\nid = "00:02.0"', "there is no [topology], which says where the IOMMU is"),
        ('[topology]\nmachine = "virt"\niommu = "00:01.0"', "there is no [[endpoint]]"),
        ('[topology]\nmachine = "virt"', "topology: the key iommu is missing"),
    ],
)
def test_a_configuration_without_a_topology(
    here: Path, capsys: pytest.CaptureFixture[str], config: str, sentence: str
) -> None:
    """What a description needs and the configuration lacks is named."""
    (here / "vm.toml").write_text(config)
    assert run("topology viot --config vm.toml -o out") == 2
    assert f"vm.toml: {sentence}" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_an_older_file_survives_a_mistake(here: Path) -> None:
    """A run that fails leaves what an earlier one wrote; one that succeeds replaces it."""
    (here / "guest.dtb").write_bytes(b"older")
    assert run("topology dt --config vm.toml --base vm.toml -o guest.dtb") == 2
    assert (here / "guest.dtb").read_bytes() == b"older"
    assert run("topology dt --config vm.toml --base base.dtb -o guest.dtb") == 0
    assert (here / "guest.dtb").read_bytes() != b"older"


def test_check_agrees_with_what_was_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the other commands wrote shows no difference."""
    run("topology dt --config vm.toml --base base.dtb -o guest.dtb")
    run("topology viot --config vm.toml -o viot.aml")
    capsys.readouterr()
    assert run("topology check --config vm.toml --dt guest.dtb --viot viot.aml") == 0
    assert capsys.readouterr().out == "good: no difference found\n"


def test_check_finds_an_endpoint_that_was_added_since(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 4 and a line for the difference."""
    run("topology viot --config vm.toml -o viot.aml")
    (here / "vm.toml").write_text(CONFIG + '[[endpoint]]\nid = "00:04.0"\n')
    assert run("topology check --config vm.toml --viot viot.aml") == 4
    assert "error: 0000:00:04.0 (ID 0x20) is an endpoint, and is not described" in capsys.readouterr().out


class Monitor:
    """A machine protocol server of canned answers, one connection long."""

    def __init__(self, path: Path, answers: dict[str, Any], greeting: bytes) -> None:
        self._answers = answers
        self._greeting = greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rwb") as stream:
            stream.write(self._greeting + b"\n")
            stream.flush()
            for line in stream:
                request = json.loads(line)
                key = request["execute"] + request.get("arguments", {}).get("path", "")
                stream.write(b'{"event": "RTC_CHANGE", "data": {}}\n')
                answer = {"return": self._answers[key]} if key in self._answers else {"error": {"desc": key}}
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()

    def close(self) -> None:
        """End it."""
        self._listener.close()
        self._thread.join(10)


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}'
EMPTY: dict[str, Any] = {
    "qmp_capabilities": {},
    "query-pci": [],
    "qom-list/machine/peripheral": [],
    "qom-list/machine/peripheral-anon": [],
}


@pytest.fixture
def monitor(here: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """The server, with answers and greeting as the test's parameter says."""
    server = Monitor(here / "qmp.sock", *request.param)
    yield
    server.close()


@pytest.mark.parametrize(
    ("monitor", "status", "sentence"),
    [
        ((EMPTY, GREETING), 4, "error: the IOMMU's place 0000:00:01.0 is empty"),
        (({}, GREETING), 2, "QEMU refuses qmp_capabilities"),
        ((EMPTY | {"query-pci": [{}]}, GREETING), 2, "QEMU's answer to query-pci is not understood"),
        ((EMPTY, b"SSH-2.0-OpenSSH_9.2"), 2, "the answer is not JSON"),
        ((EMPTY, b"[]"), 2, "the answer is no object"),
        ((EMPTY, b"{}"), 2, "does not speak QMP"),
    ],
    indirect=["monitor"],
)
@pytest.mark.usefixtures("monitor")
def test_check_asks_a_running_qemu(capsys: pytest.CaptureFixture[str], status: int, sentence: str) -> None:
    """The answers decide; events in between are passed over, and whoever else answers is told apart."""
    assert run("topology check --config vm.toml --qmp qmp.sock") == status
    said = capsys.readouterr()
    assert sentence in said.out + said.err


@pytest.mark.parametrize("form", ["shell", "json", "libvirt"])
@pytest.mark.usefixtures("here")
def test_qemu_args(capsys: pytest.CaptureFixture[str], form: str) -> None:
    """Each form names the socket, the topology file and the devices."""
    line = "qemu-args --config vm.toml --socket-path s.sock --accel tcg --memory 2G --topology guest.dtb"
    assert run(f"{line} --device 00:02.0=vfio-user:nvme.sock --format {form}") == 0
    printed = capsys.readouterr().out
    for part in ("path=s.sock", "guest.dtb", "nvme.sock", "config_size=40"):
        assert part in printed
    assert ("2048M" in printed) == (form != "libvirt")


@pytest.mark.usefixtures("here")
def test_qemu_args_for_the_dump(capsys: pytest.CaptureFixture[str]) -> None:
    """`--dump-dtb` prints the line that makes the base."""
    assert run("qemu-args --config vm.toml --socket-path s.sock --dump-dtb base.dtb") == 0
    assert "dumpdtb=base.dtb" in capsys.readouterr().out


def test_the_builtin_topology_makes_configuration_space_longer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU is told the size that the daemon will serve."""
    (here / "vm.toml").write_text(
        "[device]\nbypass-config = false\n" + CONFIG.replace('"virt"', '"virt"\nbuiltin = "2020-08"')
    )
    assert run("qemu-args --config vm.toml --socket-path s.sock") == 0
    assert "config_size=72" in capsys.readouterr().out
