"""Which buffers may share bytes under a Schedule, and when a kernel-allocated buffer may be dropped.

Takes: a KernelGraph with sizes bound and a Schedule. Gives: a `MemoryPlan`: an offset in one arena per planned
buffer, and the points in launch order where buffers that kernels allocate themselves come to an end.
Must not change: the graph or the schedule. Imports no torch. Errors: `MemoryPlanError`, naming both buffers.

Two buffers may share bytes only if every access of one happens before every access of the other. Under a partial
order "before in program order" is not enough, which is why schedulers that keep Inductor's own reuse either race or
switch it off. Sets of kernels and of buffers are held as the bits of one int here, because there are many of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opara_backend.kernel_graph import HIDDEN_STATE, KernelGraph
from opara_backend.placement import members, place
from opara_backend.scheduling.happens_before import HappensBefore
from opara_backend.scheduling.schedule import Schedule, directly_behind, happens_before

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

    @functools.cached_property
    def offsets(self) -> Mapping[str, int]:
        """Where each buffer that has a place begins, in bytes."""
        return {p.buffer: p.offset for p in self.placements}

    @property
    def requested_bytes(self) -> int:
        """What the planned buffers would take without sharing."""
        return sum(p.nbytes for p in self.placements)


@dataclass(frozen=True)
class Lifetimes:
    """Per kernel in program order, the buffers it is the first to touch, and those it is the last to touch.

    Only buffers that come and go are listed: no inputs, constants, outputs, nor what no kernel touches.
    lent: per kernel, those of these that a custom operator is given, which may keep them.
    """

    begin: tuple[tuple[str, ...], ...]
    end: tuple[tuple[str, ...], ...]
    lent: tuple[tuple[str, ...], ...]

    @functools.cached_property
    def buffers(self) -> frozenset[str]:
        """All of them."""
        return frozenset(name for names in self.begin for name in names)

    @functools.cached_property
    def may_stay(self) -> frozenset[str]:
        """All of `lent`."""
        return frozenset(name for names in self.lent for name in names)


def lifetimes(graph: KernelGraph) -> Lifetimes:
    """When each buffer is needed if kernels run in program order; sizes need not be known."""
    begin: list[list[str]] = [[] for _ in graph.kernels]
    end: list[list[str]] = [[] for _ in graph.kernels]
    lent: list[list[str]] = [[] for _ in graph.kernels]
    accesses, kept = accesses_of(graph), with_wholes(graph, graph.outputs)
    custom = accesses.get(HIDDEN_STATE, 0)
    for buffer in graph.buffers:
        touched = accesses.get(buffer.name)
        if buffer.kind == "intermediate" and buffer.part_of is None and buffer.name not in kept and touched:
            begin[next(members(touched))].append(buffer.name)
            end[touched.bit_length() - 1].append(buffer.name)
            for kernel in members(touched & custom):
                lent[kernel].append(buffer.name)
    return Lifetimes(tuple(map(tuple, begin)), tuple(map(tuple, end)), tuple(map(tuple, lent)))


def plan_memory(
    graph: KernelGraph, schedule: Schedule, exclude: Sequence[str] = (), *, in_place: bool = True
) -> MemoryPlan:
    """Place every planned buffer of known size where nobody lives whom it may meet; see `placement`.

    exclude: buffers somebody else allocates (outputs the caller will own). in_place: where a kernel may write an output
    over an input that nobody needs after it, it does. That makes no kernel wait for another: it is done only where the
    schedule has everyone else finished. Who may share with whom takes O(kernels x streams + accesses) set operations;
    placing looks at each pair that may not share.
    """
    accesses = accesses_of(graph)
    kept = with_wholes(graph, graph.outputs)
    excluded = with_wholes(graph, exclude)
    sizes = {
        b.name: b.nbytes
        for b in graph.buffers
        if b.planned and isinstance(b.nbytes, int) and b.nbytes > 0 and b.name not in excluded and accesses.get(b.name)
    }
    over = _written_over(graph, schedule, sizes, kept) if in_place else {}
    for written, first in over.items():  # from here on they are one buffer, called by the first one's name
        accesses[first] |= accesses.pop(written)
        del sizes[written]
        kept |= {first} if written in kept else set()
    index = {name: i for i, name in enumerate(dict.fromkeys((*sizes, *accesses)))}  # those to be placed come first
    touched = [0] * len(graph)
    for name, kernels in accesses.items():
        for kernel in members(kernels):
            touched[kernel] |= 1 << index[name]
    ended, unbegun = _ended(schedule, touched), _ended(_backwards(schedule), touched)
    endless = sum(1 << index[name] for name in kept if name in index)
    wanted = (1 << len(sizes)) - 1
    conflicts: dict[str, int] = {}
    for name in sizes:
        sharing = intersection(ended, accesses[name]) & ~endless
        if name not in kept:
            sharing |= intersection(unbegun, accesses[name])
        conflicts[name] = wanted & ~sharing
    position = {kernel: i for i, kernel in enumerate(schedule.order)}
    grains = {name: _aligned(nbytes) for name, nbytes in sizes.items()}
    areas = {name: grains[name] * _duration(accesses[name], position) for name in sizes}
    offsets, arena = place(grains, areas, conflicts)
    placements = [Placement(name, offsets[name], nbytes) for name, nbytes in sizes.items()]
    placements += [Placement(written, offsets[first], sizes[first]) for written, first in over.items()]
    return MemoryPlan(tuple(placements), arena, _releases(graph, schedule, ended, index, kept | excluded))


def _written_over(graph: KernelGraph, schedule: Schedule, sizes: Mapping[str, int], kept: set[str]) -> dict[str, str]:
    """For each buffer to be written over another's bytes: the first buffer that was there, along the launch order."""
    accesses, ancestors = accesses_of(graph), ancestors_of(schedule)
    over: dict[str, str] = {}
    used: set[str] = set()
    for kernel in schedule.order:
        for read, written in graph.kernels[kernel].inplace:
            fits = written in sizes and sizes.get(read) == sizes[written]
            free = read not in kept and read not in used and written not in over
            if fits and free and replaces(kernel, accesses[read], accesses[written], ancestors):
                over[written] = over.get(read, read)
                used.add(read)
    return over


