"""Kernel events of recorded replays and our kernels: who is who."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.execution.host import Plan
from opara_backend.memory import plan_memory
from opara_backend.options import Options
from opara_backend.profiling.profile import Profile
from opara_backend.report.assignment import HANDOVER, RESOLUTION, Event
from opara_backend.report.build import graph_reports
from opara_backend.report.matching import match
from opara_backend.report.measured import measured, replays
from opara_backend.report.model import Report
from opara_backend.report.record import GraphRecord
from opara_backend.report.replays import plans, with_events, with_measured
from opara_backend.report.timelines import predicted
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import happens_before
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.recorded_replays import NAMES, recorded
from tests.strategies import graph_of


@pytest.mark.parametrize("name", NAMES)
def test_recorded_events_are_grouped_by_replay(name: str) -> None:
    found = recorded(name)
    groups = replays(found.events)
    launches = sum(map(len, found.launches))
    assert [len(group) for group in groups] == [launches] * 3


@pytest.mark.parametrize(("name", "told_apart"), [("googlenet", 3), ("moe_decode", 2)])
def test_recorded_replays_are_told_apart_and_keep_happens_before(name: str, told_apart: int) -> None:
    """The third replay of the mixture of experts has 64 equal products on 11 branches; the search gives it up."""
    found = recorded(name)
    before = happens_before(found.schedule)
    matches = [match(found.graph, found.schedule, found.launches, events) for events in replays(found.events)]
    good = [m for m in matches if m is not None]
    assert len(good) >= told_apart
    for m in good:
        for b in range(len(found.graph)):
            clock = before.clock(b)
            for a in range(len(found.graph)):
                if a != b and before.precedes(a, clock):
                    (_, end), (start, _) = m.times[a] or (0.0, 0.0), m.times[b] or (0.0, 0.0)
                    assert end <= start + HANDOVER


def test_googlenet_is_told_apart_without_doubt_but_for_two_pairs() -> None:
    found = recorded("googlenet")
    for events in replays(found.events):
        m = match(found.graph, found.schedule, found.launches, events)
        assert m is not None
        assert m.ambiguous == (24, 25, 61, 62)
        for b, waits in enumerate(found.schedule.waits):
            assert all((m.times[a] or (0, 0))[1] <= (m.times[b] or (0, 0))[0] + RESOLUTION for a in waits)
        bare = match(found.graph, found.schedule, [()] * len(found.graph), events)
        assert bare is not None
        assert bare.times == m.times


@pytest.mark.parametrize("name", NAMES)
def test_the_measured_timeline(name: str) -> None:
    found = recorded(name)
    line = found.timeline()
    assert line is not None
    assert [s.kernel for s in line.spans] == list(found.schedule.order)
    assert min(s.start for s in line.spans) == 0.0
    assert all(s.stream == found.schedule.stream[s.kernel] and s.end > s.start for s in line.spans)
    # The profiler's durations, kernels side by side, against events', one after the other.
    alone = sum(k.duration for k in found.profile.kernels)
    assert 0.8 * alone < sum(s.end - s.start for s in line.spans) < 1.6 * alone


def test_a_report_gains_what_a_trace_tells() -> None:
    found, other = recorded("googlenet"), recorded("moe_decode")
    records = []
    for one in (found, other):
        plan = Plan(one.graph, one.profile, one.schedule, plan_memory(one.graph, one.schedule))
        records.append(GraphRecord(one.graph, Options(), plans={(): (plan, True), ("in order",): (plan, False)}))
    report = Report("both", "a GPU", (), graphs=tuple(g for r in records for g in graph_reports(r, GPU)))
    mixed = with_events(report, plans(records), [*found.events, *other.events])
    for graph, one in zip(mixed.graphs, (found, other), strict=True):
        assert graph.shapes[0].timeline("measured") == one.timeline()
        assert graph.shapes[1].timeline("measured") is None
    alone = with_events(report, plans(records), found.events)
    assert any("none of 3 replays" in note for note in alone.graphs[1].shapes[0].notes)
    assert any(
        "none of 0 replays" in note for note in with_events(report, plans(records), []).graphs[0].shapes[0].notes
    )


def test_shapes_that_profiled_calls_bring_or_take_are_not_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is matched with the plans that it was made from: another shape has other kernels' times."""
    found, other = recorded("googlenet"), recorded("moe_decode")
    ours, theirs = (
        (Plan(one.graph, one.profile, one.schedule, plan_memory(one.graph, one.schedule)), True)
        for one in (found, other)
    )
    record = GraphRecord(found.graph, Options(), plans={("first",): ours})
    report = Report("one", "a GPU", (), graphs=tuple(graph_reports(record, GPU)))

    def profiled(call: object) -> object:
        record.plans = {("second",): theirs, ("third",): theirs}
        return found.events

    monkeypatch.setattr("opara_backend.report.replays.profiled", profiled)
    (graph,) = with_measured(report, [record], lambda: None).graphs
    assert [shape.timeline("measured") for shape in graph.shapes] == [found.timeline()]


