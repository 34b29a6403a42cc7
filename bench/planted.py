"""A slowdown planted on purpose, to see on one's own machine whether `bench compare` finds it and nothing else.

Takes: a callable and by which share it is to take longer. Gives: a callable that does. Must not change: its result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.timing import gpu_seconds, wall_seconds

FEW, MANY = 2_000, 200_000  # cycles of the two kernels that tell what a spinning kernel costs, about 1 and 100 us


def slowed(call: Callable[[], Any], share: float, device: torch.device) -> Callable[[], Any]:
    """`call`, warmed up, followed by a kernel that spins for `share` of its GPU time; without a GPU the host does."""
    if device.type != "cuda":
        pause = share * statistics.median(wall_seconds(call, device))
        return lambda: _then(call, lambda: _spin(pause))
    few, many = (_median(partial(torch.cuda._sleep, cycles)) for cycles in (FEW, MANY))
    a_cycle = (many - few) / (MANY - FEW)
    needed = max(1, round(FEW + (share * _median(call) - few) / a_cycle))
    return lambda: _then(call, lambda: torch.cuda._sleep(needed))


def _then(call: Callable[[], Any], more: Callable[[], None]) -> Any:
    found = call()
    more()
    return found


def _median(call: Callable[[], object]) -> float:
    return statistics.median(gpu_seconds(call) for _ in range(5))


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
