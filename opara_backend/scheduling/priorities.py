"""Longest remaining path of each kernel: how much time lies between its start and the end of the program.

Takes: a KernelGraph and durations. Gives: seconds per kernel. Must not change: the graph. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from opara_backend.kernel_graph import KernelGraph


def longest_remaining_path(graph: KernelGraph, durations: Sequence[float]) -> tuple[float, ...]:
    """Seconds from the start of each kernel to the end, along the slowest chain of kernels. O(V + E)."""
    rest = [0.0] * len(graph)
    for kernel in range(len(graph) - 1, -1, -1):
        rest[kernel] = durations[kernel] + max((rest[after] for after in graph.successors(kernel)), default=0.0)
    return tuple(rest)
