"""Plans for schedules that are to be tried, such that none takes much more memory than one stream, nor do all together.

Takes: schedules, a way to plan one, what libraries need. Gives: plans, and what each takes.
Must not change: anything. Pure but for the log.

An arena may not exceed the one stream's by more than `MORE_ARENA` says: weights that are laid out, scaled or merged at
every call may all be so at its beginning, which takes an arena as large as themselves, and is hardly ever fastest.
Arena and what kernels allocate may together take what is `allowed`; a schedule that exceeds it is tried with those
kernels that allocate much on fewer streams. Candidates share an arena and, on each stream, what the allocator reserved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from opara_backend.execution.host import Plan
from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.segments import segment_bytes
from opara_backend.scheduling.workspaces import Workspaces, allocations, allowed, squeezing

log = logging.getLogger(__name__)

# Bytes by which an arena may exceed that of one stream, if they are more than a tenth of that one and of what the graph
# reads where it lies (weights, mostly).
MORE_ARENA = 32 << 20


@dataclass(frozen=True)
class Affordable:
    """A plan, and bytes it takes: by stream, what its kernels allocate, as the allocator reserves it."""

    plan: Plan
    pool: Mapping[int, int]

    @property
    def arena(self) -> int:
        """Bytes of its arena."""
        return self.plan.memory.arena_bytes

    @property
    def reserved(self) -> int:
        """Bytes the allocator reserves for all of it."""
        return _reserved(self.arena, self.pool)


def affordable(
    plan_of: Callable[[Schedule], Plan],
    graph: KernelGraph,
    schedules: Iterable[Schedule],
    needed: Workspaces,
    static_bytes: int,
    extra: int,
) -> list[Affordable]:
    """Plans for those of `schedules`, one stream first, that may be tried, or for what could be made of them.

    static_bytes: of arguments read where they lie. extra: bytes that may be taken beyond what always may.
    """
    kernels, squeezed = allocations(graph, needed), squeezing(graph, needed)

    def placed(schedule: Schedule) -> Affordable:
        plan = plan_of(schedule)
        return Affordable(plan, kernels.reserved(schedule, plan.memory.releases))

    found: list[Affordable] = []
    arena = largest = most = 0
    shared: dict[int, int] = {}
    for schedule in schedules:
        one = placed(schedule)
        if not found:
            largest = one.arena + max(MORE_ARENA, (static_bytes + one.arena) // 10)
            most = allowed(static_bytes, one.reserved, kernels.spared, extra)
        elif one.reserved > most:
            smaller = squeezed(schedule, most - segment_bytes(one.arena))
            if smaller is not None and smaller.streams > 1 and smaller.launches != schedule.launches:
                one = placed(smaller)
        widest = max(arena, one.arena)
        together = {stream: max(shared.get(stream, 0), one.pool.get(stream, 0)) for stream in {*shared, *one.pool}}
        if widest <= largest and _reserved(widest, together) <= most:
            found.append(one)
            arena, shared = widest, together
        else:
            made = one.plan.schedule.policy
            log.info("not tried: schedule %s, arena of %d bytes, %d allocated", made, one.arena, sum(one.pool.values()))
    return found


def _reserved(arena: int, pool: Mapping[int, int]) -> int:
    return segment_bytes(arena) + sum(pool.values())
