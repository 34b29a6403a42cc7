"""Stream allocation: which kernel runs on which stream.

Takes: a KernelGraph (and, to bound the width, a launch order and durations). Gives: a stream number per kernel.
Must not change: the graph. Imports no torch. Deterministic; ties go to the lower number.

| policy | source |
| --- | --- |
| opara | Algorithm 1 of Opara (IEEE TC 2025) |
| sequential | one stream, what a plain CUDA Graph does |
"""

from __future__ import annotations

from collections.abc import Sequence

from opara_backend.kernel_graph import KernelGraph


def opara(graph: KernelGraph) -> tuple[int, ...]:
    """Algorithm 1: a kernel takes the stream of the first predecessor that has not handed its own on; else a new one.

    Independent kernels never share a stream, and each chain saves one synchronisation per hand-over. O(V + E).
    """
    stream = [0] * len(graph)
    handed_on = [False] * len(graph)
    opened = 0
    for kernel in range(len(graph)):  # program order is topological
        for before in graph.predecessors(kernel):
            if not handed_on[before]:
                handed_on[before] = True
                stream[kernel] = stream[before]
                break
        else:
            stream[kernel] = opened
            opened += 1
    return tuple(stream)


def sequential(graph: KernelGraph) -> tuple[int, ...]:
    """Everything on one stream."""
    return (0,) * len(graph)


def bound_width(
    graph: KernelGraph, stream: Sequence[int], order: Sequence[int], durations: Sequence[float], width: int
) -> tuple[int, ...]:
    """Fold `stream` onto at most `width` streams, keeping every chain whole.

    Hardware runs a handful of streams side by side; dozens only cost waits (FINDINGS 2). Chains are placed when
    their first kernel is launched, on the stream that would let that kernel start earliest if every kernel took
    its duration and none slowed another; among equals, on the one that was busy last, so that fewer streams are
    opened. O(V x width + E).
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if max(stream, default=0) < width:
        return tuple(stream)
    placed: dict[int, int] = {}
    free_at = [0.0] * width
    finished = [0.0] * len(graph)
    for kernel in order:
        ready = max((finished[before] for before in graph.predecessors(kernel)), default=0.0)
        chain = stream[kernel]
        if chain not in placed:
            placed[chain] = min(range(width), key=lambda s: (max(free_at[s], ready), -free_at[s], s))
        own = placed[chain]
        finished[kernel] = free_at[own] = max(free_at[own], ready) + durations[kernel]
    return tuple(placed[chain] for chain in stream)