def replaces(kernel: int, read: int, written: int, ancestors: Sequence[int]) -> bool:
    """True if `kernel` is the last to touch one buffer and the first to touch another.

    read, written: bit sets of the kernels that touch them. ancestors: for each kernel, those that happen before it.
    """
    own = 1 << kernel
    return not read & ~own & ~ancestors[kernel] and all(ancestors[k] & own for k in members(written & ~own))


def _duration(kernels: int, position: Mapping[int, int]) -> int:
    """Launches from the first to the last of `kernels`, both counted."""
    positions = [position[kernel] for kernel in members(kernels)]
    return max(positions) - min(positions) + 1


def verify_memory(graph: KernelGraph, schedule: Schedule, plan: MemoryPlan) -> None:
    """Raise MemoryPlanError if two buffers sharing bytes may be alive together, or one lies outside the arena.

    Computed from reads and writes alone, and by other means than `plan_memory` uses: ancestors where that goes by what
    has ended and begun, vector clocks where that goes by ancestors, to write in place.
    """
    if len(plan.releases) != len(schedule.order):
        raise MemoryPlanError(f"{len(plan.releases)} lists of buffers to drop for {len(schedule.order)} launches")
    ancestors = ancestors_of(schedule)
    accesses = accesses_of(graph)
    before = happens_before(schedule)
    common = {p.buffer: intersection(ancestors, accesses.get(p.buffer, 0)) for p in plan.placements}
    kept = with_wholes(graph, graph.outputs)
    for placement in plan.placements:
        if placement.offset < 0 or placement.offset + placement.nbytes > plan.arena_bytes:
            raise MemoryPlanError(f"buffer {placement.buffer!r} lies outside the arena of {plan.arena_bytes} bytes")
        if placement.nbytes != graph.buffer(placement.buffer).nbytes:
            raise MemoryPlanError(f"buffer {placement.buffer!r} is not {placement.nbytes} bytes large")
    active: list[Placement] = []
    for placement in sorted(plan.placements, key=lambda p: p.offset):
        active = [p for p in active if p.offset + p.nbytes > placement.offset]
        for other in active:
            if not _disjoint(placement.buffer, other.buffer, accesses, common, kept) and not _in_place(
                graph, placement, other, accesses, before, kept
            ):
                raise MemoryPlanError(
                    f"buffers {other.buffer!r} and {placement.buffer!r} share bytes and live together"
                )
        active.append(placement)
    for kernel, names in zip(schedule.order, plan.releases, strict=True):
        for name in names:
            if name in kept or accesses.get(name, 0) & ~ancestors[kernel]:
                raise MemoryPlanError(f"buffer {name!r} is dropped before {graph.kernels[kernel].name}, still in use")


