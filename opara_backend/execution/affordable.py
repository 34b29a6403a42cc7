"""Plans for schedules that are to be tried, such that none takes much more memory than one stream, nor do all together.

Takes: schedules, a way to plan one, what kernels allocate. Gives: plans that say what libraries take, too.
Must not change: anything. Pure but for the log.

An arena may not exceed the one stream's by more than `MORE_ARENA` says: weights that are laid out, scaled or merged at
every call may all be so at its beginning, which takes an arena as large as themselves, and is hardly ever fastest.
Arena and what kernels allocate may together take what is `allowed`; a schedule that exceeds it is tried with those
kernels that allocate on fewer streams. Candidates share an arena and a memory pool: each is captured into what those
before it have left there, segments cut for them and workspaces of cuBLAS's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from opara_backend.execution.host import Plan
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.segments import segment_bytes
from opara_backend.scheduling.workspaces import Allocations, Pools, allowed, launched, squeezing

log = logging.getLogger(__name__)

# Bytes by which an arena may exceed that of one stream, if they are more than a tenth of that one and of what the graph
# reads where it lies (weights, mostly).
MORE_ARENA = 32 << 20
TRIES = 3  # at what a schedule that takes too much could be made of


def affordable(
    plan_of: Callable[[Schedule], Plan],
    schedules: Iterable[Schedule],
    kernels: Allocations,
    static_bytes: int,
    extra: int,
) -> list[Plan]:
    """Plans for those of `schedules`, one stream first, that may be tried, or for what could be made of them.

    kernels: what those of the graph allocate. static_bytes: of arguments read where they lie. extra: bytes that may be
    taken beyond what always may.
    """
    squeezed, launch = squeezing(kernels), launched(kernels)

    def placed(schedule: Schedule) -> Plan:
        plan = plan_of(schedule)
        return replace(plan, pool=kernels.reserved(schedule, plan.memory.releases))

    def made_to_fit(one: Plan, most: int) -> Plan:
        """Fewer streams each time: arenas, and when results are dropped, are not known before a schedule is planned."""
        for _ in range(TRIES):
            if one.reserved <= most:
                break
            smaller = squeezed(one.schedule, most - segment_bytes(one.memory.arena_bytes))
            if smaller is None or smaller.streams <= 1:
                break
            one = placed(launch(smaller))
        return one

    found: list[Plan] = []
    tried: set[tuple[object, ...]] = set()
    arena = largest = most = 0
    shared = Pools()
    for schedule in schedules:
        one = placed(schedule)
        if not found:
            row = one.memory.arena_bytes
            largest = row + max(MORE_ARENA, (static_bytes + row) // 10)
            most = allowed(static_bytes, one.reserved, kernels.spared, extra)
        else:
            one = made_to_fit(one, most)
        if one.schedule.launches in tried:
            continue
        widest = max(arena, one.memory.arena_bytes)
        together = kernels.captured(one.schedule, one.memory.releases, shared)
        if not found or (widest <= largest and segment_bytes(widest) + together.reserved <= most):
            found.append(one)
            tried.add(one.schedule.launches)
            arena, shared = widest, together
        else:
            made, own = one.schedule.policy, one.memory.arena_bytes
            log.info("not tried: schedule %s, arena of %d bytes, %d reserved", made, own, one.reserved)
    return found
