"""Gives the kernel events of one replay to the launches they may be, in an order that dependencies allow.

Takes: launches as `Node`s, events sorted by start. Gives: the node of each event. Must not change: anything. Imports
no torch. What it is for, and the rules: `matching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opara_backend.profiling.occupancy import Launch

RESOLUTION = 0.1e-6  # seconds; CUPTI counts in steps of 32 ns
HANDOVER = 1e-6  # seconds by which, on one branch, a kernel may be seen to start before the last one has ended
_MOST_RETRIES = 20_000

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
class Node:
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


def followers(nodes: Sequence[Node]) -> list[list[int]]:
    """Per node, those that must see it ended."""
    after: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        for p in node.before:
            after[p].append(index)
    return after


class Search:
    """Depth first over events by start; `given[i]` is the node of event i."""

    def __init__(self, nodes: Sequence[Node], events: Sequence[Event]) -> None:
        self.nodes, self.events = nodes, events
        names = frozenset(n.name for n in nodes if n.name)
        self.fitting = [[i for i, n in enumerate(nodes) if n.may_be(e, names)] for e in events]
        self.given: list[int] = []
        self.event_of: dict[int, int] = {}
        self.after = followers(nodes)
        self.branch_before: list[int | None] = [None] * len(events)
        self.branch_after: list[int | None] = [None] * len(events)
        latest: dict[int, int] = {}
        for index, event in enumerate(events):
            if event.branch in latest:
                self.branch_before[index] = latest[event.branch]
                self.branch_after[latest[event.branch]] = index
            latest[event.branch] = index

    def run(self) -> list[int] | None:
        """The node of each event; None if there is no such assignment, or none was found in reasonable time."""
        choices: list[list[int]] = []
        retries = 0
        while len(self.given) < len(self.events):
            index = len(self.given)
            if len(choices) == index:
                choices.append(self._choices(index))
            if choices[-1]:
                self.given.append(choices[-1].pop(0))
                self.event_of[self.given[-1]] = index
                continue
            choices.pop()
            retries += 1
            if not choices or retries > _MOST_RETRIES:
                return None
            del self.event_of[self.given.pop()]
        return self.given

    def _choices(self, index: int) -> list[int]:
        """Nodes that event `index` may be, the most likely first."""
        before, following = self.branch_before[index], self.branch_after[index]
        chained = self.given[before] if before is not None else None

        def likeliness(node: int) -> tuple[bool, bool, int]:
            leads_on = following is None or any(follower in self.after[node] for follower in self.fitting[following])
            return chained not in self.nodes[node].before, not leads_on, self.nodes[node].place

        return sorted((n for n in self.fitting[index] if self._possible(n, index)), key=likeliness)

    def _possible(self, node: int, index: int) -> bool:
        return node not in self.event_of and all(self._over(p, index) for p in self.nodes[node].before)

    def _over(self, node: int, index: int) -> bool:
        """True if `node` has ended when event `index` starts."""
        event = self.event_of.get(node)
        if event is None:
            return False
        slack = HANDOVER if self.branch_before[index] == event else RESOLUTION
        return self.events[event].end <= self.events[index].start + slack
