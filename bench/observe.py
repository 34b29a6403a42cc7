"""What happened inside a backend while it compiled and ran.

Takes: a call, or `GraphRecord`s. Gives: CUDA Graph replays, facts. Must not change: what runs; what is wrapped is put
back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opara_backend.report.record import GraphRecord
from opara_backend.scheduling.bounds import lower_bound
from opara_backend.scheduling.gaps import gap_of


def replays(call: Callable[[], object]) -> int | None:
    """CUDA Graphs that one call replays, whoever captured them; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    graph_type: Any = torch.cuda.CUDAGraph
    original, count = graph_type.replay, 0

    def counted(graph: Any) -> Any:
        nonlocal count
        count += 1
        return original(graph)

    graph_type.replay = counted
    try:
        call()
    finally:
        graph_type.replay = original
    return count


@dataclass(frozen=True)
class Facts:
    """What `GraphRecord`s say of one model; names as in `samples.Row`."""

    kernels: int = 0
    streams: int = 0
    captured: int = 0
    graphs: int = 0
    waits: int = 0
    arena_bytes: int = 0
    policy: str = ""
    bound_seconds: float | None = None
    path_seconds: float | None = None
    streams_seconds: float | None = None
    launch_seconds: float | None = None
    fallbacks: tuple[str, ...] = ()
    kinds: dict[str, int] = field(default_factory=dict)
    search_seconds: float | None = None
    profile_seconds: float | None = None
    rewrites: tuple[str, ...] = ()
    lowerings: tuple[tuple[tuple[str, ...], float], ...] = ()


def facts(records: Sequence[GraphRecord]) -> Facts:
    """What the records of one model say together."""
    plans = [plan for record in records for plan in record.plans.values()]
    schedules = [plan.schedule for plan, _ in plans]
    on_gpu = [plan for plan, _ in plans if plan.profile.device is not None]
    gaps = [gap_of(plan.graph, plan.profile, plan.schedule, 0.0) for plan in on_gpu]
    searched = [record.stages for record in records if record.stages.profile]  # the first stage of every search
    return Facts(
        kernels=sum(len(plan.graph) for plan, _ in plans),
        streams=max((s.streams for s in schedules), default=0),
        captured=sum(captured for _, captured in plans),
        graphs=len(records),
        waits=sum(s.wait_count for s in schedules),
        arena_bytes=sum(plan.memory.arena_bytes for plan, _ in plans),
        policy=", ".join(dict.fromkeys(s.policy for s in schedules)),
        bound_seconds=sum(lower_bound(plan.graph, plan.profile) for plan in on_gpu) if on_gpu else None,
        path_seconds=sum(gap.critical_path for gap in gaps) if gaps else None,
        streams_seconds=sum(gap.streams for gap in gaps) if gaps else None,
        launch_seconds=sum(gap.launch for gap in gaps) if gaps else None,
        fallbacks=tuple(str(step) for record in records for step in record.fallbacks),
        kinds=dict(Counter(k.kind for plan, _ in plans for k in plan.graph.kernels)),
        search_seconds=sum(s.profile + s.schedule + s.plan + s.capture + s.search for s in searched) or None,
        profile_seconds=sum(s.profile for s in searched) or None,
        rewrites=tuple(dict.fromkeys(name for r in records for key in r.plans for name in r.rewrites_of(key))),
        lowerings=tuple((t.rewrites, t.seconds) for r in records for timed in r.lowerings.values() for t in timed),
    )


def stock_reasons(counters: Any) -> tuple[str, ...]:
    """Why stock Inductor captured nothing, as far as it counts: the number of graphs it skipped."""
    skipped = counters["inductor"]["cudagraph_skips"]
    return (f"cudagraph_skips: {skipped} (set TORCH_LOGS=cudagraphs for the reason)",) if skipped else ()
