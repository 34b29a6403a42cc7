"""What really ran beside what: a measured timeline from a profiler's trace of replays.

Takes: events as torch.profiler writes them (Chrome's JSON format), a KernelGraph, Schedule and launch parameters.
Gives: a `Timeline`, or None where no replay in the trace is one of this graph. Must not change: anything. Imports no
torch. How events are told apart: `matching`.

The profiler itself delays the branches of a replay: they start some microseconds after one another, which they do
not do without it. So what is shown is the median over replays, and how long kernels took, and what ran beside what,
can be trusted more than the gaps between them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.occupancy import Launch
from opara_backend.report.matching import Event, Match, match
from opara_backend.report.model import Span, Timeline
from opara_backend.scheduling.schedule import Schedule

NOTE = "the profiler delays streams: trust durations more than gaps"


def replays(events: Sequence[Mapping[str, Any]]) -> list[list[Event]]:
    """Kernel events of each cudaGraphLaunch of a trace, in order of launch. Times in seconds."""
    launched = {
        e["args"]["correlation"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "GraphLaunch" in str(e.get("name"))
    }
    found: dict[int, list[Event]] = {}
    for e in events:
        if e.get("cat") == "kernel" and e["args"].get("correlation") in launched:
            found.setdefault(e["args"]["correlation"], []).append(_event(e))
    return [found[key] for key in sorted(found)]


def _event(e: Mapping[str, Any]) -> Event:
    args = e["args"]
    (gx, gy, gz), (bx, by, bz) = args["grid"], args["block"]
    start = float(e["ts"]) * 1e-6
    return Event(
        name=str(e["name"]),
        start=start,
        end=start + float(e["dur"]) * 1e-6,
        grid=(gx, gy, gz),
        block=(bx, by, bz),
        shared_memory=int(args.get("shared memory", 0)),
        branch=int(args["stream"]),
    )


def measured(
    graph: KernelGraph,
    schedule: Schedule,
    launches: Sequence[Sequence[Launch]],
    traced: Sequence[Sequence[Event]],
) -> Timeline | None:
    """The median over those of the `traced` replays that are replays of `schedule`.

    Start and end are medians by themselves. What comes before something else in every replay does so in the medians.
    """
    matches = [m for m in (match(graph, schedule, launches, events) for events in traced) if m is not None]
    if not matches:
        return None
    spans = []
    for kernel in schedule.order:
        times = [t for m in matches if (t := m.times[kernel]) is not None]
        if times:
            start, end = (statistics.median(column) for column in zip(*times, strict=True))
            spans.append(Span(kernel, schedule.stream[kernel], start, end))
    first = min((s.start for s in spans), default=0.0)
    moved = tuple(Span(s.kernel, s.stream, s.start - first, s.end - first) for s in spans)
    note = f"median of {len(matches)} replay{'s' if len(matches) > 1 else ''}; {NOTE}"
    return Timeline("measured", "chosen schedule, measured under the profiler", moved, _unsure(matches), note)


def _unsure(matches: Sequence[Match]) -> tuple[int, ...]:
    return tuple(sorted({kernel for m in matches for kernel in m.ambiguous}))
