"""One timing routine for all variants: interleaved rounds in one process.

Takes: named callables that queue one inference on the current device. Gives: per variant and round the GPU time per
call (CUDA events around a burst) and the synchronised wall time per call, both in seconds.
Must not change: anything. Variants take turns within each round, so that clocks and caches drift for all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from bench.samples import Samples
from opara_backend import upstream

BURST = 20  # calls between two events: long enough that the events cost nothing, short enough to interleave
SHORTEST, LONGEST = 0.005, 0.025  # seconds of head start; the longest is more than any burst of captured calls needs
CPU_TURN = 0.05  # seconds of calls in one turn of one variant without a GPU


def measure(variants: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device) -> dict[str, Samples]:
    """Time each variant `rounds` times, interleaved; every callable must have been warmed up."""
    on_gpu = device.type == "cuda"
    gpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    p90: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for round_ in range(rounds):
        start = round_ % max(1, len(order))
        for name in order[start:] + order[:start]:  # each comes behind each neighbour's caches, and first, in turn
            call = variants[name]
            if on_gpu:
                gpu[name].append(gpu_seconds(call))
            times = wall_seconds(call, device)
            wall[name].append(statistics.median(times))
            p90[name].append(sorted(times)[int(0.9 * (len(times) - 1))])
    return {n: Samples(tuple(gpu[n]) if on_gpu else None, tuple(wall[n]), tuple(p90[n])) for n in variants}


def gpu_seconds(call: Callable[[], object]) -> float:
    """GPU seconds per call over one burst. The host queues ahead of the GPU behind a filler, so that the time is
    the GPU's own wherever the host is not slower altogether."""
    begun = time.perf_counter()
    call()
    queued = time.perf_counter() - begun
    torch.cuda.synchronize()
    upstream.occupy(min(LONGEST, max(SHORTEST, 3 * BURST * queued)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(BURST):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / BURST


def wall_seconds(call: Callable[[], object], device: torch.device) -> list[float]:
    """Wall seconds of single calls, each until the device is done, after one call that is not timed."""
    on_gpu = device.type == "cuda"
    once = _wall_once(call, on_gpu)
    calls = BURST if on_gpu else min(5 * BURST, max(5, int(CPU_TURN / once)))
    return [_wall_once(call, on_gpu) for _ in range(calls)]


def _wall_once(call: Callable[[], object], on_gpu: bool) -> float:
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
