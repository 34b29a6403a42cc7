"""Slow and obvious versions of what the package computes cleverly: every pair, naive closures. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.schedule import Schedule

Relation = list[list[bool]]


def closure(count: int, pairs: Iterable[tuple[int, int]]) -> Relation:
    """The smallest transitive relation on `count` things that has `pairs` (Warshall)."""
    reach = [[False] * count for _ in range(count)]
    for first, second in pairs:
        reach[first][second] = True
    for middle in range(count):
        for first in range(count):
            if reach[first][middle]:
                for second in range(count):
                    reach[first][second] |= reach[middle][second]
    return reach


def happens_before(schedule: Schedule) -> Relation:
    """Stream order and waits, and what follows from them."""
    pairs = [(awaited, kernel) for kernel, waits in enumerate(schedule.waits) for awaited in waits]
    for place, first in enumerate(schedule.order):
        pairs += [(first, second) for second in schedule.order[place + 1 :] if same_stream(schedule, first, second)]
    return closure(len(schedule.stream), pairs)


def same_stream(schedule: Schedule, first: int, second: int) -> bool:
    return schedule.stream[first] == schedule.stream[second]


def wholes(graph: KernelGraph, name: str) -> list[str]:
    """`name` and what it is part of."""
    found = [name]
    while (whole := graph.buffer(found[-1]).part_of) is not None:
        found.append(whole)
    return found


def share_storage(graph: KernelGraph, first: str, second: str) -> bool:
    return first in wholes(graph, second) or second in wholes(graph, first)


def conflicts(graph: KernelGraph) -> list[tuple[int, int, str]]:
    """Every (earlier kernel, later kernel, buffer of the later) where both touch one storage and one writes it."""
    found = []
    for second, later in enumerate(graph.kernels):
        for first, earlier in enumerate(graph.kernels[:second]):
            for name in dict.fromkeys((*later.reads, *later.writes)):
                conflicting = (*earlier.reads, *earlier.writes) if name in later.writes else earlier.writes
                if any(share_storage(graph, name, other) for other in conflicting):
                    found.append((first, second, name))
    return found


def is_valid(graph: KernelGraph, schedule: Schedule) -> bool:
    """Each kernel launched once, waits only for what was launched before, every conflict ordered as in the program."""
    if sorted(schedule.order) != list(range(len(graph))):
        return False
    place = {kernel: place for place, kernel in enumerate(schedule.order)}
    if any(place[a] >= place[kernel] for kernel, waits in enumerate(schedule.waits) for a in waits):
        return False
    before = happens_before(schedule)
    return all(before[first][second] for first, second, _ in conflicts(graph))


def users(graph: KernelGraph, name: str) -> list[int]:
    """Kernels that touch `name` or a part of it."""
    return [
        index
        for index, kernel in enumerate(graph.kernels)
        if any(name in wholes(graph, touched) for touched in (*kernel.reads, *kernel.writes))
    ]


def ends_before(before: Relation, first: Iterable[int], second: Iterable[int]) -> bool:
    """True if each kernel of `first` happens before each of `second`."""
    later = list(second)
    return all(before[a][b] for a in first for b in later)
