"""Why each wait of a schedule is needed.

Takes: a KernelGraph and a Schedule. Gives: per wait, the conflicts that it alone orders. Must not change: anything.
Imports no torch.
"""

from __future__ import annotations

from opara_backend.kernel_graph import Edge, KernelGraph
from opara_backend.report.model import Hazard, WaitRow
from opara_backend.scheduling.schedule import Schedule, happens_before

_SHOWN = 8  # hazards kept per wait; a join of many branches has one per pair


def wait_rows(graph: KernelGraph, schedule: Schedule) -> tuple[WaitRow, ...]:
    """Every wait, in launch order, with the conflicts between the two kernels.

    Where the two do not conflict themselves, those that would be open without the wait: an earlier kernel of the
    awaited one's stream, or a later one of the waiting one's, has them. None at all means a policy wants the order.
    """
    between: dict[tuple[int, int], list[Edge]] = {}
    for edge in graph.edges:
        between.setdefault((edge.src, edge.dst), []).append(edge)
    rows = []
    for kernel in schedule.order:
        for awaited in schedule.waits[kernel]:
            found = between.get((awaited, kernel)) or _indirect(graph, schedule, awaited, kernel)
            without = happens_before(_without(schedule, kernel, awaited))
            found = [e for e in found if not without.precedes(e.src, without.clock(e.dst))]
            hazards = [Hazard(e.kind, e.buffer, e.src, e.dst) for e in found[:_SHOWN]]
            rows.append(WaitRow(kernel, awaited, tuple(hazards) or (Hazard("ORDER", "", awaited, kernel),)))
    return tuple(rows)


def _without(schedule: Schedule, kernel: int, awaited: int) -> Schedule:
    """The Schedule in which `kernel` does not wait for `awaited`."""
    waits = list(schedule.waits)
    waits[kernel] = tuple(before for before in waits[kernel] if before != awaited)
    return Schedule(schedule.stream, schedule.order, tuple(waits), schedule.policy)


def _indirect(graph: KernelGraph, schedule: Schedule, awaited: int, kernel: int) -> list[Edge]:
    """Conflicts on the two streams that go the way of the wait."""
    place = {k: i for i, k in enumerate(schedule.order)}
    before, after = schedule.stream[awaited], schedule.stream[kernel]
    return [
        e
        for e in graph.edges
        if schedule.stream[e.src] == before
        and schedule.stream[e.dst] == after
        and place[e.src] <= place[awaited]
        and place[e.dst] >= place[kernel]
    ]
