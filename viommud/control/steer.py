"""The methods of org.viommud.Steer: they change what a running daemon does."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

import msgspec
import trio

from viommud import log
from viommud.control.errors import MONITOR, STEER, CallError, invalid_parameter
from viommud.control.monitor import ACCESS, U32, Access, Address, Nothing, Parameters, Reply
from viommud.control.subject import Subject
from viommud.engine import REQUEST_NAMES, STATUS_NAMES, Engine
from viommud.events import FAULT_REASONS
from viommud.instruments import DELAY_MAX_NS, INJECTIONS_MAX, Action, Injection
from viommud.recording import header_of

FAULT_ADDRESS = 0x100
"""Flag of a fault report: the address is known."""
RECORD_PAUSE = 0.02
"""Seconds between two looks at a recording that had nothing new."""
ALLOW_HINT = "control.allow-injection = true in the configuration allows it"

Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
PositiveU32 = Annotated[int, msgspec.Meta(ge=1, le=0xFFFF_FFFF)]
Request = Literal["attach", "detach", "map", "unmap", "probe"]
Status = Literal["ok", "ioerr", "unsupp", "deverr", "inval", "range", "noent", "fault", "nomem", "unanswered"]


class FaultReport(Parameters, frozen=True):
    """A fault to be reported to the guest."""

    endpoint: U32
    reason: Literal["unknown", "domain", "mapping"] | None = None
    access: Access | None = None
    address: Address | None = None


class Rule(Parameters, frozen=True, omit_defaults=True):
    """An injection, as on the wire."""

    action: Literal["delay", "status", "drop", "hang"]
    count: Positive = 1
    request: Request | None = None
    endpoint: U32 | None = None
    domain: U32 | None = None
    status: Status | None = None
    delay_us: Annotated[int, msgspec.Meta(ge=1, le=DELAY_MAX_NS // 1000)] | None = None


class NewInjection(Parameters, frozen=True):
    """Parameters of Inject."""

    injection: Rule


class Level(Parameters, frozen=True):
    """Parameters of SetLogLevel."""

    level: Literal["debug", "info", "warning", "error"]


class NewLimits(Parameters, frozen=True):
    """Parameters of SetLimits."""

    endpoints: PositiveU32 | None = None
    domains: PositiveU32 | None = None
    mappings: Positive | None = None
    mappings_per_domain: Positive | None = None


def _require_permission(subject: Subject) -> None:
    if not subject.allow_injection:
        raise CallError(f"{STEER}.InjectionNotAllowed", hint=ALLOW_HINT)


async def inject_fault(subject: Subject, parameters: FaultReport) -> Reply:
    """InjectFault."""
    _require_permission(subject)
    flags = ACCESS[parameters.access or "none"] | (0 if parameters.address is None else FAULT_ADDRESS)
    reason = FAULT_REASONS.index(parameters.reason or "mapping")
    try:
        queued = subject.require_engine().raise_fault(
            parameters.endpoint, reason, flags, int(parameters.address or "0", 16)
        )
    except ValueError:
        raise CallError(f"{MONITOR}.NoSuchEndpoint", endpoint=parameters.endpoint) from None
    return {"queued": queued}


async def inject(subject: Subject, parameters: NewInjection) -> Reply:
    """Inject."""
    _require_permission(subject)
    rule = parameters.injection
    if (rule.action == "delay") != (rule.delay_us is not None):
        raise invalid_parameter("delay_us")
    if (rule.action == "status") != (rule.status is not None):
        raise invalid_parameter("status")
    injection = Injection(
        Action[rule.action.upper()],
        rule.count,
        0 if rule.request is None else REQUEST_NAMES.index(rule.request),
        rule.endpoint,
        rule.domain,
        0 if rule.status is None else STATUS_NAMES.index(rule.status),
        (rule.delay_us or 0) * 1000,
    )
    try:
        await subject.ask(lambda engine: engine.instruments.inject(injection))
    except OverflowError:
        raise CallError(f"{STEER}.TooManyInjections", max=INJECTIONS_MAX) from None
    return {}


def _on_the_wire(injection: Injection) -> Rule:
    return Rule(
        action=injection.action.name.lower(),  # type: ignore[arg-type]
        count=injection.count,
        request=REQUEST_NAMES[injection.type] if injection.type else None,  # type: ignore[arg-type]
        endpoint=injection.endpoint,
        domain=injection.domain,
        status=STATUS_NAMES[injection.status] if injection.action is Action.STATUS else None,  # type: ignore[arg-type]
        delay_us=injection.delay_ns // 1000 or None,
    )


async def list_injections(subject: Subject, _parameters: Nothing) -> Reply:
    """ListInjections."""
    armed = await subject.ask(lambda engine: engine.instruments.injections())
    return {"injections": [_on_the_wire(injection) for injection in armed]}


async def clear_injections(subject: Subject, _parameters: Nothing) -> Reply:
    """ClearInjections."""

    def clear(engine: Engine) -> int:
        cleared = len(engine.instruments.injections())
        engine.instruments.clear_injections()
        return cleared

    return {"cleared": await subject.ask(clear)}


async def set_log_level(_subject: Subject, parameters: Level) -> Reply:
    """SetLogLevel."""
    before = log.level()
    log.set_level(parameters.level)
    return {"before": before}


async def set_limits(subject: Subject, parameters: NewLimits) -> Reply:
    """SetLimits."""

    def change(engine: Engine) -> None:
        settings = engine.settings
        engine.set_limits(
            endpoints=parameters.endpoints or settings.max_endpoints,
            domains=parameters.domains or settings.max_domains,
            mappings=parameters.mappings or settings.max_mappings,
            mappings_per_domain=parameters.mappings_per_domain or settings.max_domain_mappings,
        )

    await subject.ask(change)
    return {}


def _set_paused(engine: Engine, paused: bool) -> None:
    engine.instruments.paused = paused


async def pause(subject: Subject, _parameters: Nothing) -> Reply:
    """Pause."""
    await subject.ask(lambda engine: _set_paused(engine, True))
    return {}


async def resume(subject: Subject, _parameters: Nothing) -> Reply:
    """Resume."""
    await subject.ask(lambda engine: _set_paused(engine, False))
    return {}


async def record(subject: Subject, _parameters: Nothing) -> AsyncGenerator[Reply, None]:
    """Record: until the caller goes, or the guest does."""

    def start(engine: Engine) -> Engine:
        if subject.recording:
            raise CallError(f"{STEER}.RecordingAlready")
        engine.instruments.start_recording()
        subject.recording_began()
        return engine

    engine = await subject.ask(start)
    try:
        stats = engine.stats()
        yield {"header": header_of(subject.setup, complete=not stats.domains and not stats.requests), "lost": 0}
        while subject.engine is engine:
            entries, lost = engine.instruments.take_recorded()
            if entries:
                yield {"entries": base64.b64encode(entries).decode(), "lost": lost}
            else:
                await trio.sleep(RECORD_PAUSE)
        for entries in subject.take_left_over():
            yield {"entries": base64.b64encode(entries).decode(), "lost": 0}
    finally:
        subject.recording_ended()
        if subject.engine is engine:
            engine.instruments.stop_recording()
