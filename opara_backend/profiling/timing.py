"""How long each kernel takes on a CUDA device, alone, and what it demands.

Takes: a function that captures the program on one stream, with or without a probe between kernels. Gives: a `Profile`,
and the chain without a probe, for whoever can use it.
Must not change: the program's state; the caller puts back what running kernels many times has written.

One graph holds every kernel in program order with an external event between each two, so caches are as warm or cold
as they are in a real run, and no launch overhead of the host is in the times. An event also keeps the next kernel from
getting ready while the one before it ends. What that costs is told by the same chain without events: the difference is
taken off in equal parts, so that durations add up to what the whole chain takes.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable

import torch

from opara_backend.execution.cuda_graph import CapturedGraph, Probe
from opara_backend.execution.measure import seconds_per_replay
from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import current_device_spec
from opara_backend.profiling.occupancy import Launch
from opara_backend.profiling.profile import Profile, build_profile
from opara_backend.profiling.resources import launches_between_events

log = logging.getLogger(__name__)

REPLAYS = 5
SHORTEST = 0.5e-6  # seconds; events do not resolve less, and a duration of 0 would make a kernel free


def profile_on_cuda(
    graph: KernelGraph, capture: Callable[[Probe | None], CapturedGraph]
) -> tuple[Profile, CapturedGraph]:
    """Durations (seconds) and launch parameters of all kernels of `graph`, which `capture(probe)` captures in a row.

    The second: what `capture(None)` gave. Both captures may use one memory pool, as one is there until the other is.
    """
    device = torch.device(graph.device)
    events: list[torch.cuda.Event] = []

    def probe(kernel: int) -> None:
        events.append(torch.cuda.Event(enable_timing=True, external=True))
        events[-1].record()

    probed = capture(probe)
    try:
        probed.replay()
        samples = []
        for _ in range(REPLAYS):
            probed.replay()
            torch.cuda.current_stream(device).synchronize()
            samples.append([a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)])
        launches = _launches(probed, len(graph))
        plain = capture(None)
    finally:
        probed.reset()
    durations = [statistics.median(column) for column in zip(*samples, strict=True)]
    (whole,) = seconds_per_replay([plain], budget=0.1)
    excess = (sum(durations) - whole) / max(1, len(durations))
    durations = [max(SHORTEST, seconds - excess) for seconds in durations]
    return build_profile(graph, durations, launches, current_device_spec(device.index)), plain


def _launches(captured: CapturedGraph, kernels: int) -> list[tuple[Launch, ...]] | None:
    try:
        return launches_between_events(captured.graph.raw_cuda_graph(), kernels)
    except ImportError as error:
        log.warning("launch parameters unknown, kernels are ordered by duration: %s; install cuda-bindings", error)
        return None
