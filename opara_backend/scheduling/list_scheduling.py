"""Stream allocation by simulating time: critical-path list scheduling, and breadth-first waves.

Takes: a KernelGraph, its Profile, a number of streams. Gives: a stream per kernel, and for waves the edges that keep
them apart. Must not change: the graph. Imports no torch. Deterministic; ties go to program order.

| policy | source |
| --- | --- |
| list_k | Graham's list scheduling with longest-remaining-path priorities (Graham 1966; Hu 1961) |
| wavefront | Rammer's breadth-first waves (Ma et al., OSDI 2020): a wave starts when the one before has ended |
"""

from __future__ import annotations

import heapq

from opara_backend.kernel_graph import Edge, KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.priorities import longest_remaining_path


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
