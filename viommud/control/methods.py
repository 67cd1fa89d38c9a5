"""The table of methods: what can be called, with which parameters, and what does it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Any

import msgspec

from viommud import __version__
from viommud.control import monitor, steer
from viommud.control.errors import MONITOR, SERVICE, STEER, CallError, invalid_parameter
from viommud.control.monitor import Nothing, Parameters, Reply
from viommud.control.subject import Subject
from viommud.control.wire import Call

VENDOR = "viommud"


@dataclass(frozen=True, slots=True)
class Method:
    """One method; `one` answers once, `stream` again and again."""

    parameters: type[Parameters]
    one: Callable[[Subject, Any], Awaitable[Reply]] | None = None
    stream: Callable[[Subject, Any], AsyncGenerator[Reply, None]] | None = None
    end: Reply = field(default_factory=dict)
    """The last reply of a stream that ends by itself."""


_MONITOR: Mapping[str, Method] = {
    "GetStatus": Method(Nothing, monitor.get_status),
    "GetCounters": Method(Nothing, monitor.get_counters),
    "GetLimits": Method(Nothing, monitor.get_limits),
    "ListEndpoints": Method(monitor.Page, monitor.list_endpoints),
    "ListDomains": Method(monitor.Page, monitor.list_domains),
    "ListMappings": Method(monitor.MappingsPage, monitor.list_mappings),
    "Translate": Method(monitor.Lookup, monitor.translate),
    "ListRefused": Method(Nothing, monitor.list_refused),
    "ListFaults": Method(Nothing, monitor.list_faults),
    "Watch": Method(monitor.Kinds, stream=monitor.watch, end={"events": [], "dropped": 0}),
}
_STEER: Mapping[str, Method] = {
    "InjectFault": Method(steer.FaultReport, steer.inject_fault),
    "Inject": Method(steer.NewInjection, steer.inject),
    "ListInjections": Method(Nothing, steer.list_injections),
    "ClearInjections": Method(Nothing, steer.clear_injections),
    "SetLogLevel": Method(steer.Level, steer.set_log_level),
    "SetLimits": Method(steer.NewLimits, steer.set_limits),
    "Pause": Method(Nothing, steer.pause),
    "Resume": Method(Nothing, steer.resume),
    "Record": Method(Nothing, stream=steer.record, end={"lost": 0}),
}

INTERFACES: Mapping[str, Mapping[str, Method]] = MappingProxyType({MONITOR: _MONITOR, STEER: _STEER})
"""By name: their methods, by name."""


class InterfaceName(Parameters, frozen=True):
    """Parameters of GetInterfaceDescription."""

    interface: str


def description(interface: str) -> str:
    """An interface in varlink's own language."""
    return (resources.files(__package__) / f"{interface}.varlink").read_text("utf-8")


def find(call: Call, interfaces: tuple[str, ...]) -> tuple[Method, Parameters]:
    """What does a call, and its parameters, among the interfaces that a socket serves.

    :raises CallError: there is no such method, or its parameters are wrong.
    """
    interface, _, name = call.method.rpartition(".")
    if interface == SERVICE:
        method = _service(interfaces).get(name)
    elif interface in interfaces:
        method = INTERFACES[interface].get(name)
    else:
        raise CallError(f"{SERVICE}.InterfaceNotFound", interface=interface)
    if method is None:
        raise CallError(f"{SERVICE}.MethodNotFound", method=call.method)
    try:
        parameters = msgspec.json.decode(bytes(call.parameters) or b"{}", type=method.parameters)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid_parameter(_culprit(str(error))) from None
    if method.stream is not None and not call.more:
        raise CallError(f"{SERVICE}.ExpectedMore")
    return method, parameters


def _culprit(message: str) -> str:
    """The name of the parameter that an error of msgspec is about; the whole message where it names none."""
    _, at, path = message.rpartition(" - at `$.")
    if at:
        return path.removesuffix("`")
    _, at, rest = message.partition("field `")
    return rest.partition("`")[0] if at else message


def _service(interfaces: tuple[str, ...]) -> Mapping[str, Method]:
    async def get_info(_subject: Subject, _parameters: Nothing) -> Reply:
        return {
            "vendor": VENDOR,
            "product": "viommud",
            "version": __version__,
            "url": "https://varlink.org",
            "interfaces": [SERVICE, *interfaces],
        }

    async def get_interface_description(_subject: Subject, parameters: InterfaceName) -> Reply:
        if parameters.interface not in (SERVICE, *interfaces):
            raise CallError(f"{SERVICE}.InterfaceNotFound", interface=parameters.interface)
        return {"description": description(parameters.interface)}

    return {
        "GetInfo": Method(Nothing, get_info),
        "GetInterfaceDescription": Method(InterfaceName, get_interface_description),
    }
