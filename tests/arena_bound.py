"""How small no memory plan can be: buffers of which no two may share bytes need room side by side.

Takes: a KernelGraph with sizes bound and a Schedule. Gives: bytes that every valid arena has.
Must not change: anything. Imports no torch.

The largest such set is the heaviest clique of a graph, which is hard to find exactly; any clique is a bound. Unlike the
planner, who asks the same of fewer buffers, this finds conflicts from the ancestors of kernels alone.
"""

from __future__ import annotations

from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import ALIGNMENT, accesses_of, ancestors_of, intersection, with_wholes
from opara_backend.placement import side_by_side
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
    over = {name: intersection(ancestors, accesses[name]) for name in names}

    def apart(first: str, second: str) -> bool:
        """True if `first` is over before `second` begins."""
        return first not in kept and not accesses[first] & ~over[second]

    conflicts = [
        sum(1 << j for j, other in enumerate(names) if j != i and not apart(name, other) and not apart(other, name))
        for i, name in enumerate(names)
    ]
    return side_by_side({name: weights[name] for name in names}, dict(zip(names, conflicts, strict=True)), STARTS)
