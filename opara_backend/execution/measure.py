"""Times captured candidates against each other.

Takes: captured graphs that do the same work. Gives: seconds per replay of each.
Must not change: anything but what the graphs themselves write; the caller keeps the state they touch.

Candidates take turns, so that clocks and neighbours drift for all alike, and each turn is a burst between two events:
the median over turns is compared, which a single disturbed turn does not move. The GPU is kept busy while the host
queues a burst: replays of small graphs take less time than their launches, and would all seem to take as long as these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opara_backend import upstream
from opara_backend.execution.cuda_graph import CapturedGraph

TURNS, SHORTEST_BURST, BURST_SECONDS = 7, 3, 0.5e-3
ENOUGH = 3  # turns after which those far behind are timed no more
BEHIND = 1.05  # times the fastest
AHEAD = 2.0  # times as long as the host takes to queue a burst the GPU is kept busy before it,
LONGEST_WAIT = 25e-3  # but no longer than so many seconds


@dataclass(frozen=True)
class _Burst:
    """Replays in a row, and the seconds by which the host is to be ahead of the GPU with them."""

    replays: int
    ahead: float


def seconds_per_replay(graphs: Sequence[CapturedGraph], budget: float) -> list[float]:
    """GPU seconds per replay, median over turns.

    After some turns those clearly behind the fastest drop out; it ends when one is left, or when `budget` seconds of
    wall time are spent.
    """
    started = time.perf_counter()
    bursts = [_burst_of(graph) for graph in graphs]
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


def _burst_of(graph: CapturedGraph) -> _Burst:
    """Replays that take about half a millisecond, so that events weigh the same for all candidates."""
    graph.replay()
    torch.cuda.current_stream(graph.device).synchronize()
    begun = time.perf_counter()
    graph.replay()
    queued = time.perf_counter() - begun
    once = _timed(graph, _Burst(1, min(LONGEST_WAIT, AHEAD * queued)))
    replays = max(SHORTEST_BURST, min(50, round(BURST_SECONDS / max(once, 1e-6))))
    return _Burst(replays, min(LONGEST_WAIT, AHEAD * queued * replays))


def _timed(graph: CapturedGraph, burst: _Burst) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.current_stream(graph.device).synchronize()
    upstream.occupy(burst.ahead)
    start.record()
    for _ in range(burst.replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / burst.replays
