"""Metrics without a guest, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from viommud.config import parse
from viommud.control.subject import Subject
from viommud.daemon import make_engine
from viommud.device_setup import plan
from viommud.instruments import TIME_BUCKETS, ServiceTimes, bucket_start
from viommud.metrics import BUCKETS_NS, render

DASHBOARD = Path(__file__).parents[2] / "share" / "grafana" / "viommud.json"


def test_every_family_is_described_once() -> None:
    """HELP and TYPE before the samples of each; no sample twice; with and without an engine."""
    setup = plan(parse(""))
    subject = Subject(setup, "here")
    without = render(subject)
    with make_engine(setup) as engine:
        subject.engine = engine
        text = render(subject)
    for shown in (without, text):
        families = re.findall(r"^# TYPE (\w+) (\w+)$", shown, re.MULTILINE)
        assert len({name for name, _ in families}) == len(families) == shown.count("# HELP ")
        samples = [line.rpartition(" ")[0] for line in shown.splitlines() if not line.startswith("#")]
        assert len(set(samples)) == len(samples)
        kinds = dict(families)
        for sample in samples:
            name = sample.partition("{")[0]
            assert name in kinds or kinds[re.sub(r"_(bucket|sum|count)$", "", name)] == "histogram"
            assert kinds.get(name) != "counter" or name.endswith("_total")
    assert set(without.splitlines()[0:2]) <= set(text.splitlines())


def test_bounds_are_where_buckets_begin() -> None:
    """Or a cumulative count would be wrong."""
    assert set(BUCKETS_NS) <= {bucket_start(bucket) for bucket in range(TIME_BUCKETS)}


@given(st.lists(st.integers(0, 1000), min_size=TIME_BUCKETS, max_size=TIME_BUCKETS))
def test_service_times(counts: list[int]) -> None:
    """Percentiles are in order and at the end of a bucket that has something in it; differences are what was added."""
    times = ServiceTimes(tuple(counts), 7)
    assert (times - times).total == 0
    found = [times.percentile(part) for part in (0.0, 0.5, 0.99, 1.0)]
    if not times.total:
        assert found == [None] * 4
        return
    known = [value for value in found if value is not None]
    assert known == sorted(known)
    assert times.below(known[-1]) == times.total
    assert times.below(known[1]) >= 0.5 * times.total
    assert times.below(0) == 0


def test_the_dashboard_shows_what_there_is() -> None:
    """Every metric that it asks for is one of ours, with labels that it has."""
    setup = plan(parse(""))
    with make_engine(setup) as engine:
        text = render(Subject(setup, "here", engine=engine))
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"viommud_\w+", "\n".join(expressions)))
    assert asked
    assert asked <= set(re.findall(r"^(viommud_\w+)", text, re.MULTILINE))
    for expression in expressions:
        for labels in re.findall(r"by \(([\w, ]+)\)", expression):
            assert set(re.split(r",\s*", labels)) <= {"type", "status", "le", "instance"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
