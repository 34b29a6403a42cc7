"""Replays under torch.profiler, for a report's measured timelines.

Takes: a Report, the records it was made from, a function that calls the compiled model. Gives: the report with
measured timelines, or with a note that says why there are none. Must not change: anything but what calls change.
Needs a CUDA device.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opara_backend.report.build import by_lowering
from opara_backend.report.measured import measured, replays
from opara_backend.report.model import GraphReport, Report
from opara_backend.report.record import GraphRecord

if TYPE_CHECKING:
    from opara_backend.execution.host import Plan

log = logging.getLogger(__name__)

REPLAYS = 5

Plans = Sequence[Sequence[tuple["Plan", bool]]]
"""For each graph of a report the Plan of each shape, and whether it is captured."""


def with_measured(report: Report, records: Sequence[GraphRecord], call: Callable[[], object]) -> Report:
    """`report` with a measured timeline for every captured shape that `call` replays."""
    reported = plans(records)  # calls may make captures, and displace others
    try:
        events = profiled(call)
    except Exception as error:  # another profiler may be running; a report without is better than none
        log.debug("no measured timeline", exc_info=error)
        why = f"no measured timeline: torch.profiler failed: {type(error).__name__}: {error}"
        return replace(report, notes=(*report.notes, why))
    return with_events(report, reported, events)


def profiled(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Events of a few calls, as torch.profiler exports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def plans(records: Sequence[GraphRecord]) -> Plans:
    """What a report of `records` reports on: the plans of each graph's shapes, in its order."""
    return [[r.plans[key] for key in keys] for r in records for keys in by_lowering(r).values() or [()]]


def with_events(report: Report, reported: Plans, events: Sequence[dict[str, Any]]) -> Report:
    """`report` with what a trace tells about its shapes. reported: their `plans`, as they were when it was made."""
    traced = replays(events)
    graphs = [_graph(graph, of_shapes, traced) for graph, of_shapes in zip(report.graphs, reported, strict=True)]
    return replace(report, graphs=tuple(graphs))


def _graph(graph: GraphReport, plans: Sequence[tuple[Plan, bool]], traced: Sequence[Any]) -> GraphReport:
    shapes = list(graph.shapes)
    for index, (plan, captured) in enumerate(plans):
        if not captured:
            continue
        launches = [kernel.launches for kernel in plan.profile.kernels]
        line = measured(plan.graph, plan.schedule, launches, traced)
        if line is not None:
            shapes[index] = replace(shapes[index], timelines=(*shapes[index].timelines, line))
        else:
            why = f"no measured timeline: none of {len(traced)} replays could be told apart kernel by kernel"
            shapes[index] = replace(shapes[index], notes=(*shapes[index].notes, why))
    return replace(graph, shapes=tuple(shapes))
