"""What was done with each compiled graph, kept as it happens.

Takes: plans and fallbacks as the runtime makes them. Gives: `GraphRecord`s to whoever listens: `collect()` lists
those of graphs compiled or called inside its block. Must not change: anything; a record never keeps a graph alive
that nobody else holds.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opara_backend.fallback import Fallback, FallbackReason
from opara_backend.kernel_graph import KernelGraph
from opara_backend.options import Options
from opara_backend.scheduling.schedule import Schedule

if TYPE_CHECKING:
    from opara_backend.execution.host import Plan

log = logging.getLogger(__name__)

listeners: contextvars.ContextVar[tuple[list[GraphRecord], ...]] = contextvars.ContextVar("opara_records", default=())


@dataclass(frozen=True)
class Stages:
    """Seconds of wall time spent on one graph, all its shapes together.

    compile: AOTAutograd and Inductor with our lowering inside (Dynamo's tracing comes before it and is not ours).
    lowering: rewriting Inductor's wrapper, 0 if it came from a cache. first_run: calls in program order that shapes
    were planned from, and on CUDA the very first one, which tunes kernels. profile: timing every kernel. schedule:
    making the candidates. plan: placing buffers and checking schedules. capture: CUDA Graphs of the candidates.
    search: timing them against each other.
    """

    compile: float = 0.0
    lowering: float = 0.0
    first_run: float = 0.0
    profile: float = 0.0
    schedule: float = 0.0
    plan: float = 0.0
    capture: float = 0.0
    search: float = 0.0


@dataclass(frozen=True)
class Timed:
    """A way of lowering a graph, by the rewrites in it, and the seconds that a replay of its best schedule took."""

    rewrites: tuple[str, ...]
    seconds: float


@dataclass
class GraphRecord:
    """One compiled graph: what it was lowered to, how each shape of it runs, and every step down the ladder.

    rewrites: which of ours (options) found something to do in `graph`.
    plans: per concrete shape that is ready to run, the Plan and whether it is a captured CUDA Graph.
    candidates: per concrete shape, the schedules that were tried and their measured seconds per replay.
    rewritten: per captured shape, which rewrites there are in what it runs by. lowerings: per concrete shape for which
    several were timed, each one's rewrites and seconds per replay.
    stages: how long what took, so far. remembered: shapes whose schedule an earlier search had left on disk.
    replays, other_calls: calls served by a captured graph, and by any other way (first calls included).
    """

    graph: KernelGraph
    options: Options
    rewrites: tuple[str, ...] = ()
    plans: dict[tuple[Any, ...], tuple[Plan, bool]] = field(default_factory=dict)
    candidates: dict[tuple[Any, ...], list[tuple[Schedule, float]]] = field(default_factory=dict)
    rewritten: dict[tuple[Any, ...], tuple[str, ...]] = field(default_factory=dict)
    lowerings: dict[tuple[Any, ...], tuple[Timed, ...]] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    stages: Stages = Stages()
    remembered: set[Any] = field(default_factory=set)
    compile_id: Any = None  # torch's name for the compilation, `0/0`; None where it was compiled outside of Dynamo
    replays: int = 0
    other_calls: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the calls so far that a captured graph served, 0 to 1; 0 before the first call."""
        calls = self.replays + self.other_calls
        return self.replays / calls if calls else 0.0

    def rewrites_of(self, key: tuple[Any, ...]) -> tuple[str, ...]:
        """The rewrites in what shape `key` runs by."""
        return self.rewritten.get(key, self.rewrites)

    def spent(self, **seconds: float) -> None:
        """Add to the named stages."""
        self.stages = replace(self.stages, **{k: getattr(self.stages, k) + v for k, v in seconds.items()})

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what the block takes to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent(**{name: time.perf_counter() - start})

    def lowered(self) -> None:
        """Note that the graph is there."""
        from opara_backend import upstream

        upstream.trace_artifact("opara_kernel_graph", lambda: json.loads(self.graph.to_json()), self.compile_id)

    def planned(
        self, key: tuple[Any, ...], plan: Plan, *, captured: bool, rewrites: tuple[str, ...] | None = None
    ) -> None:
        """Note how shape `key` runs from now on, by a lowering with `rewrites`: those of `graph` if not said."""
        log.info(
            "%d kernels, %s: %s on %d streams with %d waits, arena %d bytes for %d",
            len(plan.graph),
            "captured" if captured else "in order",
            plan.schedule.policy,
            plan.schedule.streams,
            plan.schedule.wait_count,
            plan.memory.arena_bytes,
            plan.memory.requested_bytes,
        )
        self.plans[key] = (plan, captured)
        if rewrites is not None:
            self.rewritten[key] = rewrites
        from opara_backend import upstream

        upstream.trace_artifact("opara_schedule", lambda: _chosen(key, plan, captured), self.compile_id)

    def measured(
        self, key: tuple[Any, ...], candidates: list[tuple[Schedule, float]], lowerings: Sequence[Timed] = ()
    ) -> None:
        """Note what the search for shape `key` found: schedules of the lowering kept, and the best of each lowering."""
        for schedule, seconds in candidates:
            log.debug("%s on %d streams: %.1f us", schedule.policy, schedule.streams, seconds * 1e6)
        for timed in lowerings:
            log.debug("with %s: %.1f us", ", ".join(timed.rewrites) or "no rewrites", timed.seconds * 1e6)
        if candidates:
            self.candidates[key] = candidates
        if lowerings:
            self.lowerings[key] = tuple(lowerings)

    def fell_back(self, reason: FallbackReason) -> bool:
        """True if `reason` has been noted."""
        return any(step.reason is reason for step in self.fallbacks)

    def forget(self, key: tuple[Any, ...]) -> None:
        """Shape `key` is no longer ready to run."""
        self.plans.pop(key, None)
        self.candidates.pop(key, None)
        self.lowerings.pop(key, None)
        self.rewritten.pop(key, None)
        self.remembered.discard(key)


def _chosen(key: tuple[Any, ...], plan: Plan, captured: bool) -> dict[str, Any]:
    """How a shape runs, as plain data."""
    schedule, kernels = plan.schedule, plan.graph.kernels
    return {
        "schema": 1,
        "shape": repr(key),
        "captured": captured,
        "policy": schedule.policy,
        "streams": schedule.streams,
        "launches": [
            {
                "kernel": kernels[k].name,
                "call": kernels[k].call,
                "stream": schedule.stream[k],
                "waits": [kernels[before].name for before in schedule.waits[k]],
            }
            for k in schedule.order
        ],
        "arena_bytes": plan.memory.arena_bytes,
        "requested_bytes": plan.memory.requested_bytes,
        "library_bytes": None if plan.pool is None else sum(plan.pool.values()),
    }


def publish(record: GraphRecord) -> None:
    """Tell every listener of this context about `record`, once."""
    for listener in listeners.get():
        if all(known is not record for known in listener):
            listener.append(record)


@contextlib.contextmanager
def collect() -> Iterator[list[GraphRecord]]:
    """A list that fills with the records of graphs compiled or called, in this context, while the block runs."""
    found: list[GraphRecord] = []
    token = listeners.set((*listeners.get(), found))
    try:
        yield found
    finally:
        listeners.reset(token)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Tell no listener of this context about graphs compiled or called while the block runs."""
    token = listeners.set(())
    try:
        yield
    finally:
        listeners.reset(token)
