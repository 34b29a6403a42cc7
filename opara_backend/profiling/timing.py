"""How long each kernel takes on a CUDA device, alone, and what it demands.

Takes: a function that captures the program on one stream with a probe between kernels. Gives: a `Profile`.
Must not change: the program's state; the caller puts back what running kernels many times has written.

One graph holds every kernel in program order with an external event between each two, so caches are as warm or cold
as they are in a real run, and no launch overhead of the host is in the times. What two neighbouring events cost by
themselves is measured in the same graph and taken off.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable

import torch

from opara_backend.execution.cuda_graph import CapturedGraph
from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import current_device_spec
from opara_backend.profiling.occupancy import Launch
from opara_backend.profiling.profile import Profile, build_profile
from opara_backend.profiling.resources import launches_between_events

log = logging.getLogger(__name__)

WARM_REPLAYS, TIMED_REPLAYS, IDLE_EVENTS = 2, 5, 8
SHORTEST = 0.5e-6  # seconds; events do not resolve less, and a duration of 0 would make a kernel free


def profile_on_cuda(graph: KernelGraph, capture: Callable[[Callable[[int], None]], CapturedGraph]) -> Profile:
    """Durations (seconds) and launch parameters of all kernels of `graph`, which `capture(probe)` captures."""
    device = torch.device(graph.device)
    events: list[torch.cuda.Event] = []

    def probe(kernel: int) -> None:
        for _ in range(1 if kernel >= 0 else IDLE_EVENTS):
            events.append(torch.cuda.Event(enable_timing=True, external=True))
            events[-1].record()

    captured = capture(probe)
    try:
        samples = []
        for replay in range(WARM_REPLAYS + TIMED_REPLAYS):
            captured.replay()
            torch.cuda.synchronize(device)
            if replay >= WARM_REPLAYS:
                samples.append([a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)])
        launches = _launches(captured, len(graph))
    finally:
        captured.reset()
    typical = [statistics.median(column) for column in zip(*samples, strict=True)]
    idle = statistics.median(typical[len(graph) :]) if len(typical) > len(graph) else 0.0
    durations = [max(SHORTEST, seconds - idle) for seconds in typical[: len(graph)]]
    return build_profile(graph, durations, launches, current_device_spec(device.index))


def _launches(captured: CapturedGraph, kernels: int) -> list[tuple[Launch, ...]] | None:
    try:
        return launches_between_events(captured.graph.raw_cuda_graph(), kernels)
    except ImportError as error:
        log.warning("launch parameters unknown, kernels are ordered by duration: %s; install cuda-bindings", error)
        return None
