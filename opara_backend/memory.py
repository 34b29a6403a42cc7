"""Which buffers may share bytes under a Schedule, and when a kernel-allocated buffer may be dropped.

Takes: a KernelGraph with sizes bound and a Schedule. Gives: a `MemoryPlan`: an offset in one arena per planned
buffer, and the points in launch order where buffers that kernels allocate themselves come to an end.
Must not change: the graph or the schedule. Imports no torch. Errors: `MemoryPlanError`, naming both buffers.

Two buffers may share bytes only if every access of one happens before every access of the other. Under a partial
order "before in program order" is not enough, which is why schedulers that keep Inductor's own reuse either race or
switch it off. Happens-before is held as one bit set per kernel here, because the question is asked for sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.schedule import Schedule

ALIGNMENT = 512  # what the CUDA caching allocator gives, so that kernels see the alignment they were tuned with


class MemoryPlanError(RuntimeError):
    """A plan in which buffers that live together share bytes: a bug, never the user's fault."""


@dataclass(frozen=True)
class Placement:
    """`nbytes` bytes at `offset` of the arena for `buffer`."""

    buffer: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where planned buffers live. releases: per place in launch order, kernel-allocated buffers to drop before it."""

    placements: tuple[Placement, ...]
    arena_bytes: int
    releases: tuple[tuple[str, ...], ...]

    @property
    def requested_bytes(self) -> int:
        """What the planned buffers would take without sharing."""
        return sum(p.nbytes for p in self.placements)


def plan_memory(graph: KernelGraph, schedule: Schedule, exclude: Sequence[str] = ()) -> MemoryPlan:
    """Place every planned buffer of known size, largest first, each in the tightest gap that is free for its life.

    exclude: buffers somebody else allocates (outputs the caller will own). O(buffers^2) set operations.
    """
    ancestors = _ancestors(schedule)
    accesses = _accesses(graph)
    kept = set(graph.outputs) | set(exclude)
    sizes = {
        b.name: b.nbytes
        for b in graph.buffers
        if b.planned and isinstance(b.nbytes, int) and b.nbytes > 0 and b.name not in exclude and accesses.get(b.name)
    }
    common = {name: _common_ancestors(accesses[name], ancestors) for name in sizes}
    placed: list[Placement] = []
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        busy = sorted(
            (p.offset, p.offset + _aligned(p.nbytes))
            for p in placed
            if not _disjoint(name, p.buffer, accesses, common, kept)
        )
        placed.append(Placement(name, _tightest_gap(busy, _aligned(sizes[name])), sizes[name]))
    arena = max((p.offset + _aligned(p.nbytes) for p in placed), default=0)
    order = {b.name: i for i, b in enumerate(graph.buffers)}
    placed.sort(key=lambda p: order[p.buffer])
    return MemoryPlan(tuple(placed), arena, _releases(graph, schedule, ancestors, accesses, kept))


def verify_memory(graph: KernelGraph, schedule: Schedule, plan: MemoryPlan) -> None:
    """Raise MemoryPlanError if two buffers sharing bytes may be alive together, or one lies outside the arena."""
    ancestors = _ancestors(schedule)
    accesses = _accesses(graph)
    common = {p.buffer: _common_ancestors(accesses[p.buffer], ancestors) for p in plan.placements}
    kept = set(graph.outputs)
    for placement in plan.placements:
        if placement.offset < 0 or placement.offset + placement.nbytes > plan.arena_bytes:
            raise MemoryPlanError(f"buffer {placement.buffer!r} lies outside the arena of {plan.arena_bytes} bytes")
    active: list[Placement] = []
    for placement in sorted(plan.placements, key=lambda p: p.offset):
        active = [p for p in active if p.offset + p.nbytes > placement.offset]
        for other in active:
            if not _disjoint(placement.buffer, other.buffer, accesses, common, kept):
                raise MemoryPlanError(
                    f"buffers {other.buffer!r} and {placement.buffer!r} share bytes and live together"
                )
        active.append(placement)


def _disjoint(first: str, second: str, accesses: dict[str, int], common: dict[str, int], kept: set[str | None]) -> bool:
    """True if one buffer's last access happens before the other's first; a kept buffer has no last access."""
    if first not in kept and not accesses[first] & ~common[second]:
        return True
    return second not in kept and not accesses[second] & ~common[first]


def _ancestors(schedule: Schedule) -> list[int]:
    """For each kernel, the bit set of kernels that happen before it."""
    found = [0] * len(schedule.stream)
    last: dict[int, int] = {}
    for kernel in schedule.order:
        stream = schedule.stream[kernel]
        bits = 0
        for before in (*schedule.waits[kernel], *([last[stream]] if stream in last else [])):
            bits |= found[before] | 1 << before
        found[kernel] = bits
        last[stream] = kernel
    return found


def _accesses(graph: KernelGraph) -> dict[str, int]:
    """For each buffer, the bit set of kernels that touch it or a part of it."""
    whole = {b.name: b.part_of for b in graph.buffers}
    found: dict[str, int] = {}
    for index, kernel in enumerate(graph.kernels):
        for name in (*kernel.reads, *kernel.writes):
            owner: str | None = name
            while owner is not None:
                found[owner] = found.get(owner, 0) | 1 << index
                owner = whole.get(owner)
    return found


def _common_ancestors(accesses: int, ancestors: list[int]) -> int:
    """Kernels that happen before every kernel of the bit set `accesses`."""
    common = -1
    while accesses:
        lowest = accesses & -accesses
        common &= ancestors[lowest.bit_length() - 1]
        accesses ^= lowest
    return common


def _releases(
    graph: KernelGraph, schedule: Schedule, ancestors: list[int], accesses: dict[str, int], kept: set[str | None]
) -> tuple[tuple[str, ...], ...]:
    """Drop a kernel-allocated buffer before the first later kernel on its own stream that all its users precede.

    Only there is the allocator, which hands freed memory back to the stream it came from, certain to be in order.
    """
    releases: list[list[str]] = [[] for _ in schedule.order]
    pending: dict[int, list[str]] = {}
    owner = {
        name: index
        for index, kernel in reversed(list(enumerate(graph.kernels)))
        for name in kernel.writes
        if (b := graph.buffer(name)).kind == "intermediate" and not b.planned and b.part_of is None
    }
    allocates: dict[int, list[str]] = {}
    for name, kernel in owner.items():
        if name not in kept:
            allocates.setdefault(kernel, []).append(name)
    for place, kernel in enumerate(schedule.order):
        stream = schedule.stream[kernel]
        waiting = pending.setdefault(stream, [])
        done = [n for n in waiting if not accesses[n] & ~ancestors[kernel]]
        releases[place] = sorted(done)
        pending[stream] = [n for n in waiting if n not in done] + allocates.get(kernel, [])
    return tuple(tuple(names) for names in releases)


def _tightest_gap(busy: list[tuple[int, int]], nbytes: int) -> int:
    """Offset of the smallest free gap of at least `nbytes` between `busy` intervals (sorted), else behind them all."""
    best, best_size = -1, 0
    end = 0
    for start, stop in busy:
        gap = start - end
        if gap >= nbytes and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return best if best >= 0 else end


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
