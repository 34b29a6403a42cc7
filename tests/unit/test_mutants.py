"""Claims that mutation testing found unprotected; MUTATION.md has the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.memory import (
    ALIGNMENT,
    MemoryPlan,
    MemoryPlanError,
    Placement,
    lifetimes,
    plan_memory,
    verify_memory,
)
from opara_backend.placement import STARTS, TRIES
from opara_backend.scheduling.happens_before import HappensBefore
from opara_backend.scheduling.schedule import Schedule, ScheduleError, verify, with_waits
from tests import reference
from tests.strategies import graph_of, scheduled_graphs

CHAIN = graph_of(("in", "a"), ("a", "b"), ("b", "c"))
VALID = Schedule((0, 1, 0), (0, 1, 2), ((), (0,), (1,)), "mine")
MANY = 300  # more than CPython keeps one object of


def test_no_kernel_happens_before_itself_however_large_its_number() -> None:
    """Claim: the relation is irreflexive in graphs of any size; kernels are compared as numbers, not as objects."""
    relation = HappensBefore(1)
    for kernel in range(MANY):
        relation.launch(kernel, 0)
    assert not any(relation.ordered(kernel, int(str(kernel))) for kernel in range(MANY))


def test_a_valid_schedule_is_accepted_however_many_kernels_it_has() -> None:
    """Claim: `verify` accepts every valid schedule, also one of hundreds of kernels."""
    graph = graph_of(*((f"b{k}", f"b{k + 1}") for k in range(MANY)))
    verify(graph, Schedule((0,) * MANY, tuple(range(MANY)), ((),) * MANY))


@pytest.mark.parametrize(
    "surplus",
    [replace(VALID, stream=(*VALID.stream, 0)), replace(VALID, waits=(*VALID.waits, ()))],
    ids=["stream", "waits"],
)
def test_a_schedule_for_more_kernels_than_the_graph_has_is_rejected(surplus: Schedule) -> None:
    """Claim: a schedule made for another, larger graph is rejected, though all its launches are of this one."""
    with pytest.raises(ScheduleError, match="each of the 3 kernels exactly once"):
        verify(CHAIN, surplus)


def test_a_wait_for_the_kernel_just_behind_the_last_is_named() -> None:
    """Claim: the only error of `verify` is ScheduleError, also for the first number that is no kernel's."""
    with pytest.raises(ScheduleError, match="k1 waits for an event of kernel 3, which is not launched before it"):
        verify(CHAIN, replace(VALID, waits=((), (3,), (1,))))


def test_a_schedule_once_made_does_not_change() -> None:
    """Claim: what `verify` accepted is what runs; nobody can alter it in between."""
    with pytest.raises(FrozenInstanceError):
        VALID.stream = (0, 0, 0)  # type: ignore[misc]
    assert hash(VALID) == hash(replace(VALID))


def test_naming_a_buffer_twice_is_no_conflict_of_a_kernel_with_itself() -> None:
    """Claim: a conflict takes two kernels; how often one of them mentions a buffer does not matter."""
    graph = graph_of(("in in", "a a"), ("a a in", "a b a"))
    verify(graph, Schedule((0, 1), (0, 1), ((), (0,))))


def size(value: int | str | None) -> int:
    return value if isinstance(value, int) else 0


def best_fit(graph: KernelGraph, schedule: Schedule) -> dict[str, int]:
    """Offsets by the words of `placement.place`: in the tightest gap that is free for the buffer's life.

    Largest first, then by size times launches lived through, each time with what ended on top moved to the front.
    """
    users = {b.name: reference.users(graph, b.name) for b in graph.buffers}
    sizes = {b.name: aligned(size(b.nbytes)) for b in graph.buffers if b.planned and size(b.nbytes) and users[b.name]}
    position = {kernel: i for i, kernel in enumerate(schedule.order)}
    lived = {name: [position[kernel] for kernel in users[name]] for name in sizes}
    areas = {name: sizes[name] * (max(lived[name]) - min(lived[name]) + 1) for name in sizes}
    bound = plan_bound(graph, schedule, sizes)
    tried = []
    for weight in (sizes, areas):
        order = sorted(sizes, key=lambda n: (-weight[n], n))
        for _ in range(TRIES):
            found = placed_by(graph, schedule, order)
            tried.append((max((found[n] + sizes[n] for n in sizes), default=0), len(tried), found))
            if tried[-1][0] <= bound:
                return min(tried)[2]
            top = max(order, key=lambda n: (found[n] + sizes[n], n))
            order = [top, *(n for n in order if n != top)]
    return min(tried)[2]


