"""The methods of org.viommud.Monitor: they look and change nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any, Literal

import msgspec

from viommud import __version__, log
from viommud.control.errors import MONITOR, CallError, invalid_parameter
from viommud.control.subject import Subject
from viommud.endpoint_id import show
from viommud.engine import PAGE, Engine, Mapping
from viommud.events import EVENT_KINDS, EventKind
from viommud.instruments import bucket_start
from viommud.report import feature_names
from viommud.schema import U64_MAX
from viommud.settings import Reserved
from viommud.vhost_user.features import VHOST_USER_BITS

LISTING_MAX = 1000
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=LISTING_MAX)]
Address = Annotated[str, msgspec.Meta(pattern="^0x[0-9a-fA-F]{1,16}$")]
Access = Literal["none", "read", "write"]
ACCESS: dict[str, int] = {"none": 0, "read": 1, "write": 2}

MAP_READ, MAP_WRITE, MAP_MMIO = 1, 2, 4

Reply = dict[str, Any]


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a call."""


class Nothing(Parameters, frozen=True):
    """A call without parameters."""


class Page(Parameters, frozen=True):
    """A page of a listing by ID."""

    from_: U32 | None = msgspec.field(default=None, name="from")
    limit: Limit | None = None


class MappingsPage(Parameters, frozen=True):
    """A page of a domain's mappings."""

    domain: U32
    from_: Address | None = msgspec.field(default=None, name="from")
    limit: Limit | None = None


class Lookup(Parameters, frozen=True):
    """An access of an endpoint."""

    endpoint: U32
    address: Address
    access: Access | None = None


class Kinds(Parameters, frozen=True):
    """Kinds of events; None: all."""

    kinds: tuple[EventKind, ...] | None = None


async def get_status(subject: Subject, _parameters: Nothing) -> Reply:
    """GetStatus."""
    engine = subject.engine
    session = subject.session
    return {
        "version": __version__,
        "pid": subject.pid,
        "seconds": round(time.monotonic() - subject.started, 3),
        "socket": subject.socket,
        "session": session
        and {
            "seconds": round(time.monotonic() - subject.session_started, 3),
            "features": feature_names(session.features & ~VHOST_USER_BITS),
            "memory_regions": len(session.memory),
            "memory_bytes": sum(region.size for region in session.memory),
            "running": session.running,
        },
        "paused": engine is not None and engine.instruments.paused,
        "bypass": engine is not None and engine.bypass,
        "needs_reset": engine is not None and engine.needs_reset,
        "log_level": log.level(),
        "injection_allowed": subject.allow_injection,
        "recording": subject.recording,
    }


async def get_counters(subject: Subject, _parameters: Nothing) -> Reply:
    """GetCounters."""
    engine = subject.require_engine()
    times = engine.instruments.service_times()
    return {
        "counters": engine.stats(),
        "times": {
            "every": engine.settings.time_every,
            "sum_ns": times.sum_ns,
            "p50_ns": times.percentile(0.5),
            "p99_ns": times.percentile(0.99),
            "buckets": [
                {"below_ns": bucket_start(bucket + 1), "count": count}
                for bucket, count in enumerate(times.counts)
                if count
            ],
        },
    }


async def get_limits(subject: Subject, _parameters: Nothing) -> Reply:
    """GetLimits."""
    engine = subject.require_engine()
    settings, stats = engine.settings, engine.stats()
    limits = [
        ("endpoints", stats.endpoints, None, settings.max_endpoints),
        ("domains", stats.domains, stats.peak_domains, settings.max_domains),
        ("mappings", stats.mappings, stats.peak_mappings, settings.max_mappings),
        ("mappings-per-domain", None, None, settings.max_domain_mappings),
        ("faults", None, None, settings.max_faults),
        ("fault-wait-ms", None, None, settings.fault_wait_ms),
        ("fault-burst", None, None, settings.fault_burst),
        ("fault-rate", None, None, settings.fault_rate),
    ]
    return {"limits": [dict(zip(("name", "used", "peak", "max"), limit, strict=True)) for limit in limits]}


