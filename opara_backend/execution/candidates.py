"""Candidate schedules of one shape, captured and timed, by heats, against each other: the best is kept.

Takes: a Runtime, its KernelGraph with sizes bound, static arguments. Gives: the Plan kept and its captured graph.
Must not change: state outside the program's intermediates; the caller keeps (`state`) what runs and replays write.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from opara_backend.execution import winners
from opara_backend.execution.affordable import affordable, with_pool
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.cuda_graph import CapturedGraph, give_back_unused, give_up_workspaces
from opara_backend.execution.host import Plan
from opara_backend.execution.race import LEAST, Budget, Memory, capture_plan, race
from opara_backend.execution.streams import private_streams
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlanError
from opara_backend.profiling.profile import build_profile
from opara_backend.profiling.timing import profile_on_cuda
from opara_backend.report import annotate
from opara_backend.scheduling.policies import in_a_row
from opara_backend.scheduling.schedule import Schedule, ScheduleError
from opara_backend.scheduling.search import kept
from opara_backend.scheduling.workspaces import allocations

if TYPE_CHECKING:
    from opara_backend.execution.runtime import Runtime

log = logging.getLogger(__name__)

Tried = list[tuple[Schedule, float]]

MOST_LOOKED_AT = 2 * LEAST  # schedules that may take too much memory, to find `LEAST` when time is up
# What is timed at another time than one stream is, is faster by that much, or is not: clocks may have changed.
LATER = 1.01


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
                plan = with_pool(plan, allocations(graph, memory.needed))
        except (ScheduleError, MemoryPlanError) as error:
            log.info("searching anew: what is remembered is not valid: %s: %s", path, error)
        else:
            runtime.record.remembered.add(shape)
            with runtime.record.stage("capture"):
                captured = capture_plan(runtime.program, plan, arguments, memory)
            return plan, captured, list(found.tried)
    plan, captured, tried = _search(runtime, graph, arguments, memory, near)
    winners.keep(path, winners.Winner(plan.profile, plan.schedule, tuple(tried)))
    return plan, captured, tried


def _search(
    runtime: Runtime, graph: KernelGraph, arguments: StaticArguments, memory: Memory, near: Schedule | None
) -> tuple[Plan, CapturedGraph, Tried]:
    """Profile the kernels, capture and time every schedule that is to be tried, and capture the best for good."""
    plans, seconds, first = _tried(runtime, graph, arguments, memory, near)
    schedules = [plan.schedule for plan in plans]
    compared = [taken if place < first else LATER * taken for place, taken in enumerate(seconds)]
    best = plans[kept(schedules, [plan.reserved for plan in plans], compared)]
    best = with_pool(best, allocations(graph, memory.needed))
    with runtime.record.stage("capture"):
        captured = capture_plan(runtime.program, best, arguments, memory)
    return best, captured, list(zip(schedules, seconds, strict=True)) if len(plans) > 1 else []


def _tried(
    runtime: Runtime, graph: KernelGraph, arguments: StaticArguments, memory: Memory, near: Schedule | None
) -> tuple[list[Plan], list[float], int]:
    """Plans for all schedules that were tried, the seconds a replay of each took, 0 for the only one, and how many of
    them were in the first heat, with one stream.

    Those of a heat work in a memory pool of their own, which goes with them: it holds what all of them need, on every
    stream that one of them uses, workspaces of libraries included.
    """
    record, budget = runtime.record, Budget(time.perf_counter() + runtime.options.search_seconds)
    with _apart(runtime, graph, memory) as apart:
        with record.stage("profile"), annotate.stage(runtime.options.annotate, runtime.name, "profile"):
            kernels, static_bytes = allocations(graph, memory.needed), arguments.static_bytes()
            chain = _chain(runtime, graph)
            probed = with_pool(chain, kernels)  # it is captured first, and reserves for both
            profile, chained = profile_on_cuda(
                graph,
                lambda probe: capture_plan(
                    runtime.program, chain if probe is None else probed, arguments, apart, probe
                ),
            )
        try:
            with record.stage("schedule"):
                schedules = runtime.schedules(graph, profile, near, kernels, static_bytes + chain.memory.arena_bytes)
            with record.stage("plan"):
                heat, *others = affordable(
                    lambda schedule: runtime.plan(graph, profile, schedule, captured=True),
                    schedules,
                    kernels,
                    static_bytes,
                    runtime.options.extra_memory << 20,
                    lambda found, looked: (found < LEAST and looked < MOST_LOOKED_AT) or not budget.over(),
                )
                heat[0] = replace(heat[0], segments={})  # `probed` has reserved them
            if len(heat) == 1 and not others:
                return heat, [0.0], 1
            seconds = race(runtime, heat, arguments, apart, budget, (chain, chained))
        finally:
            chained.reset()
    plans, first = heat[: len(seconds)], len(seconds)
    for heat in others:
        if budget.spent():
            break
        try:
            with _apart(runtime, graph, memory) as apart:
                took = race(runtime, heat, arguments, apart, budget)
        except torch.OutOfMemoryError as error:
            log.info("no more schedules are tried, for want of memory: %s", error)
            break
        plans, seconds = [*plans, *heat[: len(took)]], [*seconds, *took]
    return plans, seconds, first


@contextlib.contextmanager
def _apart(runtime: Runtime, graph: KernelGraph, memory: Memory) -> Iterator[Memory]:
    """Memory for graphs that are all given up in the block; behind it the device has it back."""
    try:
        yield replace(memory, pool=torch.cuda.graph_pool_handle(), candidates=True, reserves=True)
    finally:
        give_up_workspaces(private_streams(torch.device(graph.device), runtime.options.streams))
        give_back_unused()


def _chain(runtime: Runtime, graph: KernelGraph) -> Plan:
    """The program on one stream, before anything is known of its kernels."""
    unknown = build_profile(graph, [0.0] * len(graph), None, None)
    return runtime.plan(graph, unknown, in_a_row(graph), captured=True)
