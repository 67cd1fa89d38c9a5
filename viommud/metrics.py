"""Metrics in the text format of Prometheus.

Labels come from sets the program fixes, never from a guest: however many domains it makes, the number of lines stays.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from viommud import __version__
from viommud.control.subject import Subject
from viommud.engine import REQUEST_NAMES, STATUS_NAMES
from viommud.instruments import ServiceTimes
from viommud.log import lines_dropped

BUCKETS_NS = tuple(1 << power for power in range(8, 31))
"""Upper bounds of the histogram: 256 ns to 1 s, each twice the one before."""

Sample = tuple[Mapping[str, str], float]


def render(subject: Subject) -> str:
    """All metrics as text."""
    return "".join(_lines(subject))


def _number(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP viommud_{name} {text}\n# TYPE viommud_{name} {kind}\n"
    for labels, value in samples:
        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"viommud_{name}{{{shown}}} {_number(value)}\n" if shown else f"viommud_{name} {_number(value)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _one(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    return _family(name, kind, text, [({}, value)])


def _labelled(name: str, kind: str, text: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
    return _family(name, kind, text, [({label: key}, value) for key, value in values.items()])


def _lines(subject: Subject) -> Iterator[str]:
    yield from _family("build_info", "gauge", "Constant 1; the version is a label.", [({"version": __version__}, 1)])
    yield from _one("up_seconds", "gauge", "Seconds since the daemon started.", time.monotonic() - subject.started)
    yield from _one("front_end", "gauge", "1 while a front-end is connected.", subject.session is not None)
    counts = subject.counts
    yield from _one("sessions_total", "counter", "Front-ends that were served.", counts.sessions)
    yield from _one(
        "protocol_errors_total", "counter", "Front-ends that broke the vhost-user protocol.", counts.protocol_errors
    )
    yield from _one("control_calls_total", "counter", "Calls on the control sockets.", counts.control_calls)
    yield from _labelled(
        "control_connections_closed_total",
        "counter",
        "Control connections that were closed by the daemon.",
        "reason",
        {"limit": counts.control_refused, "protocol": counts.control_broken, "slow": counts.control_slow},
    )
    yield from _one("log_lines_dropped_total", "counter", "Log lines that could not be written.", lines_dropped())
    if subject.engine is not None:
        yield from _engine(subject)


def _engine(subject: Subject) -> Iterator[str]:
    engine = subject.require_engine()
    stats, settings, paused = engine.stats(), engine.settings, engine.instruments.paused
    yield from _family(
        "requests_total",
        "counter",
        "Requests of the guest.",
        [
            ({"type": request, "status": status}, stats.requests.get(request, {}).get(status, 0))
            for request in REQUEST_NAMES
            for status in STATUS_NAMES
            if request != "unknown" or status == "unanswered"
        ],
    )
    yield from _histogram(engine.instruments.service_times(), settings.time_every)
    yield from _labelled(
        "objects",
        "gauge",
        "What the guest made the daemon keep.",
        "kind",
        {"endpoints": stats.endpoints, "domains": stats.domains, "mappings": stats.mappings},
    )
    yield from _labelled(
        "objects_peak",
        "gauge",
        "The most there were at once.",
        "kind",
        {"domains": stats.peak_domains, "mappings": stats.peak_mappings},
    )
    yield from _labelled(
        "limit",
        "gauge",
        "How many there may be.",
        "kind",
        {"endpoints": settings.max_endpoints, "domains": settings.max_domains, "mappings": settings.max_mappings},
    )
    yield from _one("mapping_bytes", "gauge", "Memory of the daemon behind all mappings.", stats.mapping_bytes)
    yield from _one("limit_hits_total", "counter", "Requests refused because of a limit.", stats.limit_hits)
    yield from _one("faults_sent_total", "counter", "Fault reports given to the guest.", stats.faults_sent)
    yield from _one("faults_dropped_total", "counter", "Fault reports that were not.", stats.faults_dropped)
    yield from _one("rings_broken_total", "counter", "Rings that made no sense and were stopped.", stats.rings_broken)
    yield from _one("kicks_total", "counter", "Times the worker was woken by the guest.", stats.kicks)
    yield from _one("notifications_total", "counter", "Interrupts asked for.", stats.notifications)
    yield from _one("batches_total", "counter", "Batches of requests.", stats.batches)
    yield from _labelled(
        "worker_seconds_total",
        "counter",
        "What the worker spent its time on; the rest it slept.",
        "state",
        {"busy": stats.busy_ns / 1e9, "spin": stats.spin_ns / 1e9},
    )
    yield from _one("worker_sleeps_total", "counter", "Times the worker fell asleep.", stats.sleeps)
    yield from _one("worker_asleep", "gauge", "1 while it waits for a kick.", stats.asleep)
    yield from _one("paused", "gauge", "1 while serving is paused.", paused)


def _histogram(times: ServiceTimes, every: int) -> Iterator[str]:
    """A histogram as Prometheus has it: cumulative, in seconds."""
    text = (
        "From the worker's look at a batch of requests until its answers are visible, for each request; "
        f"of one batch in {every}."
        if every
        else "Service times; none are taken."
    )
    yield f"# HELP viommud_request_seconds {text}\n# TYPE viommud_request_seconds histogram\n"
    for bound in BUCKETS_NS:
        yield f'viommud_request_seconds_bucket{{le="{bound / 1e9!r}"}} {times.below(bound)}\n'
    yield f'viommud_request_seconds_bucket{{le="+Inf"}} {times.total}\n'
    yield f"viommud_request_seconds_sum {times.sum_ns / 1e9!r}\nviommud_request_seconds_count {times.total}\n"
