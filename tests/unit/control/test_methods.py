"""The methods over a real engine without a guest: what the interface says is what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from viommud.config import parse
from viommud.control.errors import MONITOR, SERVICE, STEER, CallError
from viommud.control.methods import INTERFACES, description, find
from viommud.control.subject import Subject
from viommud.control.wire import Call, reply
from viommud.daemon import make_engine
from viommud.device_setup import plan
from viommud.events import EVENT_KINDS, STREAM_BUFFER, EventLog

CONFIG = """
[device]
msi = "x86"
[limits]
mappings = 100
[[endpoint]]
id = "00:02.0"
"""
BOTH = (MONITOR, STEER)


@pytest.fixture
def subject() -> Iterator[Subject]:
    """A daemon's state with an engine that waits for a front-end."""
    setup = plan(parse(CONFIG))
    with make_engine(setup) as engine:
        yield Subject(setup, "here", allow_injection=True, engine=engine)


async def ask(subject: Subject, method: str, interfaces: tuple[str, ...] = BOTH, /, **parameters: Any) -> Any:
    """One call, its answer as a client would see it."""
    call = Call(method, msgspec.Raw(msgspec.json.encode(parameters)))
    found, checked = find(call, interfaces)
    assert found.one is not None
    return json.loads(reply(await found.one(subject, checked))[:-1])["parameters"]


def idl(interface: str) -> dict[str, tuple[set[str], set[str]]]:
    """Methods of an interface: names of their parameters, and of what they answer."""
    text = re.sub(r"#.*", "", description(interface))
    methods = {}
    for name, given, answer in re.findall(
        r"method (\w+)\s*\((.*?)\)\s*->\s*\((.*?)\)\s*(?=\n\s*\n|\Z)", text, re.DOTALL
    ):
        methods[name] = (fields(given), fields(answer))
    return methods


def fields(text: str) -> set[str]:
    """Names of members at the outer level of a struct."""
    while "(" in text:
        text = re.sub(r"\([^()]*\)", "x", text)
    return set(re.findall(r"(\w+)\s*:", text))


@pytest.mark.parametrize("interface", BOTH)
def test_the_table_is_the_interface(interface: str) -> None:
    """Every method that is described is there, with these parameters, and no other."""
    described = idl(interface)
    table = {
        name: {field.encode_name for field in msgspec.structs.fields(method.parameters)}
        for name, method in INTERFACES[interface].items()
    }
    assert {name: given for name, (given, _) in described.items()} == table
    assert re.search(rf"^interface {re.escape(interface)}$", description(interface), re.MULTILINE)


async def test_answers_are_as_described(subject: Subject) -> None:
    """Every member that is described is in the answer, and none that is not."""
    given: dict[str, dict[str, Any]] = {
        "ListMappings": {"domain": 1},
        "Translate": {"endpoint": 0x10, "address": "0x1000"},
        "InjectFault": {"endpoint": 0x10},
        "Inject": {"injection": {"action": "drop"}},
        "SetLogLevel": {"level": "info"},
    }
    for interface in BOTH:
        for name, (_, answered) in idl(interface).items():
            if INTERFACES[interface][name].one is None:
                assert set(INTERFACES[interface][name].end) <= answered
                continue
            try:
                assert set(await ask(subject, f"{interface}.{name}", **given.get(name, {}))) == answered, name
            except CallError as error:
                assert error.error == f"{MONITOR}.NoSuchDomain"  # noqa: PT017 - the others do not fail


def test_event_kinds_are_described() -> None:
    """The enumeration of the interface is that of the program."""
    (kinds,) = re.findall(r"kind: \((.*?)\)", description(MONITOR))
    assert tuple(kind.strip() for kind in kinds.split(",")) == EVENT_KINDS


