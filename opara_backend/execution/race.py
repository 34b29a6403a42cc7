"""Captured schedules of one graph timed against each other, within a budget of seconds.

Takes: Plans that may be captured side by side, static arguments, memory. Gives: seconds per replay of each, or of the
first ones. Must not change: state outside the program's intermediates; all that is captured here is given up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.cuda_graph import CapturedGraph, Probe, capture, give_back_unused
from opara_backend.execution.host import Plan, Supply
from opara_backend.execution.measure import seconds_per_replay
from opara_backend.execution.program import Program
from opara_backend.execution.streams import private_streams
from opara_backend.report import annotate
from opara_backend.scheduling.workspaces import NONE, Workspaces

if TYPE_CHECKING:
    from opara_backend.execution.runtime import Runtime

# Bytes of arena that may be held twice while schedules are compared: for more, up to 10 MiB, the allocator takes 20.
# A schedule is captured again instead, launch by launch.
HELD_TWICE = 1 << 20
LEAST = 3  # schedules tried however long that takes


@dataclass(frozen=True)
class Memory:
    """Where graphs that never run at once may work: what kernels allocate comes from `pool`, arenas from `supply`.

    needed: what libraries take of `pool`, by the first run of the graph. candidates: they are given up
    together, so library workspaces in `pool` serve them all. reserves: what a plan says is reserved in one piece
    is; not where graphs of other shapes are in `pool`, which may have left as much.
    """

    pool: Any
    supply: Supply
    needed: Workspaces = NONE
    candidates: bool = False
    reserves: bool = True


@dataclass
class Budget:
    """How long schedules may be tried, and how many are whatever that takes.

    deadline: of `time.perf_counter`. capture: seconds that the last capture took, which what wins needs once more.
    """

    deadline: float
    least: int = LEAST
    capture: float = 0.0

    def over(self) -> bool:
        """True if there is no time left."""
        return time.perf_counter() > self.deadline

    def spent(self) -> bool:
        """True if no other schedule is to be captured."""
        return self.least <= 0 and time.perf_counter() + self.capture > self.deadline

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """A block that captures one."""
        begun = time.perf_counter()
        yield
        self.capture, self.least = time.perf_counter() - begun, self.least - 1


def race(
    runtime: Runtime,
    plans: Sequence[Plan],
    arguments: StaticArguments,
    memory: Memory,
    budget: Budget,
    profiled: tuple[Plan, CapturedGraph] | None = None,
) -> list[float]:
    """Seconds per replay of each of `plans`, or of the first ones where time is short.

    profiled: one stream in program order, and the graph of it that was captured in `memory` already.
    """
    record, program = runtime.record, runtime.program
    needed, keep = max(plan.memory.arena_bytes for plan in plans), False
    if profiled is not None:
        chain, chained = profiled
        held = chained.arena.nbytes
        keep = needed <= held or held <= HELD_TWICE
        if not keep:
            chained.give_up_arena()
            give_back_unused()
    widest = memory.supply(needed)  # for all of them, as they take turns
    racing: list[CapturedGraph] = []
    try:
        with record.stage("capture"), annotate.stage(runtime.options.annotate, runtime.name, "capture"):
            for plan in plans:
                if racing and budget.spent():
                    break
                with budget.capturing():
                    there = keep and plan.schedule == chain.schedule
                    racing.append(chained if there else capture_plan(program, plan, arguments, memory))
        del widest  # from now on it lives as long as a graph that works in it
        with record.stage("search"):
            return seconds_per_replay(racing, budget.deadline - time.perf_counter())
    finally:
        for captured in racing:
            captured.reset()


def capture_plan(
    program: Program, plan: Plan, arguments: StaticArguments, memory: Memory, probe: Probe | None = None
) -> CapturedGraph:
    """`plan` captured on private streams; see `cuda_graph.capture`."""
    streams = private_streams(torch.device(plan.graph.device), max(1, plan.schedule.streams))
    if not memory.reserves:
        plan = replace(plan, segments={})
    stay = memory.candidates
    made = capture(program, plan, arguments.values, streams, memory.pool, memory.supply, probe, workspaces_stay=stay)
    if memory.candidates:
        made.outputs = ()  # nobody reads them, and the next candidate may have their memory
    return made
