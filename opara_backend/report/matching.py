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
   and waits) have ended by then, but for the clock's resolution. Of several that look the same: first one whose
   predecessor was the last on that branch, for the driver runs chains on one branch; then the one launched first.
3. If an event is left that can be nobody's, the last choice is taken back, up to a number of times.
4. Kernels that look the same and could change places without breaking the order are ambiguous: their times may be
   each other's. What ran beside what, and how long, is known all the same up to their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.occupancy import Launch
from opara_backend.scheduling.schedule import Schedule

RESOLUTION = 0.1e-6  # seconds; CUPTI counts in steps of 32 ns
HANDOVER = 1e-6  # seconds by which, on one branch, a kernel may be seen to start before the last one has ended
_MOST_RETRIES = 50_000

Signature = tuple[str, tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class Event:
    """One kernel in a trace. Times in seconds; branch: CUPTI's number for a stream of the replay."""

    name: str
    start: float
    end: float
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    branch: int


@dataclass(frozen=True)
class Match:
    """start and end of each kernel (None: it launches nothing), seconds from the first; ambiguous kernels ascending."""

    times: tuple[tuple[float, float] | None, ...]
    ambiguous: tuple[int, ...]


@dataclass(frozen=True)
class _Node:
    """One launch of a kernel. before: nodes that must have ended. name: of a Triton kernel, else empty."""

    kernel: int
    place: int
    name: str
    launch: Launch | None
    before: tuple[int, ...]

    def may_be(self, event: Event, own_names: frozenset[str]) -> bool:
        if (event.name != self.name) if self.name else (event.name in own_names):
            return False
        launch = self.launch
        return launch is None or (launch.grid, launch.block, launch.shared_memory) == (
            event.grid,
            event.block,
            event.shared_memory,
        )

    @property
    def looks(self) -> tuple[str, Launch | None]:
        return self.name, None if self.name else self.launch


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
    given = _Search(nodes, ordered).run()
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


def _nodes(graph: KernelGraph, schedule: Schedule, launches: Sequence[Sequence[Launch]]) -> list[_Node]:
    """Launches in launch order, each after what its kernel must see ended; kernels that launch nothing pass it on."""
    known = any(launches)
    nodes: list[_Node] = []
    ends: dict[int, tuple[int, ...]] = {}  # per kernel the nodes after which it has ended
    last: dict[int, int] = {}
    for place, kernel in enumerate(schedule.order):
        stream = schedule.stream[kernel]
        earlier = [*schedule.waits[kernel], *([last[stream]] if stream in last else [])]
        before = tuple(sorted({node for k in earlier for node in ends[k]}))
        one = graph.kernels[kernel]
        own: Sequence[Launch | None] = launches[kernel] if known else (None,)
        for launch in own:
            nodes.append(_Node(kernel, place, one.call if one.kind == "triton" else "", launch, before))
            before = (len(nodes) - 1,)
        ends[kernel], last[stream] = before, kernel
    return nodes


def _after(nodes: Sequence[_Node]) -> list[list[int]]:
    after: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        for p in node.before:
            after[p].append(index)
    return after


class _Search:
    """Depth first over events by start; `given[i]` is the node of event i."""

    def __init__(self, nodes: Sequence[_Node], events: Sequence[Event]) -> None:
        self.nodes, self.events = nodes, events
        names = frozenset(n.name for n in nodes if n.name)
        self.fitting = [[i for i, n in enumerate(nodes) if n.may_be(e, names)] for e in events]
        self.event_of: dict[int, int] = {}
        self.after = _after(nodes)
        self.branch_before: list[int | None] = [None] * len(events)
        self.branch_after: list[int | None] = [None] * len(events)
        latest: dict[int, int] = {}
        for index, event in enumerate(events):
            if event.branch in latest:
                self.branch_before[index] = latest[event.branch]
                self.branch_after[latest[event.branch]] = index
            latest[event.branch] = index

    def run(self) -> list[int] | None:
        given: list[int] = []
        choices = [self._choices(0, given)] if self.events else []
        retries = 0
        while len(given) < len(self.events):
            if choices[-1]:
                node = choices[-1].pop(0)
                self.event_of[node] = len(given)
                given.append(node)
                if len(given) < len(self.events):
                    choices.append(self._choices(len(given), given))
                continue
            choices.pop()
            retries += 1
            if not choices or retries > _MOST_RETRIES:
                return None
            del self.event_of[given.pop()]
        return given

    def _choices(self, index: int, given: Sequence[int]) -> list[int]:
        """Nodes that event `index` may be, the most likely first; of those that nobody could tell apart only one."""
        event, before = self.events[index], self.branch_before[index]
        chained = given[before] if before is not None else None
        following = self.branch_after[index]
        found = [
            node
            for node in self.fitting[index]
            if node not in self.event_of
            and all(
                p in self.event_of
                and self.events[self.event_of[p]].end <= event.start + (HANDOVER if p == chained else RESOLUTION)
                for p in self.nodes[node].before
            )
        ]

        def likeliness(node: int) -> tuple[bool, bool, int]:
            leads_on = following is None or any(follower in self.after[node] for follower in self.fitting[following])
            return chained not in self.nodes[node].before, not leads_on, self.nodes[node].place

        return sorted(found, key=likeliness)


def _ambiguous(nodes: Sequence[_Node], times: Sequence[Event]) -> tuple[int, ...]:
    """Kernels of which a launch could change places with that of another kernel that looks the same."""
    after = _after(nodes)
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
