"""Stream allocation by simulating time: critical-path list scheduling, and breadth-first waves.

Takes: a KernelGraph, its Profile, a number of streams. Gives: a stream per kernel, and where a policy wants kernels to
wait that need not, the edges for it. Must not change: the graph. Imports no torch. Deterministic; ties go to program
order.

| policy | source |
| --- | --- |
| list_k | Graham's list scheduling with longest-remaining-path priorities (Graham 1966; Hu 1961) |
| just_in_time | the same, with kernels that wait for nothing as late as possible (ALAP; Paulin and Knight 1989) |
| wavefront | Rammer's breadth-first waves (Ma et al., OSDI 2020): a wave starts when the one before has ended |
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from opara_backend.kernel_graph import Edge, KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.priorities import longest_remaining_path

LEAD = 10e-6  # seconds: what launching may be late by, and what a kernel may take longer beside others


def list_k(graph: KernelGraph, profile: Profile, width: int) -> tuple[int, ...]:
    """Whenever a stream is free, give it the ready kernel with the longest remaining path.

    Of several free streams it gets the one that ran the predecessor it waited for last, so that it need not wait for
    an event. O((V + E) log V + V x width).
    """
    durations = profile.durations()
    priority = longest_remaining_path(graph, durations)
    waiting = [len(graph.predecessors(k)) for k in range(len(graph))]
    ready = [(-priority[k], k) for k in range(len(graph)) if not waiting[k]]
    heapq.heapify(ready)
    stream = [0] * len(graph)
    finish = [0.0] * len(graph)
    free: list[int] = list(range(width))
    running: list[tuple[float, int]] = []  # (end, kernel)
    now = 0.0
    while ready or running:
        while ready and free:
            _, kernel = heapq.heappop(ready)
            before = max(graph.predecessors(kernel), key=lambda p: (finish[p], p), default=None)
            own = stream[before] if before is not None and stream[before] in free else min(free)
            free.remove(own)
            stream[kernel] = own
            finish[kernel] = now + durations[kernel]
            heapq.heappush(running, (finish[kernel], kernel))
        now, done = heapq.heappop(running)
        ended = [done]
        while running and running[0][0] <= now:
            ended.append(heapq.heappop(running)[1])
        for kernel in ended:
            free.append(stream[kernel])
            for after in graph.successors(kernel):
                waiting[after] -= 1
                if not waiting[after]:
                    heapq.heappush(ready, (-priority[after], after))
    return tuple(stream)


def just_in_time(graph: KernelGraph, profile: Profile, width: int) -> tuple[tuple[int, ...], tuple[Edge, ...]]:
    """`list_k`, with kernels that wait for nothing held back until shortly before they are needed, by further edges.

    Inductor lays out weights by kernels that read parameters alone. They could all run first, and then what they write
    takes memory, and the place of other things in the cache, until some layer far behind reads it. Each of them is made
    to follow the kernel that ends last, of those on the slowest chain to its first reader, before it has to begin:
    `LEAD` and its own duration before all else that the reader needs is there on any number of streams.
    """
    durations = profile.durations()
    ends = [0.0] * len(graph)  # at the earliest
    for kernel in range(len(graph)):
        ends[kernel] = durations[kernel] + max((ends[before] for before in graph.predecessors(kernel)), default=0.0)

    def slowest(kernels: Sequence[int]) -> int | None:
        return max(kernels, key=lambda k: (ends[k], k), default=None)

    edges = []
    for kernel in range(len(graph)):
        if graph.predecessors(kernel) or not graph.successors(kernel):
            continue
        reader = min(graph.successors(kernel), key=lambda k: (ends[k] - durations[k], k))
        begin = ends[reader] - durations[reader] - durations[kernel] - LEAD
        before = slowest([k for k in graph.predecessors(reader) if k != kernel])
        while before is not None and (ends[before] > begin or before > kernel):  # edges point forward in program order
            before = slowest(graph.predecessors(before))
        if before is not None:
            edges.append(Edge(before, kernel, "ORDER", ""))
    held_back = replace(graph, edges=(*graph.edges, *edges))
    return list_k(held_back, profile, width), tuple(edges)


def wavefront(graph: KernelGraph, width: int) -> tuple[tuple[int, ...], tuple[Edge, ...]]:
    """Kernels of one depth, dealt onto the streams in turn; edges from every kernel of a wave to all of the next."""
    depth = [0] * len(graph)
    waves: dict[int, list[int]] = {}
    for kernel in range(len(graph)):
        depth[kernel] = 1 + max((depth[before] for before in graph.predecessors(kernel)), default=-1)
        waves.setdefault(depth[kernel], []).append(kernel)
    stream = [0] * len(graph)
    for wave in waves.values():
        for place, kernel in enumerate(wave):
            stream[kernel] = place % width
    # Edges must point forward in program order; a wave may hold kernels that stand behind some of the next one.
    barriers = tuple(
        Edge(before, after, "ORDER", "")
        for level in range(len(waves) - 1)
        for before in waves[level]
        for after in waves[level + 1]
    )
    return tuple(stream), barriers
