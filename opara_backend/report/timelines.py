"""Timelines: predicted ones from the simulator, and what any of them says about overlap and chains.

Takes: a KernelGraph, Profile and Schedule, or a `Timeline`. Gives: `Timeline`s, overlaps, chains of kernels.
Must not change: anything. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.report.model import Span, Timeline
from opara_backend.scheduling.costs import CostModel, kernel_cost
from opara_backend.scheduling.policies import in_a_row
from opara_backend.scheduling.priorities import longest_remaining_path
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.simulator import simulate


def predicted(
    graph: KernelGraph, profile: Profile, schedule: Schedule, *, estimated: bool = False
) -> tuple[Timeline, ...]:
    """The schedule, and the same kernels in a row on one stream, as the simulator has them; nothing without a device.

    A span is the kernel's whole duration, its ramp (launch, first loads: see `costs`) included.
    """
    if profile.device is None or not len(graph):
        return ()
    note = f"simulated on {profile.device.name}" + (", from estimated durations" if estimated else "")
    return (
        _simulated(graph, profile, schedule, "plan", "chosen schedule, predicted", note),
        _simulated(graph, profile, in_a_row(graph), "sequential", "one stream, predicted", note),
    )


def _simulated(graph: KernelGraph, profile: Profile, schedule: Schedule, kind: str, title: str, note: str) -> Timeline:
    assert profile.device is not None
    costs = CostModel()
    found = simulate(graph, profile, schedule, profile.device, costs)
    ramps = [kernel_cost(kernel, profile.device, costs).ramp for kernel in profile.kernels]
    spans = [Span(k, schedule.stream[k], found.start[k] - ramps[k], found.end[k]) for k in schedule.order]
    return Timeline(kind, title, tuple(spans), note=note)


def critical_chain(graph: KernelGraph, seconds: Sequence[float]) -> tuple[int, ...]:
    """The longest chain of dependent kernels by `seconds`, first kernel first; of equal ones the earliest."""
    remaining = longest_remaining_path(graph, seconds)
    if not remaining:
        return ()
    chain = [max(range(len(graph)), key=lambda k: (remaining[k], -k))]
    while followers := graph.successors(chain[-1]):
        chain.append(max(followers, key=lambda k: (remaining[k], -k)))
    return tuple(chain)


def overlaps(timeline: Timeline) -> tuple[tuple[int, int, float], ...]:
    """Pairs of kernels that ran at the same time, with the seconds they shared, most first."""
    found: list[tuple[int, int, float]] = []
    active: list[Span] = []
    for span in sorted(timeline.spans, key=lambda s: (s.start, s.kernel)):
        active = [s for s in active if s.end > span.start]
        for other in active:
            shared = min(span.end, other.end) - span.start
            if shared > 0:
                found.append((min(span.kernel, other.kernel), max(span.kernel, other.kernel), shared))
        active.append(span)
    return tuple(sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1])))


def overlap_fraction(timeline: Timeline) -> float:
    """Of the time in which any kernel ran, the part in which at least two did; 0 to 1."""
    marks = sorted(mark for s in timeline.spans if s.end > s.start for mark in ((s.start, 1), (s.end, -1)))
    running, busy, shared, then = 0, 0.0, 0.0, 0.0
    for now, change in marks:
        busy += (now - then) * (running >= 1)
        shared += (now - then) * (running >= 2)
        running, then = running + change, now
    return shared / busy if busy else 0.0
