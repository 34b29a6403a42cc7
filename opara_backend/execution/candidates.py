"""Candidate schedules of one shape, captured and timed against each other: the best is kept.

Takes: a Runtime, its KernelGraph with sizes bound, static arguments. Gives: the Plan kept and its captured graph.
Must not change: state outside the program's intermediates; the caller keeps (`state`) what runs and replays write.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from opara_backend.execution import winners
from opara_backend.execution.affordable import affordable
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.cuda_graph import CapturedGraph, Probe, capture, give_back_unused, give_up_workspaces
from opara_backend.execution.host import Plan, Supply
from opara_backend.execution.measure import seconds_per_replay
from opara_backend.execution.program import Program
from opara_backend.execution.streams import private_streams
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlanError
from opara_backend.profiling.profile import build_profile
from opara_backend.profiling.timing import profile_on_cuda
from opara_backend.report import annotate
from opara_backend.scheduling.policies import in_a_row
from opara_backend.scheduling.schedule import Schedule, ScheduleError
from opara_backend.scheduling.search import kept
from opara_backend.scheduling.workspaces import NONE, Workspaces, allocations

if TYPE_CHECKING:
    from opara_backend.execution.runtime import Runtime

log = logging.getLogger(__name__)

Tried = list[tuple[Schedule, float]]

# Bytes of arena that may be held twice while schedules are compared: for more, up to 10 MiB, the allocator takes 20.
# A schedule is captured again instead, launch by launch.
HELD_TWICE = 1 << 20
LEAST = 3  # schedules tried however long that takes


@dataclass(frozen=True)
class Memory:
    """Where graphs that never run at once may work: what kernels allocate comes from `pool`, arenas from `supply`.

    needed: what libraries take of `pool`, by the first run of the graph. candidates: they are given up
    together, so library workspaces in `pool` serve them all.
    """

    pool: Any
    supply: Supply
    needed: Workspaces = NONE
    candidates: bool = False


def capture_best(
    runtime: Runtime,
    graph: KernelGraph,
    arguments: StaticArguments,
    memory: Memory,
    shape: object = (),
    near: Schedule | None = None,
) -> tuple[Plan, CapturedGraph, Tried]:
    """Capture the schedule that won for `shape` of `graph` (sizes bound), found on disk or by a search.

    near: what won for another shape. The third: the schedules tried with their seconds per replay; nothing if there was
    no choice.
    """
    path = winners.place(runtime.generated, graph, shape, runtime.options)
    found = winners.find(path, graph)
    if found is not None:
        try:
            with runtime.record.stage("plan"):
                plan = runtime.plan(graph, found.profile, found.schedule, captured=True)
                pool = allocations(graph, memory.needed).reserved(plan.schedule, plan.memory.releases)
        except (ScheduleError, MemoryPlanError) as error:
            log.info("searching anew: what is remembered is not valid: %s: %s", path, error)
        else:
            runtime.record.remembered.add(shape)
            with runtime.record.stage("capture"):
                captured = capture_plan(runtime.program, plan, arguments, memory)
            return replace(plan, pool=pool), captured, list(found.tried)
    plan, captured, tried = _search(runtime, graph, arguments, memory, near)
    winners.keep(path, winners.Winner(plan.profile, plan.schedule, tuple(tried)))
    return plan, captured, tried


def _search(
    runtime: Runtime, graph: KernelGraph, arguments: StaticArguments, memory: Memory, near: Schedule | None
) -> tuple[Plan, CapturedGraph, Tried]:
    """Profile the kernels, capture and time every schedule that is to be tried, and capture the best for good.

    Those of a heat work in a memory pool of their own, which goes with them: it holds what all of them need, on every
    stream that one of them uses, workspaces of libraries included.
    """
    plans, seconds = _tried(runtime, graph, arguments, memory, near)
    schedules = [plan.schedule for plan in plans]
    best = plans[kept(schedules, [plan.reserved for plan in plans], seconds)]
    with runtime.record.stage("capture"):
        captured = capture_plan(runtime.program, best, arguments, memory)
    return best, captured, list(zip(schedules, seconds, strict=True)) if len(plans) > 1 else []


def _tried(
    runtime: Runtime, graph: KernelGraph, arguments: StaticArguments, memory: Memory, near: Schedule | None
) -> tuple[list[Plan], list[float]]:
    """Plans for all schedules that were tried, and the seconds a replay of each took: 0 for the only one."""
    record, deadline = runtime.record, time.perf_counter() + runtime.options.search_seconds
    with _apart(runtime, graph, memory) as apart:
        with record.stage("profile"), annotate.stage(runtime.options.annotate, runtime.name, "profile"):
            chain = _chain(runtime, graph)
            profile, chained = profile_on_cuda(
                graph, lambda probe: capture_plan(runtime.program, chain, arguments, apart, probe)
            )
        with record.stage("schedule"):
            kernels, static_bytes = allocations(graph, memory.needed), arguments.static_bytes()
            schedules = runtime.schedules(graph, profile, near, kernels, static_bytes)
        with record.stage("plan"):
            first, *others = affordable(
                lambda schedule: runtime.plan(graph, profile, schedule, captured=True),
                schedules,
                kernels,
                static_bytes,
                runtime.options.extra_memory << 20,
                lambda found: found < LEAST or time.perf_counter() < deadline,
            )
        only = len(first) == 1 and not others
        seconds = [0.0] if only else _race(runtime, first, arguments, apart, deadline, LEAST, (chain, chained))
        chained.reset()
    plans = first[: len(seconds)]
    for heat in others:
        least = LEAST - len(plans)
        if least <= 0 and time.perf_counter() > deadline:
            break
        with _apart(runtime, graph, memory) as apart:
            took = _race(runtime, heat, arguments, apart, deadline, max(1, least))
        plans, seconds = [*plans, *heat[: len(took)]], [*seconds, *took]
    return plans, seconds


@contextlib.contextmanager
def _apart(runtime: Runtime, graph: KernelGraph, memory: Memory) -> Iterator[Memory]:
    """Memory for graphs that are all given up in the block; behind it the device has it back."""
    try:
        yield replace(memory, pool=torch.cuda.graph_pool_handle(), candidates=True)
    finally:
        give_up_workspaces(private_streams(torch.device(graph.device), runtime.options.streams))
    give_back_unused()


def _race(
    runtime: Runtime,
    plans: Sequence[Plan],
    arguments: StaticArguments,
    memory: Memory,
    deadline: float,
    least: int,
    profiled: tuple[Plan, CapturedGraph] | None = None,
) -> list[float]:
    """Seconds per replay of each of `plans`, or of the first ones, but `least`, where time is short.

    profiled: one stream in program order, and the graph of it that was captured in `memory` already.
    """
    record = runtime.record
    needed = max(plan.memory.arena_bytes for plan in plans)
    keep = False
    if profiled is not None:
        chain, chained = profiled
        held = chained.arena.nbytes
        keep = needed <= held or held <= HELD_TWICE
        if not keep:
            chained.give_up_arena()
            give_back_unused()
    widest = memory.supply(needed)  # for all of them, as they take turns
    with record.stage("capture"), annotate.stage(runtime.options.annotate, runtime.name, "capture"):
        racing, took = [], 0.0
        for index, plan in enumerate(plans):
            begun = time.perf_counter()
            if index >= least and begun + took > deadline:  # what wins has to be captured once more
                break
            there = keep and plan.schedule == chain.schedule
            racing.append(chained if there else capture_plan(runtime.program, plan, arguments, memory))
            took = time.perf_counter() - begun
    del widest  # from now on it lives as long as a graph that works in it
    with record.stage("search"):
        seconds = seconds_per_replay(racing, deadline - time.perf_counter())
    for captured in racing:
        captured.reset()
    return seconds


def capture_plan(
    program: Program, plan: Plan, arguments: StaticArguments, memory: Memory, probe: Probe | None = None
) -> CapturedGraph:
    """`plan` captured on private streams; see `cuda_graph.capture`."""
    streams = private_streams(torch.device(plan.graph.device), max(1, plan.schedule.streams))
    stay = memory.candidates
    made = capture(program, plan, arguments.values, streams, memory.pool, memory.supply, probe, workspaces_stay=stay)
    if memory.candidates:
        made.outputs = ()  # nobody reads them, and the next candidate may have their memory
    return made


def _chain(runtime: Runtime, graph: KernelGraph) -> Plan:
    """The program on one stream, before anything is known of its kernels."""
    unknown = build_profile(graph, [0.0] * len(graph), None, None)
    return runtime.plan(graph, unknown, in_a_row(graph), captured=True)