def _region(reserved: Reserved) -> Reply:
    return {"first": f"{reserved.first:#x}", "last": f"{reserved.last:#x}", "type": reserved.kind.name.lower()}


async def list_endpoints(subject: Subject, parameters: Page) -> Reply:
    """ListEndpoints."""
    limit = parameters.limit or PAGE
    found = await subject.ask(lambda engine: engine.endpoints_from(parameters.from_ or 0, limit))
    listed = [
        {
            "id": entry.id,
            "name": show(entry.id),
            "domain": entry.domain,
            "bypass": entry.bypass,
            "faults": entry.faults,
            "reserved": [
                _region(region)
                for known in subject.setup.endpoints
                if known.first <= entry.id <= known.last
                for region in known.reserved
            ],
        }
        for entry in found
    ]
    return {"endpoints": listed, "next": _next_id([entry.id for entry in found], limit)}


async def list_domains(subject: Subject, parameters: Page) -> Reply:
    """ListDomains."""
    limit = parameters.limit or PAGE
    found = await subject.ask(lambda engine: engine.domains_from(parameters.from_ or 0, limit))
    return {"domains": found, "next": _next_id([entry.id for entry in found], limit)}


def _next_id(ids: list[int], limit: int) -> int | None:
    return ids[-1] + 1 if len(ids) == limit and ids[-1] < 0xFFFF_FFFF else None


def _mappings(domain: int, start: int, limit: int) -> Callable[[Engine], list[Mapping]]:
    def question(engine: Engine) -> list[Mapping]:
        try:
            return engine.mappings(domain, start, limit)
        except KeyError:
            raise CallError(f"{MONITOR}.NoSuchDomain", domain=domain) from None

    return question


async def list_mappings(subject: Subject, parameters: MappingsPage) -> Reply:
    """ListMappings: the worker is asked for a few at a time, so that the guest notices nothing."""
    start = int(parameters.from_ or "0", 16)
    limit = parameters.limit or PAGE
    found: list[Mapping] = []
    following: int | None = start
    while following is not None and len(found) < limit:
        wanted = min(PAGE, limit - len(found))
        page = await subject.ask(_mappings(parameters.domain, following, wanted))
        found += page
        following = page[-1].last + 1 if len(page) == wanted and page[-1].last < U64_MAX else None
    listed = [
        {
            "first": f"{mapping.first:#x}",
            "last": f"{mapping.last:#x}",
            "phys": f"{mapping.phys:#x}",
            "read": bool(mapping.flags & MAP_READ),
            "write": bool(mapping.flags & MAP_WRITE),
            "mmio": bool(mapping.flags & MAP_MMIO),
        }
        for mapping in found
    ]
    return {"mappings": listed, "next": None if following is None else f"{following:#x}"}


async def translate(subject: Subject, parameters: Lookup) -> Reply:
    """Translate."""
    address, access = int(parameters.address, 16), ACCESS[parameters.access or "none"]
    try:
        phys = await subject.ask(lambda engine: engine.translate(parameters.endpoint, address, access))
    except ValueError:
        raise CallError(f"{MONITOR}.NoSuchEndpoint", endpoint=parameters.endpoint) from None
    return {"phys": None if phys is None else f"{phys:#x}"}


async def list_refused(subject: Subject, _parameters: Nothing) -> Reply:
    """ListRefused."""
    return {"refused": subject.events.last("refused")}


async def list_faults(subject: Subject, _parameters: Nothing) -> Reply:
    """ListFaults."""
    return {"faults": subject.events.last("fault")}


async def watch(subject: Subject, parameters: Kinds) -> AsyncGenerator[Reply, None]:
    """Watch.  The first reply comes at once and is empty: from then on nothing is missed."""
    if parameters.kinds == ():
        raise invalid_parameter("kinds")
    with subject.events.stream(EVENT_KINDS if parameters.kinds is None else parameters.kinds) as stream:
        yield {"events": [], "dropped": 0}
        while True:
            events, dropped = await stream.take()
            yield {"events": events, "dropped": dropped}
