"""How small no memory plan can be: buffers of which no two may share bytes need room side by side.

Takes: a KernelGraph with sizes bound and a Schedule. Gives: bytes that every valid arena has.
Must not change: anything. Imports no torch.

Largest such set is the heaviest clique of a graph, which is hard to find exactly; any clique is a bound. They are
grown from each of the largest buffers, the heaviest that still fits first. On recorded graphs plans meet it, mostly.
"""

from __future__ import annotations

from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import ALIGNMENT, accesses_of, ancestors_of, members, with_wholes
from opara_backend.scheduling.schedule import Schedule

STARTS = 100  # buffers a clique is grown from


def arena_bound(graph: KernelGraph, schedule: Schedule) -> int:
    """Bytes below which no plan for `schedule` can go, outputs included; buffers aligned as plans align them."""
    accesses, kept = accesses_of(graph), with_wholes(graph, graph.outputs)
    weights = {
        b.name: -(-b.nbytes // ALIGNMENT) * ALIGNMENT
        for b in graph.buffers
        if b.planned and isinstance(b.nbytes, int) and b.nbytes > 0 and accesses.get(b.name)
    }
    names = sorted(weights, key=lambda name: (-weights[name], name))
    ancestors = ancestors_of(schedule)
    over = {name: _all_of([ancestors[k] for k in members(accesses[name])]) for name in names}

    def apart(first: str, second: str) -> bool:
        """True if `first` is over before `second` begins."""
        return first not in kept and not accesses[first] & ~over[second]

    conflicts = [
        sum(1 << j for j, other in enumerate(names) if j != i and not apart(name, other) and not apart(other, name))
        for i, name in enumerate(names)
    ]
    best = 0
    for start in range(min(STARTS, len(names))):
        candidates, total = conflicts[start], weights[names[start]]
        while candidates:
            heaviest = (candidates & -candidates).bit_length() - 1  # names are sorted by weight
            total += weights[names[heaviest]]
            candidates &= conflicts[heaviest]
        best = max(best, total)
    return best


def _all_of(sets: list[int]) -> int:
    common = -1
    for found in sets:
        common &= found
    return common
