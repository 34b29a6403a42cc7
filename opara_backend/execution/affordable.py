"""Plans for schedules that are to be tried, none of which takes much more memory than one stream does.

Takes: schedules, a way to plan one, what kernels allocate. Gives: plans that say what libraries take, too, in heats.
Must not change: anything. Pure but for the log.

An arena may not exceed the one stream's by more than `MORE_ARENA` says: weights that are laid out, scaled or merged at
every call may all be so at its beginning, which takes an arena as large as themselves, and is hardly ever fastest.
Arena and what kernels allocate may together take what is `allowed`; a schedule that exceeds it is tried with those
kernels that allocate on fewer streams.

The plans of a heat are captured side by side, and share an arena and a memory pool: each is captured into what those
before it have left there, segments cut for them and workspaces of cuBLAS's, and reserves more only on streams that none
of them used. Plans of which each alone takes no more than it may, but all together do, are of different heats, one of
which is given up before the next begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from opara_backend.execution.host import Plan
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.segments import segment_bytes
from opara_backend.scheduling.workspaces import Allocations, Pools, allowed, launched, squeezing

log = logging.getLogger(__name__)

# Bytes by which an arena may exceed that of one stream, if they are more than a quarter of that one, and more than a
# tenth of it and of what the graph reads where it lies (weights, mostly).
MORE_ARENA = 32 << 20
TRIES = 3  # at what a schedule that takes too much could be made of

Heats = list[list[Plan]]


def with_pool(plan: Plan, kernels: Allocations) -> Plan:
    """`plan`, saying what its `kernels` take of the allocator's memory."""
    reserved, segments = kernels.packed(plan.schedule, plan.memory.releases)
    return replace(plan, pool=reserved, segments=segments)


@dataclass
class _Heat:
    """Plans captured side by side: the widest of their arenas, and what they leave in their memory pool."""

    plans: list[Plan] = field(default_factory=list)
    arena: int = 0
    pools: Pools = field(default_factory=Pools)

    def add(self, plan: Plan, kernels: Allocations, most: int | None) -> bool:
        """Take `plan` in if all together take at most `most` bytes then; whether it was.

        On streams that a plan before it uses, nothing is reserved for it in one piece.
        """
        arena = max(self.arena, plan.memory.arena_bytes)
        first = {stream: nbytes for stream, nbytes in plan.segments.items() if stream not in self.pools.of}
        pools = kernels.captured(plan.schedule, plan.memory.releases, self.pools, first)
        if most is not None and segment_bytes(arena) + pools.reserved > most:
            return False
        self.plans.append(replace(plan, segments=first))
        self.arena, self.pools = arena, pools
        return True


def affordable(
    plan_of: Callable[[Schedule], Plan],
    schedules: Iterable[Schedule],
    kernels: Allocations,
    static_bytes: int,
    extra: int,
    go_on: Callable[[int, int], bool] = lambda found, looked: True,
) -> Heats:
    """Plans for those of `schedules`, one stream first, that may be tried, or for what could be made of them, by heats.

    kernels: what those of the graph allocate. static_bytes: of arguments read where they lie. extra: bytes that may be
    taken beyond what always may. go_on: asked before each schedule but the first, with how many plans are found and how
    many schedules have been looked at, this one counted, whether to look at it.
    """
    squeezed, launch = squeezing(kernels), launched(kernels)

    def placed(schedule: Schedule) -> Plan:
        return with_pool(plan_of(schedule), kernels)

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

    first, *others = schedules
    row = placed(first)
    arena = row.memory.arena_bytes
    largest = arena + max(MORE_ARENA, (static_bytes + arena) // 10, arena // 4)
    most = allowed(static_bytes, row.reserved, kernels.spared, extra)
    heats, found = [_Heat()], {first.launches}
    heats[0].add(row, kernels, None)
    for looked, schedule in enumerate(others, 1):
        if not go_on(len(found), looked):
            break
        one = made_to_fit(placed(schedule), most)
        if one.schedule.launches in found:
            continue
        if one.memory.arena_bytes > largest or one.reserved > most:
            made, own = one.schedule.policy, one.memory.arena_bytes
            log.info("not tried: schedule %s, arena of %d bytes, %d reserved", made, own, one.reserved)
            continue
        found.add(one.schedule.launches)
        if not any(heat.add(one, kernels, most) for heat in heats):
            heats.append(_Heat())
            heats[-1].add(one, kernels, None)
    return [heat.plans for heat in heats]
