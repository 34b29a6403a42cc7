"""Reports as data and text, made of drawn and of recorded schedules. Needs no torch."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given

from opara_backend.fallback import Fallback, FallbackReason, why_host
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import plan_memory
from opara_backend.options import Options
from opara_backend.profiling.device import PRESETS
from opara_backend.profiling.profile import Profile
from opara_backend.report.build import fallback_row, graph_reports, shape_name, shape_report
from opara_backend.report.drawing import dot, mermaid
from opara_backend.report.hazards import wait_rows
from opara_backend.report.model import GraphReport, KernelRow, Report, ReportError, ShapeReport, Span, Timeline
from opara_backend.report.page import page
from opara_backend.report.record import GraphRecord, Stages, Timed
from opara_backend.report.timelines import critical_chain, overlap_fraction, overlaps, predicted
from opara_backend.scheduling.bounds import critical_path
from opara_backend.scheduling.policies import build, in_a_row
from opara_backend.scheduling.schedule import Schedule, happens_before
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.recorded_replays import NAMES, report_of
from tests.strategies import graph_of, graph_with_edges


def report_with(shape: ShapeReport, graph: KernelGraph) -> Report:
    edges = tuple((e.src, e.dst, e.kind, e.buffer) for e in graph.edges)
    one = GraphReport("cuda:0", graph.segments, graph.symbols, edges, 1, 2, 1 / 3, Stages(compile=0.5), (), (shape,))
    return Report("Model", "a GPU", (("torch", "2"),), (("policy", "opara"),), (one,), modules=(("a", "B"),))


def diamond() -> Scheduled:
    """One kernel, two that read its result, one that reads theirs; the second of the two is the longer."""
    graph = graph_of(("in", "a"), ("a", "b"), ("a", "c"), ("b c", "d"), outputs=("d",))
    profile = Profile(tuple(kernel(seconds, 10) for seconds in (3e-6, 5e-6, 9e-6, 4e-6)), GPU)
    return graph, profile, build(graph, profile, policy="opara", launch_order="opara", streams=2)


@given(gpu_schedules())
def test_json_gives_the_report_back(scheduled: Scheduled) -> None:
    graph, profile, schedule = scheduled
    found = report_with(shape_report(graph, profile, schedule), graph)
    text = found.to_json()
    assert json.loads(text)["schema"] == 3
    assert Report.from_json(text) == found


@pytest.mark.parametrize("name", NAMES)
def test_recorded_reports_go_through_json(name: str) -> None:
    assert Report.from_json(report_of(name).to_json()) == report_of(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a report"),
        ("[]", "schema 'list'"),
        ('{"schema": 99}', "schema 99; this version reads 3"),
        ('{"schema": 3, "model": "x"}', "report: .*device.* expected, found model"),
        (report_of("googlenet").to_json().replace('"model":"GoogLeNet"', '"model":7'), "report.model: str expected"),
    ],
)
def test_text_that_is_no_report_is_told_apart(text: str, says: str) -> None:
    with pytest.raises(ReportError, match=says):
        Report.from_json(text)


@given(gpu_schedules())
def test_every_wait_has_a_reason_and_removing_it_leaves_that_open(scheduled: Scheduled) -> None:
    graph, _, schedule = scheduled
    rows = wait_rows(graph, schedule)
    assert len(rows) == schedule.wait_count
    for row in rows:
        assert row.hazards
        waits = [list(w) for w in schedule.waits]
        waits[row.kernel].remove(row.awaited)
        without = happens_before(Schedule(schedule.stream, schedule.order, tuple(map(tuple, waits))))
        for hazard in row.hazards:
            assert hazard.kind == "ORDER" or not without.precedes(hazard.first, without.clock(hazard.second))


@given(gpu_schedules(contended=False))
def test_predicted_spans_keep_order_and_take_as_long_as_profiled(scheduled: Scheduled) -> None:
    graph, profile, schedule = scheduled
    plan, sequential = predicted(graph, profile, schedule) or (None, None)
    if plan is None or sequential is None:
        assert not len(graph)
        return
    assert sorted(s.kernel for s in plan.spans) == list(range(len(graph)))
    ends = {s.kernel: s.end for s in plan.spans}
    for span in plan.spans:
        assert all(ends[before] <= span.start + 1e-12 for before in schedule.waits[span.kernel])
        assert span.end - span.start >= profile.kernels[span.kernel].duration * (1 - 1e-9) - 1e-12
    for span in sequential.spans:
        assert span.end - span.start == pytest.approx(profile.kernels[span.kernel].duration, abs=1e-12)


@given(gpu_schedules())
def test_the_critical_chain_is_a_chain_as_long_as_the_bound(scheduled: Scheduled) -> None:
    graph, profile, _ = scheduled
    chain = critical_chain(graph, profile.durations())
    assert sum(profile.kernels[k].duration for k in chain) == pytest.approx(critical_path(graph, profile))
    assert all(later in graph.successors(earlier) for earlier, later in itertools.pairwise(chain))


def test_overlaps_and_the_critical_chain() -> None:
    graph, profile, _ = diamond()
    spans = (Span(0, 0, 0.0, 3.0), Span(1, 1, 3.0, 8.0), Span(2, 0, 3.0, 12.0), Span(3, 0, 12.0, 16.0))
    line = Timeline("plan", "", spans)
    assert overlaps(line) == ((1, 2, 5.0),)
    assert overlap_fraction(line) == pytest.approx(5 / 16)
    assert critical_chain(graph, profile.durations()) == (0, 2, 3)
    assert overlaps(Timeline("plan", "", ())) == ()
    assert overlap_fraction(Timeline("plan", "", ())) == 0.0


def test_rates_that_are_guessed_are_said_to_be() -> None:
    graph, profile, schedule = diamond()
    assert not any("guessed" in note for note in shape_report(graph, profile, schedule).notes)
    unlisted = replace(profile, device=replace(GPU, name="NVIDIA H300", estimated=True))
    notes = shape_report(graph, unlisted, schedule).notes
    assert any(note.startswith("rates of NVIDIA H300 are guessed") for note in notes)


def test_what_is_said_about_a_shape() -> None:
    graph, profile, schedule = diamond()
    shape = shape_report(graph, profile, schedule, tried=[(in_a_row(graph), 21e-6), (schedule, 17e-6)])
    assert [(c.chosen, c.measured) for c in shape.candidates] == [(False, 21e-6), (True, 17e-6)]
    assert shape.bound is not None
    assert (shape.bound.measured, shape.bound.dominant) == (17e-6, "critical path")
    assert shape.bound.gap == pytest.approx(17 / 16 - 1)
    assert [k.critical for k in shape.kernels] == [True, False, True, True]
    parts = (shape.bound.streams, shape.bound.launch, shape.bound.contention)
    assert sum(part or 0.0 for part in parts) == pytest.approx(1e-6)
    report = report_with(shape, graph)
    text = report.text(width=140)
    for part in ("measured 17.0 us", "6% above it", "kept", "by critical path", "limited", "RAW", "time spent"):
        assert part in text or part == "limited", part
    assert "launches and joins" in text
    assert "of a call is contention" in page(report)


def test_a_long_table_says_how_to_see_the_rest() -> None:
    report = report_of("googlenet")
    text, everything = report.text(width=130), report.text(width=130, kernels=None)
    assert "report.text(kernels=None)" not in everything
    assert "report.text(kernels=None)" in report.text(width=130, kernels=25)
    assert text.count("googlenet.py:") == everything.count("googlenet.py:") == 122
    assert max(map(len, everything.splitlines())) <= 130
    for width in (60, 80, 100, 120, 160):
        narrow = report.text(width=width, kernels=25)
        assert narrow.count("googlenet.py:") == 25
        assert max(map(len, narrow.splitlines())) <= width
    assert "97 more" in str(report)
    assert "<pre" in report._repr_html_()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_why_a_wait_is_needed_is_shown_in_full(width: int) -> None:
    text = report_of("googlenet").text(width=width, kernels=None)
    table = text[text.index("waits for") :]
    assert "because" in text
    assert table.count(" RAW buf") >= len(report_of("googlenet").graphs[0].shapes[0].waits)
    assert all(len(line) <= width for line in text.splitlines())


def test_names_that_look_like_markup_stay_as_they_are() -> None:
    graph, profile, schedule = diamond()
    kernels = tuple(replace(k, module=f"heads[/b].en[us].{i}") for i, k in enumerate(graph.kernels))
    named = replace(graph, kernels=kernels)
    report = replace(report_with(shape_report(named, profile, schedule), named), notes=("a [/i] note",))
    text = report.text(width=160)
    assert "heads[/b].en[us].0" in text
    assert "a [/i] note" in text


def test_there_is_no_drawing_of_a_graph_that_is_not_there() -> None:
    report = replace(report_of("googlenet"), graphs=(), notes=("no graph was ours",))
    for drawing in (report.to_dot, report.to_mermaid):
        with pytest.raises(ValueError, match=r"graph 0: this report holds 0 graphs \(no graph was ours\)"):
            drawing()


def test_a_graph_the_host_interrupts_says_where() -> None:
    graph, _, _ = diamond()
    source = "/home/me/model.py:12 in forward"
    kernels = (graph.kernels[0], replace(graph.kernels[1], source=source), *graph.kernels[2:])
    record = GraphRecord(replace(graph, kernels=kernels, segments=(0, 2)), Options())
    (found,) = graph_reports(record, PRESETS["H200"])
    assert [(f.reason, f.source) for f in found.fallbacks] == [("host_decision", source)]
    (shape,) = found.shapes
    assert (shape.state, shape.bound, shape.timelines) == ("unplanned", None, ())
    assert [k.segment for k in shape.kernels] == [0, 0, 1, 1]
    assert "model.py:12" in str(Report("m", "cpu", (), graphs=(found,)))


def test_why_a_graph_needs_the_host_is_foreseen_on_a_cpu_in_the_words_used_on_a_gpu() -> None:
    graph, _, _ = diamond()
    first, second, *rest = graph.kernels
    touching = replace(graph, kernels=(first, replace(second, host=True, source="a/b.py:3 in f"), *rest))
    for needing, detail in (
        (touching, f"{second.call} touches the CPU at a/b.py:3 in f"),
        (replace(touching, segments=(0, 2)), f"the host decides after {second.call} at a/b.py:3 in f"),
        (replace(touching, segments=(0, 1)), f"the host decides after {first.call}"),
        (replace(touching, segments=(0, 0)), f"the host decides before the first kernel, {first.call}"),
    ):
        assert why_host(needing) is not None
        (report,) = graph_reports(GraphRecord(needing, Options()), PRESETS["H200"])
        (row,) = report.fallbacks
        assert (row.detail, row.source) == (detail, "a/b.py:3 in f" if "at a/b.py" in detail else "")
        on_gpu = GraphRecord(replace(needing, device="cuda:0"), Options())
        (report,) = graph_reports(on_gpu, PRESETS["H200"])
        assert report.fallbacks == (), "there it is no forecast: the lane notes it"
    assert why_host(graph) is None


def test_shapes_of_other_lowerings_are_other_graphs() -> None:
    """A lowering has kernels and edges of its own; what was done for the graph is told once."""
    graph, profile, schedule = diamond()
    shorter = graph_with_edges(2, [(0, 1)])
    short = Profile(profile.kernels[:2], profile.device)
    row = in_a_row(shorter)
    one = SimpleNamespace(
        graph=graph, profile=profile, schedule=schedule, memory=plan_memory(graph, schedule), pool=None
    )
    other = SimpleNamespace(graph=shorter, profile=short, schedule=row, memory=plan_memory(shorter, row), pool=None)
    record = GraphRecord(graph, Options(), replays=3, other_calls=1)
    for key, plan, rewrites in (((1,), one, ()), ((2,), other, ("fuse_gemv",)), ((3,), one, ())):
        record.plans[key], record.rewritten[key] = (plan, True), rewrites  # type: ignore[assignment]
        record.lowerings[key] = (Timed((), 2e-6), Timed(("fuse_gemv",), 1e-6 if rewrites else 3e-6))
    plain, rewritten = graph_reports(record, PRESETS["H200"])
    assert [(s.shape, len(s.kernels)) for s in (*plain.shapes, *rewritten.shapes)] == [("1", 4), ("3", 4), ("2", 2)]
    assert (len(plain.edges), len(rewritten.edges)) == (len(graph.edges), 1)
    assert (plain.replays, rewritten.replays) == (3, 0)
    assert [(r.label, r.chosen) for r in plain.shapes[0].lowerings] == [("no rewrites", True), ("fuse_gemv", False)]
    text = str(Report("m", "a GPU", (), graphs=(plain, rewritten)))
    assert "rewritten by" in text
    assert "no rewrites 2.0 us; fuse_gemv 1.0 us (kept)" in text
    report = Report("m", "a GPU", (), graphs=(plain, rewritten))
    assert Report.from_json(report.to_json()) == report
    assert "the lowering with fuse_gemv, measured, kept" in page(report)


def test_fallbacks_name_the_users_line() -> None:
    step = Fallback(FallbackReason.HOST_KERNEL, "aten.copy touches the CPU at a/b.py:3 in f")
    assert fallback_row(step).source == "a/b.py:3 in f"
    assert fallback_row(Fallback(FallbackReason.TRAINING, "looks at gradients")).source == ""


def test_shapes_and_calls_have_names_for_people() -> None:
    assert shape_name(()) == "static"
    assert shape_name((7, ((3, 4), (4, 1)))) == "7, 3x4"
    row = report_of("googlenet").shapes()[0].kernels[3]
    assert row.operation == "fused batch_norm_relu"
    assert row.label == "features.0.norm: fused batch_norm_relu"
    assert replace(row, call="torch.ops.aten.topk.default", module="").label == "topk"
    assert isinstance(row, KernelRow)


@pytest.mark.parametrize("name", NAMES)
def test_drawings_have_every_kernel_edge_and_stream(name: str) -> None:
    (graph,) = report_of(name).graphs
    shape = graph.shapes[0]
    pairs = {(a, b) for a, b, _, _ in graph.edges}
    text = dot(graph)
    assert len(re.findall(r"^ +k\d+ \[label=", text, re.MULTILINE)) == len(shape.kernels)
    assert {(int(a), int(b)) for a, b in re.findall(r"k(\d+) -> k(\d+)", text)} == pairs
    assert text.count("subgraph cluster_") == shape.streams
    text = mermaid(graph)
    assert len(re.findall(r'^ +k\d+\["', text, re.MULTILINE)) == len(shape.kernels)
    assert {(int(a), int(b)) for a, b in re.findall(r"k(\d+) (?:==|--)> k(\d+)", text)} == pairs
    assert text.count("==>") == len(shape.waits)


def test_the_page_holds_everything_and_keeps_text_as_text() -> None:
    report = report_of("googlenet")
    evil = replace(report, model='</script><img src="http://x">@data@', modules=(("features.5", "<b>&"),))
    for one in (report, evil):
        text = page(one)
        assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!data:,)[a-z/]""", text.partition("<body>")[0])
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert data is not None
        assert len(json.loads(data[1])["shapes"][0]["kernels"]) == 122
        assert text.count("<script") == 2
        assert "<img" not in text


def test_what_libraries_reserve_is_told_beside_the_arena() -> None:
    graph, profile, schedule = diamond()
    memory = plan_memory(graph, schedule)
    for pool, told in (({0: 22 << 20, 2: 0, 1: 2 << 20}, (22 << 20, 2 << 20)), ({}, ()), (None, None)):
        shape = shape_report(graph, profile, schedule, memory=memory, pool=pool)
        assert shape.memory is not None
        assert shape.memory.libraries == told
        report = report_with(shape, graph)
        assert Report.from_json(report.to_json()) == report
        says = "24 MiB reserved on 2 streams" in str(report)
        assert says == bool(told)
        assert ("24 MiB" in page(report)) == bool(told)
