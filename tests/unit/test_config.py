"""The configuration: what it amounts to, and the sentence for every mistake."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommud import config_space
from viommud.config import Config, load, parse
from viommud.device_setup import MSI_REGIONS, DeviceSetup, EndpointRange, plan
from viommud.endpoint_id import parse_endpoints, show
from viommud.errors import UsageError
from viommud.settings import Feature, Personality, Reserved, ReservedKind, Settings

U64_MAX = (1 << 64) - 1


def setup(text: str) -> DeviceSetup:
    """What a configuration text amounts to."""
    return plan(parse(text))


def mistake(text: str) -> str:
    """What is said about a configuration text that is wrong."""
    with pytest.raises(UsageError) as caught:
        setup(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_file_is_a_configuration() -> None:
    """Every key has a default: one guest, every PCI function, nothing that needs choosing."""
    made = setup('device.msi = "none"')
    assert not made.named
    assert made.endpoints == (EndpointRange(0, 0xFFFF),)
    assert made.settings == Settings(
        features=Feature.INPUT_RANGE
        | Feature.DOMAIN_RANGE
        | Feature.MAP_UNMAP
        | Feature.PROBE
        | Feature.MMIO
        | Feature.BYPASS_CONFIG
        | Feature.RING_INDIRECT_DESC
        | Feature.RING_EVENT_IDX
        | Feature.VERSION_1,
        page_size_mask=U64_MAX - 0xFFF,
        input_first=0,
        input_last=U64_MAX,
        domain_first=0,
        domain_last=(1 << 32) - 1,
        probe_size=512,
        personality=Personality.V1_X,
        bypass=True,
        max_endpoints=65536,
        max_domains=4096,
        max_faults=256,
        max_mappings=1048576,
        max_domain_mappings=262144,
        fault_wait_ms=1000,
        fault_burst=32,
        fault_rate=100,
        spin_us=500,
    )


def test_without_a_file_the_defaults_are_those_of_an_empty_one() -> None:
    """No second set of defaults."""
    assert plan(Config()) == setup("")


def test_every_key_reaches_the_settings() -> None:
    """Each key changes what it names."""
    made = setup(
        """
        [device]
        granule = "64K"
        input-range = { start = "1M", end = "0xffff_ffff" }
        domain-range = { start = 1, end = 15 }
        bypass = false
        bypass-config = false
        mmio = false
        probe-size = 1024
        msi = "x86"
        indirect = false
        event-idx = false
        in-order = true
        packed-ring = true
        [limits]
        endpoints = 7
        domains = 6
        mappings = "64K"
        mappings-per-domain = 5
        faults = 4
        fault-wait-ms = 3
        fault-burst = 2
        fault-rate = 1
        [worker]
        spin-us = 0
        [[endpoint]]
        id = "00:02.0"
    """.replace("0xffff_ffff", "0xffffffff")
    )
    assert made.settings == Settings(
        features=Feature.INPUT_RANGE
        | Feature.DOMAIN_RANGE
        | Feature.MAP_UNMAP
        | Feature.PROBE
        | Feature.VERSION_1
        | Feature.IN_ORDER
        | Feature.RING_PACKED,
        page_size_mask=U64_MAX - 0xFFFF,
        input_first=0x10_0000,
        input_last=0xFFFF_FFFF,
        domain_first=1,
        domain_last=15,
        probe_size=1024,
        bypass=False,
        max_endpoints=7,
        max_domains=6,
        max_mappings=65536,
        max_domain_mappings=5,
        max_faults=4,
        fault_wait_ms=3,
        fault_burst=2,
        fault_rate=1,
        spin_us=0,
    )
    assert made.endpoints == (EndpointRange(0x10, 0x10, (Reserved(0xFEE0_0000, 0xFEEF_FFFF, ReservedKind.MSI),)),)


@pytest.mark.parametrize(
    ("written", "number"),
    [("4096", 4096), ('"4096"', 4096), ('"0x1000"', 4096), ("0x1000", 4096), ('"4K"', 4096), ('"2M"', 2 << 20)],
)
def test_numbers_may_be_written_as_people_write_them(written: str, number: int) -> None:
    """As TOML integers, as hexadecimal strings, with a suffix."""
    assert setup(f"device.granule = {written}").settings.page_size_mask == U64_MAX + 1 - number


def test_page_sizes_as_a_mask() -> None:
    """In place of the granule."""
    assert setup('device.page-size-mask = "0x40201000"').settings.page_size_mask == 0x4020_1000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[limits]\nmapings = 5",
            "limits.mapings: unknown key, did you mean mappings? (known here: endpoints, domains,",
        ),
        (
            "[limts]",
            "limts: unknown key, did you mean limits? (known here: device, limits, worker, qemu, host, endpoint, "
            "topology, control, metrics)",
        ),
        (
            "zzz = 1",
            "zzz: unknown key (known here: device, limits, worker, qemu, host, endpoint, topology, control, metrics)",
        ),
        ("control.mode = 600", "control.mode = 600: must be a string"),
        ("control.steer-mode = '9'", "Expected `str` matching regex '^0?[0-7]{3}$' - at `$.control.steer-mode`"),
        ("device = 3", "device = 3: must be a table"),
        ("endpoint = 3", "endpoint = 3: must be a list"),
        ("[limits]\ndomains = 0", "limits.domains = 0: must be an integer from 1 to 2^32-1"),
        ("[limits]\ndomains = true", "limits.domains = true: must be an integer from 1 to 2^32-1"),
        ("[limits]\ndomains = 1.5", "limits.domains = 1.5: must be an integer from 1 to 2^32-1"),
        ('[limits]\ndomains = "many"', 'limits.domains = "many": must be an integer from 1 to 2^32-1'),
        ('[limits]\ndomains = "8T"', 'limits.domains = "8T": must be an integer from 1 to 2^32-1'),
        ("[limits]\nfaults = 2000000", "limits.faults = 2000000: must be an integer from 1 to 1048576"),
        ("[device]\nprobe-size = 4097", "device.probe-size = 4097: must be an integer from 0 to 4096"),
        ("[device]\nbypass = 1", "device.bypass = 1: must be true or false"),
        ('[device]\nmmio = "yes"', 'device.mmio = "yes": must be true or false'),
        ('[device]\nmsi = "arm"', 'device.msi = "arm": must be one of "arm64", "auto", "none", "x86"'),
        ('[device]\npersonality = "2"', 'device.personality = "2": must be one of "0.5", "0.9", "1.x"'),
        ("[device]\ngranule = 3000", "device.granule = 3000: must be a power of two"),
        ("[device]\npage-size-mask = 0", "device.page-size-mask = 0: must be a mask with at least one bit"),
        ("[device]\ngranule = 4096\npage-size-mask = 4096", "device.page-size-mask = 4096: must be left out where"),
        ("[device.input-range]\nstart = 8192\nend = 4095", "device.input-range.start = 8192: must be at most device."),
        ("[device.input-range]\nstart = 1", "device.input-range.start = 1: must be a multiple of the granule, 0x1000"),
        ("[device.input-range]\nend = 4096", "device.input-range.end = 4096: must be one less than a multiple of the"),
        ("[device.domain-range]\nstart = 2\nend = 1", "device.domain-range.start = 2: must be at most device.domain-"),
        (
            '[device]\npersonality = "0.9"\nmmio = true',
            'device.mmio = true: must be false with device.personality = "0.9"',
        ),
        (
            '[device]\npersonality = "0.5"\nbypass-config = true',
            'device.bypass-config = true: must be false with device.personality = "0.5"',
        ),
        (
            '[device]\npersonality = "0.9"\ndomain-range = { end = 2 }',
            "device.domain-range.end = 2: must be one less than a power of two",
        ),
        (
            '[device]\npersonality = "0.9"\ndomain-range = { start = 1 }',
            'device.domain-range.start = 1: must be 0 with device.personality = "0.9"',
        ),
        ('[device]\nmsi = "x86"\nprobe-size = 0', "device.probe-size = 0: must be at least 24, or device.msi be"),
        ("[[endpoint]]", "endpoint[0]: the key id is missing"),
        ('[[endpoint]]\nid = "2:0"', 'endpoint[0].id = "2:0": must be a PCI function as "00:02.0"'),
        ('[[endpoint]]\nid = "00:20.0"', 'endpoint[0].id = "00:20.0": must be a PCI function'),
        ('[[endpoint]]\nid = "00:02.0-00:01.0"', 'endpoint[0].id = "00:02.0-00:01.0": must be a range whose first'),
        ('[[endpoint]]\nid = ""', 'endpoint[0].id = "": must be a PCI function'),
        ("[[endpoint]]\nid = -1", "endpoint[0].id = -1: must be an integer from 0 to 2^32-1"),
        (
            '[[endpoint]]\nid = 16\n[[endpoint]]\nid = "00:02.0"',
            'endpoint[1].id = "00:02.0": must be apart from the endpoints of endpoint[0]',
        ),
        (
            '[limits]\nendpoints = 4\n[[endpoint]]\nid = "0-7"',
            "limits.endpoints = 4: must be at least 8, the endpoints that are configured",
        ),
        (
            "[[endpoint]]\nid = 1\nreserved = [{ start = 1 }]",
            "endpoint[0].reserved[0]: the key end is missing",
        ),
        (
            "[[endpoint]]\nid = 1\nreserved = [{ start = 2, end = 1 }]",
            "endpoint[0].reserved[0].start = 2: must be at most its end, which is 0x1",
        ),
        (
            '[[endpoint]]\nid = 1\nreserved = [{ start = 1, end = 2, type = "x" }]',
            'endpoint[0].reserved[0].type = "x": must be one of "msi", "reserved"',
        ),
        (
            "[[endpoint]]\nid = 1\nreserved = [{ start = 0, end = 5 }, { start = 5, end = 9 }]",
            'endpoint[0].reserved[1] = "0x5-0x9": must be apart from the reserved region 0x0-0x5',
        ),
        (
            'device.msi = "x86"\n[[endpoint]]\nid = 1\nreserved = [{ start = 0xfee00000, end = 0xfee00fff }]',
            "must be apart from the reserved region 0xfee00000-0xfeefffff of device.msi",
        ),
        (
            '[[endpoint]]\nid = 1\nreserved = [{start = 1, end = 1, type = "msi"}, {start = 2, end = 2, type = "msi"}]',
            'endpoint[0].reserved[1].type = "msi": must be "reserved": an endpoint has one MSI region at most',
        ),
        (
            '[device]\nmsi = "x86"\nprobe-size = 24\n[[endpoint]]\nid = 1\nreserved = [{ start = 1, end = 1 }]',
            "device.probe-size = 24: must be at least 48 for the regions of endpoint[0]",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(text: str, sentence: str) -> None:
    """Key as in the file, value as written, and what is allowed."""
    assert sentence in mistake(text)


def test_a_long_or_odd_value_stays_one_short_line() -> None:
    """Whatever stands in the file."""
    text = mistake('[device]\nmsi = """' + "line\nwith \x09 tab and more " * 50 + '"""')
    assert text.isprintable()
    assert len(text) < 200


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[device", "not TOML: "),
        (b"\xff", "not UTF-8 text: "),
        (b"[device]\ngranule = 3", "device.granule = 3: must be a power of two"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_names_the_file(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    """Also where the file as a whole is the mistake."""
    path = tmp_path / "vm.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load(path, plan)
    assert str(caught.value).startswith(f"{path}: {sentence}")


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7))
def test_endpoints_are_pci_functions(segment: int, bus: int, device: int, function: int) -> None:
    """segment << 16 | bus << 8 | device << 3 | function, with the segment left out or not, there and back."""
    number = segment << 16 | bus << 8 | device << 3 | function
    written = f"{segment:04x}:{bus:02x}:{device:02x}.{function}"
    assert parse_endpoints(written, "id") == (number, number)
    assert parse_endpoints(show(number), "id") == (number, number)
    assert parse_endpoints(number, "id") == (number, number)
    assert parse_endpoints(f"{number:#x}", "id") == (number, number)


def test_endpoint_ranges() -> None:
    """Both ends are inside."""
    made = setup('device.msi = "none"\n[[endpoint]]\nid = "01:00.0-01:1f.7"\n[[endpoint]]\nid = "5 - 0x7"')
    assert made.endpoints == (EndpointRange(0x100, 0x1FF), EndpointRange(5, 7))
    assert made.summary == "259 endpoints"


def test_own_msi_region_replaces_the_default() -> None:
    """An endpoint has one doorbell; other reserved regions are added."""
    made = setup("""
        device.msi = "arm64"
        [[endpoint]]
        id = 1
        reserved = [{ start = 0x1000, end = 0x1fff, type = "msi" }]
        [[endpoint]]
        id = 2
        reserved = [{ start = 0x1000, end = 0x1fff }]
    """)
    own, added = made.endpoints
    assert own.reserved == (Reserved(0x1000, 0x1FFF, ReservedKind.MSI),)
    assert added.reserved == (MSI_REGIONS["arm64"], Reserved(0x1000, 0x1FFF))


def test_the_host_decides_about_msi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under KVM the guest's processor is the host's."""
    for machine, region in (("x86_64", MSI_REGIONS["x86"]), ("aarch64", MSI_REGIONS["arm64"])):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert plan(Config()).endpoints[0].reserved == (region,)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert plan(Config()).endpoints[0].reserved == ()


