"""Times captured candidates against each other.

Takes: captured graphs that do the same work. Gives: seconds per replay of each.
Must not change: anything but what the graphs themselves write; the caller keeps the state they touch.

Candidates take turns, so that clocks and neighbours drift for all alike, and each turn is a burst between two events:
the median over turns is compared, which a single disturbed turn does not move.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from opara_backend.execution.cuda_graph import CapturedGraph

TURNS, SHORTEST_BURST, BURST_SECONDS = 7, 3, 0.5e-3
ENOUGH = 3  # turns after which those far behind are timed no more
BEHIND = 1.05  # times the fastest


def seconds_per_replay(graphs: Sequence[CapturedGraph], budget: float) -> list[float]:
    """GPU seconds per replay, median over turns.

    After some turns those clearly behind the fastest drop out; it ends when one is left, or when `budget` seconds of
    wall time are spent.
    """
    started = time.perf_counter()
    bursts = [_burst_length(graph) for graph in graphs]
    samples: list[list[float]] = [[] for _ in graphs]
    racing = list(range(len(graphs)))
    for turn in range(TURNS):
        if turn >= ENOUGH:
            fastest = min(statistics.median(found) for found in samples)
            racing = [i for i in racing if statistics.median(samples[i]) <= BEHIND * fastest]
            if (len(racing) == 1 and len(graphs) > 1) or time.perf_counter() - started > budget:
                break
        for index in racing:
            samples[index].append(_timed(graphs[index], bursts[index]))
    return [statistics.median(found) for found in samples]


def _burst_length(graph: CapturedGraph) -> int:
    """Replays that take about half a millisecond, so that events and launches weigh the same for all candidates."""
    graph.replay()
    once = _timed(graph, 1)
    return max(SHORTEST_BURST, min(50, round(BURST_SECONDS / max(once, 1e-6))))


def _timed(graph: CapturedGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.current_stream(graph.device).synchronize()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / replays