def _in_place(
    graph: KernelGraph,
    first: Placement,
    second: Placement,
    accesses: dict[str, int],
    before: HappensBefore,
    kept: set[str],
) -> bool:
    """True if a kernel writes one over the other, which is over then, exactly where it lay.

    It is the last to touch the one and the first to touch the other.
    """
    if (first.offset, first.nbytes) != (second.offset, second.nbytes):
        return False
    for read, written in ((first.buffer, second.buffer), (second.buffer, first.buffer)):
        for kernel in members(accesses.get(written, 0)):
            if (read, written) not in graph.kernels[kernel].inplace or read in kept:
                continue
            earlier = (before.ordered(k, kernel) for k in members(accesses[read]) if k != kernel)
            later = (before.ordered(kernel, k) for k in members(accesses[written]) if k != kernel)
            if all(earlier) and all(later):
                return True
    return False


def _disjoint(first: str, second: str, accesses: dict[str, int], common: dict[str, int], kept: set[str]) -> bool:
    """True if one buffer's last access happens before the other's first; a kept buffer has no last access."""
    if first not in kept and not accesses.get(first, 0) & ~common[second]:
        return True
    return second not in kept and not accesses.get(second, 0) & ~common[first]


def with_wholes(graph: KernelGraph, names: Iterable[str | None]) -> set[str]:
    """`names` and the buffers they are parts of."""
    found: set[str] = set()
    for name in names:
        while name is not None and name not in found:
            found.add(name)
            name = graph.buffer(name).part_of
    return found


def accesses_of(graph: KernelGraph) -> dict[str, int]:
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


def ancestors_of(schedule: Schedule) -> list[int]:
    """For each kernel, the bit set of kernels that happen before it."""
    found, behind = [0] * len(schedule.order), directly_behind(schedule)
    for kernel in schedule.order:
        for before in behind[kernel]:
            found[kernel] |= found[before] | 1 << before
    return found


def _ended(schedule: Schedule, touched: Sequence[int]) -> list[int]:
    """For each kernel, the bit set of buffers that only kernels happening before it touch.

    touched: for each kernel, the bit set of buffers it touches. What happens before a kernel is a beginning of each
    stream, as long as its vector clock says; what the rest of a stream leaves alone is one set per place on it.
    """
    lanes: list[list[int]] = [[] for _ in range(schedule.streams)]
    for kernel in schedule.order:
        lanes[schedule.stream[kernel]].append(kernel)
    left_alone = []
    for lane in lanes:
        sets = [-1]
        for kernel in reversed(lane):
            sets.append(sets[-1] & ~touched[kernel])
        left_alone.append(sets[::-1])
    ended = []
    before = happens_before(schedule)
    for kernel in range(len(touched)):
        found = ~touched[kernel]  # its own clock counts the kernel itself
        for sets, count in zip(left_alone, before.clock(kernel), strict=True):
            found &= sets[count]
        ended.append(found)
    return ended


def _backwards(schedule: Schedule) -> Schedule:
    """The Schedule in which b happens before a exactly if a happens before b in `schedule`."""
    waits: list[list[int]] = [[] for _ in schedule.waits]
    for kernel, awaited in enumerate(schedule.waits):
        for before in awaited:
            waits[before].append(kernel)
    return Schedule(schedule.stream, schedule.order[::-1], tuple(map(tuple, waits)), schedule.policy)


def intersection(sets: Sequence[int], chosen: int) -> int:
    """What all of `sets` whose indices are in the bit set `chosen` have in common."""
    common = -1
    for index in members(chosen):
        common &= sets[index]
    return common


def _releases(
    graph: KernelGraph, schedule: Schedule, ended: Sequence[int], index: Mapping[str, int], kept: set[str]
) -> tuple[tuple[str, ...], ...]:
    """Drop a kernel-allocated buffer before the first later kernel on its own stream that all its users precede.

    Only there is the allocator, which hands freed memory back to the stream it came from, certain to be in order.
    """
    releases: list[tuple[str, ...]] = []
    pending: dict[int, list[str]] = {}
    owner = {
        name: kernel
        for kernel in reversed(range(len(graph)))
        for name in graph.kernels[kernel].writes
        if (b := graph.buffer(name)).kind == "intermediate" and not b.planned and b.part_of is None
    }
    allocates: dict[int, list[str]] = {}
    for name, kernel in owner.items():
        if name not in kept:
            allocates.setdefault(kernel, []).append(name)
    for kernel in schedule.order:
        stream = schedule.stream[kernel]
        waiting = pending.get(stream, [])
        over = {name: bool(ended[kernel] >> index[name] & 1) for name in waiting}
        releases.append(tuple(sorted(name for name in waiting if over[name])))
        pending[stream] = [name for name in waiting if not over[name]] + allocates.get(kernel, [])
    return tuple(releases)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
