"""What each command of viommuctl does."""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from viommud.ctl import map_view, top
from viommud.ctl.client import MONITOR, STEER, CallFailed, Client, pages
from viommud.ctl.text import colours_wanted, seconds, size, table
from viommud.errors import UsageError, ViommudError
from viommud.instruments import RECORDED_BYTES
from viommud.recording import MAGIC, unpack

Command = Callable[[Client, argparse.Namespace], None]
LISTING = 1000
"""Entries asked for at once."""


def _print_json(value: object) -> None:
    print(json.dumps(value), flush=True)


def _show(options: argparse.Namespace, value: object, lines: Callable[[], list[str]]) -> None:
    if options.json:
        _print_json(value)
    else:
        print("\n".join(lines()))


def status(client: Client, options: argparse.Namespace) -> None:
    """viommuctl status."""
    found = client.call(f"{MONITOR}.GetStatus")
    counters = client.call(f"{MONITOR}.GetCounters")
    session = found["session"]

    def lines() -> list[str]:
        counts = counters["counters"]
        rows = [
            ("version", found["version"]),
            ("process", f"{found['pid']}, for {seconds(found['seconds'])}"),
            ("socket", found["socket"]),
            (
                "front-end",
                f"connected for {seconds(session['seconds'])}, rings {'run' if session['running'] else 'stand still'}"
                if session
                else "none",
            ),
        ]
        if session:
            rows += [
                ("guest memory", f"{size(session['memory_bytes'])} in {session['memory_regions']} regions"),
                ("features", " ".join(session["features"])),
            ]
        unusual = ("paused", "needs_reset", "recording", "injection_allowed")
        states = [name.replace("_", " ") for name in unusual if found[name]]
        rows += [
            ("bypass", "yes: endpoints in no domain reach all memory" if found["bypass"] else "no"),
            ("also", ", ".join(states) or "nothing unusual"),
            ("kept", f"{counts['endpoints']} endpoints, {counts['domains']} domains, {counts['mappings']} mappings"),
            ("requests", "  ".join(_request_counts(counts["requests"])) or "none"),
            ("faults", f"{counts['faults_sent']} sent, {counts['faults_dropped']} dropped"),
        ]
        return [f"{name:13} {value}" for name, value in rows]

    _show(options, {**found, **counters}, lines)