def plan_bound(graph: KernelGraph, schedule: Schedule, sizes: dict[str, int]) -> int:
    """Where placing stops: buffers found to need room side by side, from the eight largest on."""
    before = reference.happens_before(schedule)
    kept = {whole for name in graph.outputs if name is not None for whole in reference.wholes(graph, name)}
    users = {name: reference.users(graph, name) for name in sizes}

    def together(one: str, other: str) -> bool:
        return not (one not in kept and reference.ends_before(before, users[one], users[other])) and not (
            other not in kept and reference.ends_before(before, users[other], users[one])
        )

    heavy = sorted(sizes, key=lambda n: -sizes[n])  # of those alike, the first in the graph first
    best = 0
    for start in heavy[:STARTS]:
        chosen = [start]
        for name in heavy:
            if name not in chosen and all(together(name, other) for other in chosen):
                chosen.append(name)
        best = max(best, sum(sizes[n] for n in chosen))
    return best


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def placed_by(graph: KernelGraph, schedule: Schedule, names: Sequence[str]) -> dict[str, int]:
    """Offsets of buffers placed in this order."""
    before = reference.happens_before(schedule)
    kept = {whole for name in graph.outputs if name is not None for whole in reference.wholes(graph, name)}
    users = {b.name: reference.users(graph, b.name) for b in graph.buffers}
    ends: dict[str, int] = {}
    found: dict[str, int] = {}
    for name in names:
        taken: set[int] = set()
        for other, offset in found.items():
            first = other not in kept and reference.ends_before(before, users[other], users[name])
            last = name not in kept and reference.ends_before(before, users[name], users[other])
            if not first and not last:
                taken.update(range(offset // ALIGNMENT, ends[other] // ALIGNMENT))
        needed = aligned(size(graph.buffer(name).nbytes)) // ALIGNMENT
        gaps = []  # (length, first block) of every stretch of free blocks in front of the last taken one
        behind = max(taken, default=-1) + 1
        for block in range(behind):
            if block not in taken and (block == 0 or block - 1 in taken):
                length = next(n for n in range(behind) if block + n in taken)
                gaps.append((length, block))
        fitting = [gap for gap in gaps if gap[0] >= needed]
        found[name] = (min(fitting)[1] if fitting else behind) * ALIGNMENT
        ends[name] = found[name] + needed * ALIGNMENT
    return found


@given(scheduled_graphs())
def test_buffers_are_placed_in_the_tightest_free_gap(found: tuple[KernelGraph, Schedule]) -> None:
    """Claim: `plan_memory` shares whatever may be shared, in the order and by the rule its text states."""
    graph, schedule = found
    plan = plan_memory(graph, schedule)
    assert {p.buffer: p.offset for p in plan.placements} == best_fit(graph, schedule)
    assert plan.arena_bytes == max((-(-(p.offset + p.nbytes) // 512) * 512 for p in plan.placements), default=0)


@st.composite
def lives(draw: st.DrawFn) -> KernelGraph:
    """Twelve kernels in a row, and buffers of one to six blocks, each alive from one of the kernels to another."""
    reads: list[list[str]] = [[] for _ in range(12)]
    writes: list[list[str]] = [[] for _ in range(12)]
    buffers = []
    for index in range(draw(st.integers(6, 14))):
        birth, death = sorted((draw(st.integers(0, 11)), draw(st.integers(0, 11))))
        buffers.append(Buffer(f"b{index}", "intermediate", ALIGNMENT * draw(st.integers(1, 6)), planned=True))
        writes[birth].append(f"b{index}")
        reads[death] += [f"b{index}"] if death > birth else []
    return graph_of(*((" ".join(r), " ".join(w)) for r, w in zip(reads, writes, strict=True)), buffers=buffers)


@given(lives())
def test_so_they_are_where_many_gaps_lie_side_by_side(graph: KernelGraph) -> None:
    """Claim: of all the gaps the tightest is taken, the lowest of several alike, and none that is only half free."""
    plan = plan_memory(graph, schedule := with_waits(graph, [0] * 12, range(12)))
    assert {p.buffer: p.offset for p in plan.placements} == best_fit(graph, schedule)
    verify_memory(graph, schedule, plan)


GROWING = graph_of(
    ("", "a"),
    ("a", "b"),
    ("b", "c"),
    ("c", "end"),
    buffers=[
        Buffer("a", "intermediate", 512, planned=True),
        Buffer("b", "intermediate", 2048, planned=True),
        Buffer("c", "intermediate", 4096, planned=True),
        Buffer("end", "input", 0),
    ],
)


@pytest.mark.parametrize("streams", [(0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 2, 3)], ids=str)
def test_a_chain_shares_alike_on_any_streams_its_smallest_buffer_below_the_largest(streams: tuple[int, ...]) -> None:
    """Claim: waits order as stream order does, so `a`, over before `c` begins, lies below it wherever they run.

    Smallest first would take 512 bytes more: `c` would find only the bytes of `a` free in front of `b`.
    """
    plan = plan_memory(GROWING, with_waits(GROWING, streams, range(4)))
    assert {p.buffer: p.offset for p in plan.placements} == {"a": 0, "b": 4096, "c": 0}
    assert plan.arena_bytes == 4096 + 2048


def test_the_first_buffer_of_a_program_is_shared_like_any_other() -> None:
    """Claim: sharing does not depend on a buffer's place in the program; here nothing is read before `a` is written."""
    graph = graph_of(("", "a"), ("a", "b"), ("b", "c"), ("c", "d"))
    plan = plan_memory(graph, with_waits(graph, [0] * 4, range(4)))
    assert plan.arena_bytes == 2 * 4096


def test_one_byte_in_front_of_the_arena_is_outside_it() -> None:
    """Claim: no byte of a buffer lies outside the arena."""
    graph = graph_of(("", "a"))
    schedule = with_waits(graph, [0], [0])
    with pytest.raises(MemoryPlanError, match="'a' lies outside the arena"):
        verify_memory(graph, schedule, MemoryPlan((Placement("a", -1, 4096),), 8192, ((),)))


def test_a_place_larger_than_its_buffer_is_rejected() -> None:
    """Claim: a plan says of every buffer exactly how large it is."""
    graph = graph_of(("", "a"))
    with pytest.raises(MemoryPlanError, match="'a' is not 4608 bytes large"):
        verify_memory(graph, with_waits(graph, [0], [0]), MemoryPlan((Placement("a", 0, 4608),), 8192, ((),)))


def test_a_place_for_a_buffer_nobody_touches_does_no_harm() -> None:
    """Claim: `verify_memory` objects only to buffers that are alive together; what is never touched never lives."""
    unused, place = Buffer("b", "intermediate", 512, planned=True), Placement("b", 0, 512)
    buffers, places = (unused, replace(unused, name="c")), (place, replace(place, buffer="c"))
    verify_memory(KernelGraph((), buffers, ()), Schedule((), (), ()), MemoryPlan(places, 512, ()))
    graph = graph_of(("", "a"), outputs=["a"], buffers=[unused])
    for places in ((place, Placement("a", 0, 4096)), (Placement("a", 0, 4096), place)):
        verify_memory(graph, with_waits(graph, [0], [0]), MemoryPlan(places, 4096, ((),)))


def test_dropping_a_buffer_nobody_touches_does_no_harm() -> None:
    """Claim: `verify_memory` objects to a drop only if the buffer is still in use or returned."""
    graph = graph_of(("", "a"), buffers=[Buffer("b", "intermediate", None)])
    verify_memory(graph, with_waits(graph, [0], [0]), MemoryPlan((), 0, (("b",),)))


@pytest.mark.parametrize("releases", [((),), ((), (), ())], ids=["fewer", "more"])
def test_a_plan_with_other_than_one_list_of_drops_per_launch_is_rejected(releases: tuple[tuple[str, ...], ...]) -> None:
    """Claim: a plan is for one schedule; drops that belong to no launch of it do not go unseen."""
    graph = graph_of(("", "a"), ("a", "b"))
    with pytest.raises(MemoryPlanError):
        verify_memory(graph, with_waits(graph, [0, 0], [0, 1]), MemoryPlan((), 0, releases))


def test_a_plan_once_made_does_not_change() -> None:
    """Claim: what `verify_memory` accepted is what runs; nobody can alter it in between."""
    place = Placement("a", 0, 512)
    plan = MemoryPlan((place,), 512, ((),))
    with pytest.raises(FrozenInstanceError):
        place.offset = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.arena_bytes = 0  # type: ignore[misc]
    assert hash(plan) == hash(replace(plan))
    with pytest.raises(FrozenInstanceError):
        lifetimes(CHAIN).end = ()  # type: ignore[misc]


def test_a_graph_read_back_is_planned_like_the_graph_written() -> None:
    """Claim: a plan depends on what the graph says, not on which objects say it."""
    own = [Buffer(name, "intermediate", None) for name in "ab"]
    graph = graph_of(("in", "a"), ("a", "b"), ("b", "c"), ("c", "d"), outputs=["d"], buffers=own)
    again = KernelGraph.from_json(graph.to_json())
    schedule = with_waits(again, [0] * 4, range(4))
    plan = plan_memory(again, schedule)
    assert plan == plan_memory(graph, schedule)
    assert plan.releases == ((), (), ("a",), ("b",))
    verify_memory(again, schedule, plan_memory(graph, schedule))
    assert lifetimes(again) == lifetimes(graph)
    assert lifetimes(graph).buffers == set("abc")


def test_what_is_returned_and_owned_by_the_caller_is_not_dropped_either() -> None:
    """Claim: no drop of a buffer that is returned or that somebody else allocates, least of all of one that is both."""
    graph = graph_of(("", "a"), ("a", "b"), ("b", "c"), outputs=["a"], buffers=[Buffer("a", "intermediate", None)])
    assert plan_memory(graph, with_waits(graph, [0] * 3, range(3)), exclude=["a"]).releases == ((), (), ())


def test_of_two_gaps_alike_the_lower_is_taken() -> None:
    """Claim: one graph and schedule make one plan: where two gaps are equally tight, the lower is filled."""
    buffers = [Buffer(name, "intermediate", 1024, planned=True) for name in "abcd"]
    buffers += [Buffer("z", "intermediate", 512, planned=True), Buffer("x", "input", 0), Buffer("y", "input", 0)]
    graph = graph_of(("", "a b c d"), ("a c", "x"), ("x", "z"), ("b d z", "y"), buffers=buffers)
    plan = plan_memory(graph, with_waits(graph, [0] * 4, range(4)))
    assert {p.buffer: p.offset for p in plan.placements} == {"a": 0, "b": 1024, "c": 2048, "d": 3072, "z": 0}


def test_a_buffer_within_the_span_of_another_leaves_no_gap_behind_it() -> None:
    """Claim: no two buffers alive together share bytes; here `b` lies inside `a`, and `c` lives with both.

    Each lives from the kernel that writes it to the next: first d, then b behind d, c, and last a, the largest.
    """
    sizes = {"a": 2048, "b": 512, "c": 512, "d": 1024}
    buffers = [Buffer(name, "intermediate", nbytes, planned=True) for name, nbytes in sizes.items()]
    chain = (("", "d"), ("d", "b"), ("b", "c"), ("c", "a"), ("a", "end"))
    graph = graph_of(*chain, buffers=[*buffers, Buffer("end", "input", 0)])
    plan = plan_memory(graph, schedule := with_waits(graph, [0] * 5, range(5)))
    assert {p.buffer: p.offset for p in plan.placements} == {"a": 0, "b": 1024, "c": 2048, "d": 0}
    verify_memory(graph, schedule, plan)


def test_the_first_kernel_happens_before_no_other_by_itself() -> None:
    """Claim: buffers of kernels on two streams that do not wait share no bytes, nor with those of the first kernel."""
    graph = graph_of(("", "a"), ("", "b"))
    shared = MemoryPlan((Placement("a", 0, 4096), Placement("b", 0, 4096)), 4096, ((), ()))
    with pytest.raises(MemoryPlanError, match="share bytes and live together"):
        verify_memory(graph, with_waits(graph, [0, 1], [0, 1]), shared)
    verify_memory(graph, with_waits(graph, [0, 0], [0, 1]), shared)


def test_a_plan_is_accepted_however_many_launches_it_is_for() -> None:
    """Claim: `verify_memory` accepts what `plan_memory` makes, also for hundreds of kernels."""
    graph = graph_of(*((f"b{k}", f"b{k + 1}") for k in range(MANY)))
    schedule = with_waits(graph, [0] * MANY, range(MANY))
    verify_memory(graph, schedule, plan_memory(graph, schedule))
