"""Launch order: in which order kernels are handed to their streams.

Takes: a KernelGraph and its Profile. Gives: kernels in launch order, always topological.
Must not change: the graph. Imports no torch. Deterministic; ties go to program order.

| order | source |
| --- | --- |
| opara | Algorithm 2 of Opara (IEEE TC 2025) |
| critical_path | longest remaining path first (Hu 1961), the usual order of list scheduling |
| program | the order Inductor wrote |
| random | any topological order, seeded: for experiments |
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.priorities import longest_remaining_path

LaunchOrder = Callable[[KernelGraph, Profile], tuple[int, ...]]


def opara(graph: KernelGraph, profile: Profile) -> tuple[int, ...]:
    """Algorithm 2: of the ready kernels launch the least demanding one, by turns a memory- and a compute-bound one.

    Least first, because a running kernel cannot be preempted and a large one blocks small ones that would have
    fitted beside it; by turns, because a compute-bound and a memory-bound kernel overlap well. When only one list
    has kernels it is served until the other has some. The paper leaves open which list begins: memory-bound here.
    O((V + E) log V): the lists are heaps.
    """
    waiting = [len(graph.predecessors(kernel)) for kernel in range(len(graph))]
    ready: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])  # memory-bound, compute-bound

    def file(kernel: int) -> None:
        own = profile.kernels[kernel]
        heapq.heappush(ready[0 if own.memory_bound else 1], (own.demand, kernel))

    for kernel in range(len(graph)):
        if not waiting[kernel]:
            file(kernel)
    order: list[int] = []
    turn = 0
    while ready[0] or ready[1]:
        if not ready[turn]:
            turn = 1 - turn
        _, kernel = heapq.heappop(ready[turn])
        order.append(kernel)
        turn = 1 - turn
        for after in graph.successors(kernel):
            waiting[after] -= 1
            if not waiting[after]:
                file(after)
    return tuple(order)


def critical_path(graph: KernelGraph, profile: Profile) -> tuple[int, ...]:
    """Of the ready kernels launch the one with the longest remaining path. O((V + E) log V)."""
    rest = longest_remaining_path(graph, profile.durations())
    return _by_priority(graph, [-seconds for seconds in rest])


def random(graph: KernelGraph, profile: Profile, seed: int = 0) -> tuple[int, ...]:
    """A topological order drawn with `seed`. Not uniform over all of them, but every one can come out."""
    generator = Random(seed)
    return _by_priority(graph, [generator.random() for _ in range(len(graph))])


def _by_priority(graph: KernelGraph, key: list[float]) -> tuple[int, ...]:
    """Ready kernels in ascending `key`; ties go to program order."""
    waiting = [len(graph.predecessors(kernel)) for kernel in range(len(graph))]
    ready = [(key[kernel], kernel) for kernel in range(len(graph)) if not waiting[kernel]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, kernel = heapq.heappop(ready)
        order.append(kernel)
        for after in graph.successors(kernel):
            waiting[after] -= 1
            if not waiting[after]:
                heapq.heappush(ready, (key[after], after))
    return tuple(order)


def program(graph: KernelGraph, profile: Profile) -> tuple[int, ...]:
    """The order Inductor wrote; where a policy's own edges point back in it, as near to it as they allow."""
    return _by_priority(graph, [float(kernel) for kernel in range(len(graph))])


LAUNCH_ORDERS: Mapping[str, LaunchOrder] = MappingProxyType(
    {"opara": opara, "critical_path": critical_path, "program": program, "random": random}
)
