"""Why each wait of a schedule is needed.

Takes: a KernelGraph and a Schedule. Gives: per wait, the conflicts that it alone orders. Must not change: anything.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opara_backend.kernel_graph import Edge, KernelGraph
from opara_backend.report.model import Hazard, WaitRow
from opara_backend.scheduling.happens_before import HappensBefore
from opara_backend.scheduling.schedule import Schedule, happens_before

_SHOWN = 8  # hazards kept per wait; a join of many branches has one per pair


def wait_rows(graph: KernelGraph, schedule: Schedule) -> tuple[WaitRow, ...]:
    """Every wait, in launch order, with the conflicts between the two kernels.

    Where the two do not conflict themselves, those that would be open without the wait: an earlier kernel of the
    awaited one's stream, or a later one of the waiting one's, has them. None at all means a policy wants the order.
    """
    place = {kernel: position for position, kernel in enumerate(schedule.order)}
    between: dict[tuple[int, int], list[Edge]] = {}
    crossing: dict[tuple[int, int], list[Edge]] = {}
    for edge in graph.edges:
        between.setdefault((edge.src, edge.dst), []).append(edge)
        crossing.setdefault((schedule.stream[edge.src], schedule.stream[edge.dst]), []).append(edge)
    rows, relation = [], HappensBefore(schedule.streams)
    for kernel in schedule.order:
        stream, waits = schedule.stream[kernel], schedule.waits[kernel]
        for awaited in waits:
            if direct := between.get((awaited, kernel)):
                clock = relation.next_clock(stream)
                for other in waits:
                    clock = clock if other == awaited else relation.merged(clock, other)
                found = [] if relation.precedes(awaited, clock) else direct
            else:
                edges = crossing.get((schedule.stream[awaited], stream), ())
                found = _indirect(edges, place, schedule, awaited, kernel)
            hazards = [Hazard(e.kind, e.buffer, e.src, e.dst) for e in found[:_SHOWN]]
            rows.append(WaitRow(kernel, awaited, tuple(hazards) or (Hazard("ORDER", "", awaited, kernel),)))
        relation.launch(kernel, stream, waits)
    return tuple(rows)


def _without(schedule: Schedule, kernel: int, awaited: int) -> Schedule:
    """The Schedule in which `kernel` does not wait for `awaited`."""
    waits = list(schedule.waits)
    waits[kernel] = tuple(before for before in waits[kernel] if before != awaited)
    return Schedule(schedule.stream, schedule.order, tuple(waits), schedule.policy)


def _indirect(
    candidates: Sequence[Edge], place: Mapping[int, int], schedule: Schedule, awaited: int, kernel: int
) -> list[Edge]:
    """Conflicts between the two streams that go the way of the wait, and that nothing else orders."""
    found = [e for e in candidates if place[e.src] <= place[awaited] and place[e.dst] >= place[kernel]]
    if not found:
        return []
    without = happens_before(_without(schedule, kernel, awaited))
    return [e for e in found if not without.precedes(e.src, without.clock(e.dst))]