def test_replays_of_another_graph_are_not_ours() -> None:
    ours, other = recorded("googlenet"), recorded("moe_decode")
    assert measured(ours.graph, ours.schedule, ours.launches, replays(other.events)) is None
    (first, *_) = replays(ours.events)
    renamed = [replace(e, name="somebody_elses") if e.name.startswith("triton") else e for e in first]
    assert match(ours.graph, ours.schedule, ours.launches, renamed) is None
    assert match(ours.graph, ours.schedule, ours.launches, first[1:]) is None


SHORTEST = 0.5e-6


@given(gpu_schedules(), st.randoms(use_true_random=False))
def test_what_was_simulated_is_found_again(scheduled: Scheduled, rng: random.Random) -> None:
    graph, profile, schedule = scheduled
    if not len(graph):
        return
    # As when profiling: no kernel takes less than events resolve.
    profile = Profile(tuple(replace(k, duration=max(k.duration, SHORTEST)) for k in profile.kernels), GPU)
    plan, _ = predicted(graph, profile, schedule)
    launches = [k.launches[:1] for k in profile.kernels]
    known = any(launches)
    events = []
    for span in plan.spans:
        launch = launches[span.kernel][0] if launches[span.kernel] else None
        if known and launch is None:
            continue
        grid, block = (launch.grid, launch.block) if launch else ((1, 1, 1), (32, 1, 1))
        shared = launch.shared_memory if launch else 0
        events.append(Event(graph.kernels[span.kernel].call, span.start, span.end, grid, block, shared, span.stream))
    rng.shuffle(events)
    m = match(graph, schedule, launches, events)
    assert m is not None
    first = min(e.start for e in events) if events else 0.0
    for span in plan.spans:
        if launches[span.kernel] or not known:
            assert m.times[span.kernel] == (span.start - first, span.end - first)
        else:
            assert m.times[span.kernel] is None
    assert m.ambiguous == ()  # every kernel of these graphs has a name of its own


def test_library_calls_that_look_the_same_are_said_to() -> None:
    graph = graph_of(("in", "a"), ("in", "b"), ("a b", "c"))
    graph = replace(graph, kernels=tuple(replace(k, kind="extern") for k in graph.kernels))
    profile = Profile((kernel(2e-6, 4), kernel(2e-6, 4), kernel(2e-6, 9)), GPU)
    schedule = build(graph, profile, policy="opara", launch_order="program", streams=2)
    launches = [k.launches for k in profile.kernels]
    events = [
        Event("gemm", start, start + 2e-6, launch.grid, launch.block, launch.shared_memory, branch)
        for start, branch, (launch,) in zip((0.0, 1e-6, 5e-6), (7, 8, 7), launches, strict=True)
    ]
    m = match(graph, schedule, launches, events)
    assert m is not None
    assert m.ambiguous == (0, 1)
    assert m.times[2] == pytest.approx((5e-6, 7e-6))
