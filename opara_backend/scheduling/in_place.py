"""Schedules in which kernels may write over what they read, as Inductor has them do in program order.

Takes: a KernelGraph. Gives: the same graph with edges that make it so. Must not change: kernels, buffers, edges that
are there. Imports no torch.

The memory planner writes in place wherever a schedule has everyone else finished with a buffer, and never makes a
kernel wait for it (`memory.plan_memory`). Here it is the other way round: the last kernel that touches a buffer waits
for the others, which takes less memory, and leaves less of it to fetch, for kernels that could have run side by side.
Which of the two is faster is measured.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from opara_backend.kernel_graph import Edge, KernelGraph


def written_in_place(graph: KernelGraph) -> KernelGraph:
    """`graph` with an edge to every kernel that in program order could write over a buffer, from all who touch that.

    `graph` itself, if no edge is missing.
    """
    buffers = {buffer.name: buffer for buffer in graph.buffers}
    parts = {buffer.name for buffer in graph.buffers if buffer.part_of is not None}
    shared = parts | {buffer.part_of for buffer in graph.buffers} | {*graph.outputs}
    touched: dict[str, list[int]] = defaultdict(list)
    for index, kernel in enumerate(graph.kernels):
        for name in dict.fromkeys((*kernel.reads, *kernel.writes)):
            touched[name].append(index)
    before = _before(graph)
    edges: list[Edge] = []
    for index, kernel in enumerate(graph.kernels):
        for read, written in kernel.inplace:
            one, other = buffers[read], buffers[written]
            alike = one.planned and other.planned and one.nbytes == other.nbytes and not shared & {read, written}
            if alike and touched[read][-1] == index == touched[written][0]:
                edges += [Edge(k, index, "ORDER", read) for k in touched[read][:-1] if not before[index] >> k & 1]
    return replace(graph, edges=(*graph.edges, *edges)) if edges else graph


def _before(graph: KernelGraph) -> list[int]:
    """For each kernel, the bit set of those that come before it by the graph's edges."""
    found = [0] * len(graph)
    for edge in sorted(graph.edges, key=lambda edge: edge.dst):
        found[edge.dst] |= found[edge.src] | 1 << edge.src
    return found