@pytest.mark.skipif(shutil.which("varlinkctl") is None, reason="varlinkctl (systemd 255 and newer) is not installed")
@pytest.mark.parametrize("interface", [*BOTH, SERVICE])
def test_systemd_understands_the_interface(interface: str) -> None:
    """varlinkctl validate-idl."""
    done = subprocess.run(
        ["varlinkctl", "validate-idl"], input=description(interface), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_status_and_limits(subject: Subject) -> None:
    """Of a daemon that waits."""
    status = await ask(subject, f"{MONITOR}.GetStatus")
    assert (status["session"], status["paused"], status["bypass"], status["socket"]) == (None, False, True, "here")
    limits = {limit["name"]: limit for limit in (await ask(subject, f"{MONITOR}.GetLimits"))["limits"]}
    assert limits["mappings"] == {"name": "mappings", "used": 0, "peak": 0, "max": 100}
    await ask(subject, f"{STEER}.SetLimits", mappings=7)
    limits = {limit["name"]: limit for limit in (await ask(subject, f"{MONITOR}.GetLimits"))["limits"]}
    assert (limits["mappings"]["max"], limits["domains"]["max"]) == (7, 4096)


async def test_translate_before_anything_is_attached(subject: Subject) -> None:
    """An endpoint in no domain reaches memory where the bypass says so."""
    where: dict[str, Any] = {"endpoint": 0x10, "address": "0x1234"}
    assert await ask(subject, f"{MONITOR}.Translate", **where) == {"phys": "0x1234"}
    subject.require_engine().bypass = False
    assert await ask(subject, f"{MONITOR}.Translate", **where) == {"phys": None}


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        (f"{MONITOR}.ListMappings", {"domain": 3}, (f"{MONITOR}.NoSuchDomain", {"domain": 3})),
        (f"{MONITOR}.Translate", {"endpoint": 3, "address": "0x0"}, (f"{MONITOR}.NoSuchEndpoint", {"endpoint": 3})),
        (f"{MONITOR}.ListMappings", {}, (f"{SERVICE}.InvalidParameter", {"parameter": "domain"})),
        (f"{MONITOR}.ListMappings", {"domain": -1}, (f"{SERVICE}.InvalidParameter", {"parameter": "domain"})),
        (f"{MONITOR}.ListDomains", {"limit": 1001}, (f"{SERVICE}.InvalidParameter", {"parameter": "limit"})),
        (f"{MONITOR}.GetStatus", {"x": 1}, (f"{SERVICE}.InvalidParameter", {"parameter": "x"})),
        (
            f"{MONITOR}.Translate",
            {"endpoint": 3, "address": "12"},
            (f"{SERVICE}.InvalidParameter", {"parameter": "address"}),
        ),
        (
            f"{STEER}.Inject",
            {"injection": {"action": "delay"}},
            (f"{SERVICE}.InvalidParameter", {"parameter": "delay_us"}),
        ),
        (
            f"{STEER}.Inject",
            {"injection": {"action": "drop", "status": "ok"}},
            (f"{SERVICE}.InvalidParameter", {"parameter": "status"}),
        ),
        (
            f"{STEER}.Inject",
            {"injection": {"action": "drop", "count": 0}},
            (f"{SERVICE}.InvalidParameter", {"parameter": "injection.count"}),
        ),
        (f"{MONITOR}.Watch", {}, (f"{SERVICE}.ExpectedMore", {})),
        (f"{MONITOR}.Nothing", {}, (f"{SERVICE}.MethodNotFound", {"method": f"{MONITOR}.Nothing"})),
        ("org.example.X", {}, (f"{SERVICE}.InterfaceNotFound", {"interface": "org.example"})),
        ("", {}, (f"{SERVICE}.InterfaceNotFound", {"interface": ""})),
    ],
)
async def test_errors(
    subject: Subject, method: str, parameters: dict[str, Any], error: tuple[str, dict[str, object]]
) -> None:
    """Named as the interface names them, with what was wrong."""
    with pytest.raises(CallError) as caught:
        await ask(subject, method, **parameters)
    assert (caught.value.error, caught.value.parameters) == error


async def test_steering_is_not_on_the_socket_to_look(subject: Subject) -> None:
    """Neither its methods nor its description."""
    for name in INTERFACES[STEER]:
        with pytest.raises(CallError, match="InterfaceNotFound"):
            await ask(subject, f"{STEER}.{name}", (MONITOR,))
    with pytest.raises(CallError, match="InterfaceNotFound"):
        await ask(subject, f"{SERVICE}.GetInterfaceDescription", (MONITOR,), interface=STEER)
    info = await ask(subject, f"{SERVICE}.GetInfo", (MONITOR,))
    assert info["interfaces"] == [SERVICE, MONITOR]
    for interface in info["interfaces"]:
        told = await ask(subject, f"{SERVICE}.GetInterfaceDescription", (MONITOR,), interface=interface)
        assert told == {"description": description(interface)}


async def test_injection_must_be_allowed(subject: Subject) -> None:
    """By the configuration; the error says how."""
    subject.allow_injection = False
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ("InjectFault", {"endpoint": 0x10}),
        ("Inject", {"injection": {"action": "drop"}}),
    )
    for method, parameters in calls:
        with pytest.raises(CallError, match="InjectionNotAllowed") as caught:
            await ask(subject, f"{STEER}.{method}", **parameters)
        assert "allow-injection" in str(caught.value.parameters["hint"])
    assert await ask(subject, f"{STEER}.ListInjections") == {"injections": []}


async def test_injections(subject: Subject) -> None:
    """Armed, listed as they were given, too many, and cleared."""
    rule = {"action": "delay", "count": 3, "request": "map", "domain": 5, "delay_us": 1500}
    await ask(subject, f"{STEER}.Inject", injection=rule)
    await ask(subject, f"{STEER}.Inject", injection={"action": "status", "status": "unanswered", "endpoint": 0})
    listed = (await ask(subject, f"{STEER}.ListInjections"))["injections"]
    assert listed == [rule, {"action": "status", "status": "unanswered", "endpoint": 0}]
    for _ in range(14):
        await ask(subject, f"{STEER}.Inject", injection={"action": "drop"})
    with pytest.raises(CallError, match="TooManyInjections"):
        await ask(subject, f"{STEER}.Inject", injection={"action": "drop"})
    assert await ask(subject, f"{STEER}.ClearInjections") == {"cleared": 16}


async def test_between_two_virtual_machines(subject: Subject) -> None:
    """There is no engine: what does not need one is answered."""
    subject.engine = None
    assert (await ask(subject, f"{MONITOR}.GetStatus"))["session"] is None
    for method in ("GetCounters", "ListEndpoints", "GetLimits"):
        with pytest.raises(CallError, match="NotNow"):
            await ask(subject, f"{MONITOR}.{method}")


async def test_events_are_bounded() -> None:
    """A reader that does not read misses events and is told how many."""
    log = EventLog()
    with log.stream(["lost"]) as stream:
        for count in range(STREAM_BUFFER + 5):
            log.note("lost", count=count)
            log.note("session", reason="began")
        events, dropped = await stream.take()
        assert [event.count for event in events] == list(range(STREAM_BUFFER))
        assert dropped == 5
        log.note("lost", count=1)
        assert [event.count for event in (await stream.take())[0]] == [1]
    log.note("lost", count=2)  # nobody listens any more
