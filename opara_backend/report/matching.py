"""Which kernel of ours is which kernel event of a profiler's trace of one graph replay.

Takes: a KernelGraph, its Schedule, launch parameters per kernel, kernel events of one replay. Gives: per kernel its
start and end, and which kernels may have been taken for one another. Must not change: anything. Imports no torch.

CUPTI says of a node of a CUDA Graph neither which node it is nor which stream it was captured on: the streams of a
replay are branches of the driver's own, often more than were captured. What it says is the function's name, the grid,
the block, shared memory, start and end. So:

1. A Triton kernel is an event of its own name. A library call is as many events as its profile counted launches, of
   other names, each with that grid, block and shared memory. (Registers are not compared: CUPTI counts what was
   allocated, which may be more than the function asks for.)
2. Events are gone through by start. Each is given to a kernel it may be, all of whose predecessors (by stream order
   and waits) have ended by then, but for the clock's resolution; on one branch a kernel may be seen to start up to a
   microsecond before the last one has ended, as behind products of cuBLAS. Of several that look the same: first one
   whose predecessor was the last on that branch, for the driver runs chains on one branch; then one that leads on to
   the next event of that branch; then the one launched first.
3. If an event is left that can be nobody's, the last choice is taken back, up to a number of times. Then the replay is
   given up: many equal kernels on many branches (experts) can be too many to try. Other replays may do.
4. Kernels that look the same and could change places without breaking the order are ambiguous: their times may be
   each other's. What ran beside what, and how long, is known all the same up to their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.occupancy import Launch
from opara_backend.report.assignment import RESOLUTION, Event, Node, Search, followers
from opara_backend.scheduling.schedule import Schedule, directly_behind


@dataclass(frozen=True)
class Match:
    """start and end of each kernel (None: it launches nothing), seconds from the first; ambiguous kernels ascending."""

    times: tuple[tuple[float, float] | None, ...]
    ambiguous: tuple[int, ...]


def match(
    graph: KernelGraph, schedule: Schedule, launches: Sequence[Sequence[Launch]], events: Sequence[Event]
) -> Match | None:
    """Give every event to a kernel; None if that is not possible, so the events are not those of this graph.

    launches: per kernel; all empty where nobody knows, then each kernel counts as one launch.
    """
    nodes = _nodes(graph, schedule, launches)
    if len(nodes) != len(events):
        return None
    ordered = sorted(events, key=lambda e: (e.start, e.end))
    given = Search(nodes, ordered).run()
    if given is None:
        return None
    by_node = {node: event for event, node in enumerate(given)}
    first = ordered[0].start if ordered else 0.0
    times: list[tuple[float, float] | None] = [None] * len(graph)
    for index, node in enumerate(nodes):
        event, known = ordered[by_node[index]], times[node.kernel]
        start, end = event.start - first, event.end - first
        times[node.kernel] = (start, end) if known is None else (min(known[0], start), max(known[1], end))
    return Match(tuple(times), _ambiguous(nodes, [ordered[by_node[i]] for i in range(len(nodes))]))


def _nodes(graph: KernelGraph, schedule: Schedule, launches: Sequence[Sequence[Launch]]) -> list[Node]:
    """Launches in launch order, each after what its kernel must see ended; kernels that launch nothing pass it on."""
    known = any(launches)
    nodes: list[Node] = []
    ends: dict[int, tuple[int, ...]] = {}  # per kernel the nodes after which it has ended
    behind = directly_behind(schedule)
    for place, kernel in enumerate(schedule.order):
        before = tuple(sorted({node for earlier in behind[kernel] for node in ends[earlier]}))
        one = graph.kernels[kernel]
        own: Sequence[Launch | None] = launches[kernel] if known else (None,)
        for launch in own:
            nodes.append(Node(kernel, place, one.call if one.kind == "triton" else "", launch, before))
            before = (len(nodes) - 1,)
        ends[kernel] = before
    return nodes


def _ambiguous(nodes: Sequence[Node], times: Sequence[Event]) -> tuple[int, ...]:
    """Kernels of which a launch could change places with that of another kernel that looks the same."""
    after = followers(nodes)
    alike: dict[tuple[str, Launch | None], list[int]] = {}
    for index, node in enumerate(nodes):
        alike.setdefault(node.looks, []).append(index)

    def fits(node: int, event: Event, other: int, others: Event) -> bool:
        def of(n: int) -> Event:
            return others if n == other else times[n]

        return all(of(p).end <= event.start + RESOLUTION for p in nodes[node].before) and all(
            event.end <= of(n).start + RESOLUTION for n in after[node]
        )

    found: set[int] = set()
    for members in alike.values():
        for place, a in enumerate(members):
            for b in members[place + 1 :]:
                if (
                    nodes[a].kernel != nodes[b].kernel
                    and fits(a, times[b], b, times[a])
                    and fits(b, times[a], a, times[b])
                ):
                    found |= {nodes[a].kernel, nodes[b].kernel}
    return tuple(sorted(found))