def _request_counts(requests: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for name, by_status in requests.items():
        for result, count in by_status.items():
            yield f"{name} {count}" if result == "ok" else f"{name} {result} {count}"


def endpoints(client: Client, options: argparse.Namespace) -> None:
    """viommuctl endpoints."""
    found = list(pages(client, f"{MONITOR}.ListEndpoints", "endpoints", limit=LISTING))

    def reserved(entry: Mapping[str, Any]) -> str:
        return " ".join(f"{region['first']}-{region['last']}:{region['type']}" for region in entry["reserved"])

    rows = [
        (entry["name"], entry["domain"], "yes" if entry["bypass"] else "no", entry["faults"], reserved(entry))
        for entry in found
    ]
    head = ["ENDPOINT", "DOMAIN", "BYPASS", "FAULTS", "RESERVED"]
    _show(options, found, lambda: table(head, rows, right=(1, 3)))


def domains(client: Client, options: argparse.Namespace) -> None:
    """viommuctl domains."""
    found = list(pages(client, f"{MONITOR}.ListDomains", "domains", limit=LISTING))
    rows = [
        (entry["id"], entry["endpoints"], entry["mappings"], "bypass" if entry["bypass"] else "mapped")
        for entry in found
    ]
    _show(options, found, lambda: table(["DOMAIN", "ENDPOINTS", "MAPPINGS", "KIND"], rows, right=(0, 1, 2)))


def show_map(client: Client, options: argparse.Namespace) -> None:
    """viommuctl map."""
    listing = pages(client, f"{MONITOR}.ListMappings", "mappings", domain=options.domain, limit=LISTING)
    if options.json:
        for mapping in listing:
            _print_json(mapping)
        return
    if options.list:
        for mapping in listing:
            rights = "".join(
                letter if mapping[name] else "-" for letter, name in (("r", "read"), ("w", "write"), ("m", "mmio"))
            )
            print(f"{int(mapping['first'], 16):#018x}-{int(mapping['last'], 16):#018x} {rights} {mapping['phys']}")
        return
    spans = list(
        map_view.merge(
            map_view.Span(
                int(mapping["first"], 16),
                int(mapping["last"], 16),
                map_view.kind_of(mapping["read"], mapping["write"], mapping["mmio"]),
            )
            for mapping in listing
        )
    )
    spans += _reserved(client, options.domain)
    spans.sort(key=lambda span: span.first)
    if options.svg is not None:
        try:
            options.svg.write_text(map_view.svg(spans, f"domain {options.domain}"), "utf-8")
        except OSError as error:
            raise UsageError(f"{options.svg}: {error.strerror}") from error
        return
    width = shutil.get_terminal_size().columns
    print("\n".join(map_view.draw(spans, width=width, colours=colours_wanted())))


def _reserved(client: Client, domain: int) -> list[map_view.Span]:
    regions = {
        (int(region["first"], 16), int(region["last"], 16))
        for entry in pages(client, f"{MONITOR}.ListEndpoints", "endpoints", limit=LISTING)
        if entry["domain"] == domain
        for region in entry["reserved"]
    }
    return [map_view.Span(first, last, "reserved") for first, last in regions]


def translate(client: Client, options: argparse.Namespace) -> None:
    """viommuctl translate."""
    found = client.call(
        f"{MONITOR}.Translate", endpoint=options.endpoint, address=options.address, access=options.access
    )
    _show(options, found, lambda: [found["phys"] or "nowhere: it is a fault"])


def limits(client: Client, options: argparse.Namespace) -> None:
    """viommuctl limits."""
    found = client.call(f"{MONITOR}.GetLimits")["limits"]
    rows = [(entry["name"], entry["used"], entry["peak"], entry["max"]) for entry in found]
    _show(options, found, lambda: table(["LIMIT", "USED", "PEAK", "MAX"], rows, right=(1, 2, 3)))


def _show_event(options: argparse.Namespace, event: Mapping[str, Any]) -> None:
    if options.json:
        _print_json(event)
    else:
        print(top.event_line(dict(event)), flush=True)


def _follow(client: Client, options: argparse.Namespace, kinds: list[str] | None, earlier: str | None) -> None:
    """Events as they come; those that were there before are told once the stream stands, and none twice."""
    stream = client.stream(f"{MONITOR}.Watch", kinds=kinds)
    for number, reply in enumerate(stream):
        if number == 0 and earlier is not None:
            with Client(options.path) as second:
                for event in second.call(f"{MONITOR}.{earlier}")[earlier.removeprefix("List").lower()]:
                    _show_event(options, event)
        for event in reply["events"]:
            _show_event(options, event)
        if reply["dropped"]:
            print(f"viommuctl: {reply['dropped']} events were too fast to follow", file=sys.stderr)


def faults(client: Client, options: argparse.Namespace) -> None:
    """viommuctl faults."""
    if options.follow:
        _follow(client, options, ["fault"], "ListFaults")
        return
    for event in client.call(f"{MONITOR}.ListFaults")["faults"]:
        _show_event(options, event)


def refused(client: Client, options: argparse.Namespace) -> None:
    """viommuctl refused."""
    if options.follow:
        _follow(client, options, ["refused"], "ListRefused")
        return
    for event in client.call(f"{MONITOR}.ListRefused")["refused"]:
        _show_event(options, event)


def watch(client: Client, options: argparse.Namespace) -> None:
    """viommuctl watch."""
    _follow(client, options, None, None)


def show_top(client: Client, options: argparse.Namespace) -> None:
    """viommuctl top."""
    if options.json:
        now = top.look(client)
        _print_json({name: getattr(now, name) for name in top.Look.__slots__ if name != "at"})
        return
    top.run(client, interval=max(options.interval, 0.1), once=options.once, colours=colours_wanted())


def inject(client: Client, options: argparse.Namespace) -> None:
    """viommuctl inject."""
    match options.kind:
        case "fault":
            reply = client.call(
                f"{STEER}.InjectFault",
                endpoint=options.endpoint,
                reason=options.reason,
                access=options.access,
                address=options.address,
            )
            dropped = "dropped: too many wait, or the endpoint is over its rate"
            _show(options, reply, lambda: ["queued" if reply["queued"] else dropped])
        case "list":
            armed = client.call(f"{STEER}.ListInjections")["injections"]
            _show(options, armed, lambda: [_rule_line(rule) for rule in armed] or ["nothing is armed"])
        case "clear":
            reply = client.call(f"{STEER}.ClearInjections")
            _show(options, reply, lambda: [f"{reply['cleared']} disarmed"])
        case _:
            rule = {
                "action": options.kind,
                "count": options.count,
                "request": options.request,
                "endpoint": options.endpoint,
                "domain": options.domain,
                "status": getattr(options, "status", None),
                "delay_us": getattr(options, "delay", None),
            }
            given = {name: value for name, value in rule.items() if value is not None}
            client.call(f"{STEER}.Inject", injection=given)
            _show(options, given, lambda: [f"armed: {_rule_line(given)}"])


def _rule_line(rule: Mapping[str, Any]) -> str:
    what = {"delay": f" by {rule.get('delay_us')} us", "status": f" {rule.get('status')}"}.get(rule["action"], "")
    which = [f"{name} {rule[name]}" for name in ("request", "endpoint", "domain") if rule.get(name) is not None]
    return f"{rule['action']}{what}, the next {rule['count']}{' with ' if which else ''}{', '.join(which)}"


def log_level(client: Client, options: argparse.Namespace) -> None:
    """viommuctl log-level."""
    reply = client.call(f"{STEER}.SetLogLevel", level=options.level)
    _show(options, reply, lambda: [f"was {reply['before']}"])


def set_limits(client: Client, options: argparse.Namespace) -> None:
    """viommuctl set-limits."""
    names = ("endpoints", "domains", "mappings", "mappings_per_domain")
    client.call(f"{STEER}.SetLimits", **{name: getattr(options, name) for name in names})
    if options.json:
        _print_json({})


def _plain(method: str) -> Command:
    def call(client: Client, options: argparse.Namespace) -> None:
        reply = client.call(f"{STEER}.{method}")
        if options.json:
            _print_json(reply)

    return call


def record(client: Client, options: argparse.Namespace) -> None:
    """viommuctl record: what cannot be kept up with is counted where it is missing."""
    count = lost = 0
    try:
        with options.file.open("xb") as file:
            try:
                for reply in client.stream(f"{STEER}.Record"):
                    if reply.get("header"):
                        file.write(MAGIC + reply["header"].encode() + b"\n")
                        print(f"recording into {options.file}; interrupt to end it", file=sys.stderr, flush=True)
                    entries = base64.b64decode(reply.get("entries") or "")
                    file.write(entries)
                    file.flush()
                    count += len(entries) // RECORDED_BYTES
                    lost += sum(entry.lost for entry in unpack(entries))
            except KeyboardInterrupt:
                pass
            except CallFailed:
                options.file.unlink()
                raise
            except ViommudError as error:
                print(f"viommuctl: {error.sentence}", file=sys.stderr)
    except OSError as error:
        raise UsageError(f"{options.file}: {error.strerror}") from error
    _show(options, {"entries": count, "lost": lost}, lambda: [f"{count} entries, {lost} lost"])


COMMANDS: Mapping[str, Command] = {
    "status": status,
    "endpoints": endpoints,
    "domains": domains,
    "map": show_map,
    "translate": translate,
    "limits": limits,
    "faults": faults,
    "refused": refused,
    "watch": watch,
    "top": show_top,
    "inject": inject,
    "log-level": log_level,
    "set-limits": set_limits,
    "pause": _plain("Pause"),
    "resume": _plain("Resume"),
    "record": record,
}