def test_bypass_features_exclude_each_other() -> None:
    """VIRTIO 1.3, 5.13.3: BYPASS is for drivers that cannot have BYPASS_CONFIG."""
    both = Feature.BYPASS | Feature.BYPASS_CONFIG
    assert setup("").settings.features & both == Feature.BYPASS_CONFIG
    assert setup("device.bypass-config = false").settings.features & both == Feature.BYPASS
    assert not setup("device.bypass-config = false\ndevice.bypass = false").settings.features & both
    assert setup('device.personality = "0.9"').settings.features & both == Feature.BYPASS


def test_early_personalities_offer_nothing_newer() -> None:
    """Bits 5 and 6 had other meanings in drafts."""
    for version in ("0.9", "0.5"):
        assert not setup(f'device.personality = "{version}"').settings.features & (1 << 5 | 1 << 6)


@pytest.mark.parametrize(
    ("text", "bypass", "rendered"),
    [
        ("", True, struct.pack("<QQQIIIB3x", U64_MAX - 0xFFF, 0, U64_MAX, 0, (1 << 32) - 1, 512, 1)),
        ("", False, struct.pack("<QQQIIIB3x", U64_MAX - 0xFFF, 0, U64_MAX, 0, (1 << 32) - 1, 512, 0)),
        ('device.personality = "0.9"', True, struct.pack("<QQQB3xI", U64_MAX - 0xFFF, 0, U64_MAX, 32, 512)),
        (
            'device.personality = "0.5"\ndevice.domain-range.end = 255\ndevice.input-range.end = 0xffffff',
            False,
            struct.pack("<QQQB3xI", U64_MAX - 0xFFF, 0, 0xFFFFFF, 8, 512),
        ),
    ],
)
def test_configuration_space(text: str, bypass: bool, rendered: bytes) -> None:
    """VIRTIO 1.3, 5.13.4, and what drafts had in its place."""
    settings = setup(text).settings
    assert config_space.render(settings, bypass) == rendered
    assert config_space.size(settings) == len(rendered)
