"""Memory plans against a checker that looks at every pair, and the check of plans against broken ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opara_backend import memory
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
from opara_backend.scheduling.schedule import Schedule, with_waits
from tests import reference
from tests.strategies import graph_of, scheduled_graphs


def aligned(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


def in_order(graph: KernelGraph) -> Schedule:
    return with_waits(graph, [0] * len(graph), range(len(graph)))


def side_by_side(graph: KernelGraph) -> Schedule:
    """Every kernel on a stream of its own."""
    return with_waits(graph, range(len(graph)), range(len(graph)))


def returned(graph: KernelGraph) -> set[str]:
    """Outputs, and what they are parts of."""
    return {whole for name in graph.outputs if name is not None for whole in reference.wholes(graph, name)}


def may_share(graph: KernelGraph, before: reference.Relation, first: str, second: str) -> bool:
    """True if one is dead before the other is born; what is returned never dies."""
    uses, others, kept = reference.users(graph, first), reference.users(graph, second), returned(graph)
    return (first not in kept and reference.ends_before(before, uses, others)) or (
        second not in kept and reference.ends_before(before, others, uses)
    )


def overlap(first: Placement, second: Placement) -> bool:
    return first.offset < second.offset + second.nbytes and second.offset < first.offset + first.nbytes


def kernel_allocated(graph: KernelGraph) -> list[Buffer]:
    return [b for b in graph.buffers if b.kind == "intermediate" and not b.planned and b.part_of is None]


def with_placement(plan: MemoryPlan, index: int, **changes: Any) -> MemoryPlan:
    changed = replace(plan.placements[index], **changes)
    return replace(plan, placements=(*plan.placements[:index], changed, *plan.placements[index + 1 :]))


@given(scheduled_graphs())
def test_buffers_share_bytes_only_if_one_is_dead_before_the_other_is_born(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    plan = plan_memory(graph, schedule)
    before = reference.happens_before(schedule)
    for place, first in enumerate(plan.placements):
        for second in plan.placements[:place]:
            if overlap(first, second):
                assert may_share(graph, before, first.buffer, second.buffer), (first, second)
    verify_memory(graph, schedule, plan)


@given(scheduled_graphs())
def test_what_is_placed_is_told_sizes_areas_and_conflicts(found: tuple[KernelGraph, Schedule]) -> None:
    """Sizes in whole blocks; areas: those times the launches lived through; conflicts: all pairs that may not share."""
    graph, schedule = found
    with mock.patch.object(memory, "place", wraps=memory.place) as place:
        placements = plan_memory(graph, schedule).placements
    sizes, areas, conflicts = place.call_args.args
    names = [p.buffer for p in placements]
    assert list(sizes) == list(areas) == list(conflicts) == names
    assert sizes == {p.buffer: aligned(p.nbytes) for p in placements}
    before = reference.happens_before(schedule)
    for name in names:
        launches = [schedule.order.index(kernel) for kernel in reference.users(graph, name)]
        assert areas[name] == sizes[name] * (max(launches) - min(launches) + 1)
        together = [other == name or not may_share(graph, before, name, other) for other in names]
        assert conflicts[name] == sum(1 << i for i, conflict in enumerate(together) if conflict)


@given(scheduled_graphs(), st.booleans())
def test_every_planned_buffer_in_use_has_one_aligned_place(
    found: tuple[KernelGraph, Schedule], caller_owns_outputs: bool
) -> None:
    graph, schedule = found
    owned = [name for name in graph.outputs if name is not None] if caller_owns_outputs else []
    plan = plan_memory(graph, schedule, exclude=owned)
    excluded = returned(graph) if caller_owns_outputs else set()
    expected = {
        b.name: b.nbytes
        for b in graph.buffers
        if b.planned and b.nbytes and b.name not in excluded and reference.users(graph, b.name)
    }
    assert {p.buffer: p.nbytes for p in plan.placements} == expected
    assert len(plan.placements) == len(expected)
    for placement in plan.placements:
        assert placement.offset % ALIGNMENT == 0
        assert 0 <= placement.offset <= placement.offset + placement.nbytes <= plan.arena_bytes
    verify_memory(graph, schedule, plan)


@given(scheduled_graphs())
def test_the_arena_is_no_larger_than_without_sharing(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    plan = plan_memory(graph, schedule)
    sizes = [aligned(p.nbytes) for p in plan.placements]
    assert max(sizes, default=0) <= plan.arena_bytes <= sum(sizes)
    assert plan.requested_bytes == sum(p.nbytes for p in plan.placements)


@given(scheduled_graphs())
def test_kernel_allocated_buffers_go_as_soon_as_it_is_safe_on_their_own_stream(
    found: tuple[KernelGraph, Schedule],
) -> None:
    """Safe: every user happens before. Own stream: the allocator takes memory back for the stream it came from."""
    graph, schedule = found
    before, kept = reference.happens_before(schedule), returned(graph)
    expected: list[list[str]] = [[] for _ in schedule.order]
    for buffer in kernel_allocated(graph):
        users = reference.users(graph, buffer.name)
        if buffer.name in kept or not users:
            continue
        owner = min(k for k in users if buffer.name in graph.kernels[k].writes)
        for place, kernel in enumerate(schedule.order):
            if reference.same_stream(schedule, owner, kernel) and reference.ends_before(before, users, [kernel]):
                expected[place].append(buffer.name)
                break
    assert plan_memory(graph, schedule).releases == tuple(tuple(sorted(names)) for names in expected)


@given(st.data())
def test_a_plan_with_two_buffers_moved_onto_each_other_is_rejected(data: st.DataObject) -> None:
    graph, schedule = data.draw(scheduled_graphs(min_kernels=6))
    plan = plan_memory(graph, schedule)
    before = reference.happens_before(schedule)
    apart = [
        (first, second)
        for first, a in enumerate(plan.placements)
        for second, b in enumerate(plan.placements[:first])
        if not may_share(graph, before, a.buffer, b.buffer)
    ]
    assume(apart)
    first, second = data.draw(st.sampled_from(apart))
    moved = with_placement(plan, first, offset=plan.placements[second].offset)
    larger = replace(moved, arena_bytes=2 * plan.arena_bytes)
    with pytest.raises(MemoryPlanError, match="share bytes and live together") as raised:
        verify_memory(graph, schedule, larger)
    assert "'" in str(raised.value)


@given(st.data())
def test_verify_memory_accepts_exactly_what_a_checker_of_all_pairs_accepts(data: st.DataObject) -> None:
    graph, schedule = data.draw(scheduled_graphs(min_kernels=4))
    plan = plan_memory(graph, schedule)
    assume(plan.placements)
    index = data.draw(st.integers(0, len(plan.placements) - 1))
    offset = data.draw(st.integers(-1, plan.arena_bytes // 512)) * 512
    moved = with_placement(plan, index, offset=offset)
    before = reference.happens_before(schedule)
    sound = 0 <= offset <= plan.arena_bytes - moved.placements[index].nbytes and all(
        may_share(graph, before, first.buffer, second.buffer)
        for place, first in enumerate(moved.placements)
        for second in moved.placements[:place]
        if overlap(first, second)
    )
    try:
        verify_memory(graph, schedule, moved)
    except MemoryPlanError:
        assert not sound
    else:
        assert sound


# --- by hand ---------------------------------------------------------------------------------------------------------

CHAIN = graph_of(("in", "a"), ("a", "b"), ("b", "c"), ("c", "d"), outputs=["d"])
FORK = graph_of(("in", "a"), ("in", "b"), ("a b", "c"), outputs=["c"])


def offsets(plan: MemoryPlan) -> dict[str, int]:
    return {p.buffer: p.offset for p in plan.placements}


def test_a_chain_needs_two_buffers() -> None:
    plan = plan_memory(CHAIN, in_order(CHAIN))
    assert plan.arena_bytes == 2 * 4096
    assert plan.requested_bytes == 4 * 4096
    assert offsets(plan)["a"] != offsets(plan)["b"]


def test_kernels_side_by_side_do_not_share_though_one_comes_after_the_other_in_program_order() -> None:
    graph = graph_of(("in", "a"), ("a", "a2"), ("in", "b"), ("b", "b2"), ("a2 b2", "c"), outputs=["c"])
    shared = plan_memory(graph, in_order(graph))
    assert shared.arena_bytes == 3 * 4096
    two_streams = with_waits(graph, (0, 0, 1, 1, 0), range(5))
    assert plan_memory(graph, two_streams).arena_bytes == 4 * 4096
    with pytest.raises(MemoryPlanError, match=r"'a2?' and 'b2?'|'b2?' and 'a2?'"):
        verify_memory(graph, two_streams, shared)


def test_an_output_keeps_its_bytes_to_the_end() -> None:
    graph = graph_of(("in", "a"), ("a", "b"), ("b", "c"), ("c", "d"), outputs=["a", "d"])
    plan = plan_memory(graph, in_order(graph))
    assert all(offset != offsets(plan)["a"] for name, offset in offsets(plan).items() if name != "a")


PARTS = [Buffer("w", "intermediate", 4096, planned=True), *(Buffer(n, part_of="w", nbytes=0) for n in ("w0", "w1"))]


def test_a_whole_lives_as_long_as_its_parts() -> None:
    """`a` is written between the parts of `w` and dies before the whole is read."""
    graph = graph_of(("in", "w0"), ("in", "a"), ("a", "w1"), ("w w0 w1", "b"), buffers=PARTS)
    graph.verify()
    plan = plan_memory(graph, in_order(graph))
    assert set(offsets(plan)) == {"w", "a", "b"}, "parts have no place of their own"
    assert offsets(plan)["w"] != offsets(plan)["a"]
    with pytest.raises(MemoryPlanError, match="share bytes"):
        verify_memory(graph, in_order(graph), with_placement(plan, 1, offset=offsets(plan)["w"]))


def test_an_output_that_is_a_part_keeps_the_whole() -> None:
    graph = graph_of(
        ("in", "w0"), ("in", "w1"), ("w w0 w1", "b"), ("b", "c"), ("c", "d"), outputs=["w0"], buffers=PARTS
    )
    graph.verify()
    plan = plan_memory(graph, in_order(graph))
    assert offsets(plan)["w"] not in (offsets(plan)["c"], offsets(plan)["d"])
    shared = with_placement(plan, [p.buffer for p in plan.placements].index("d"), offset=offsets(plan)["w"])
    with pytest.raises(MemoryPlanError, match=r"'w' and 'd'|'d' and 'w'"):
        verify_memory(graph, in_order(graph), shared)


def test_what_the_caller_owns_takes_no_place_and_neither_does_its_whole() -> None:
    plan = plan_memory(CHAIN, in_order(CHAIN), exclude=["d"])
    assert set(offsets(plan)) == {"a", "b", "c"}
    graph = graph_of(("in", "w0"), ("in", "w1"), ("w w0 w1", "b"), outputs=["w0"], buffers=PARTS)
    assert set(offsets(plan_memory(graph, in_order(graph), exclude=["w0"]))) == {"b"}


def test_small_buffers_fill_the_tightest_gap() -> None:
    """Two gaps open up beside what lives throughout: of 2 and of 1 KiB; 600 bytes go into the smaller."""
    sizes = {"big": 8192, "two": 2048, "keep": 1536, "one": 1024, "rest": 700, "small": 600}
    buffers = [Buffer(name, "intermediate", nbytes, planned=True) for name, nbytes in sizes.items()]
    graph = graph_of(
        ("in", "big two keep one rest"), ("two one", "x"), ("x", "small"), ("big keep rest small", "y"),
        outputs=["y"], buffers=[*buffers, Buffer("x", "input", 0), Buffer("y", "input", 0)],
    )  # fmt: skip
    plan = plan_memory(graph, in_order(graph))
    assert offsets(plan)["small"] == offsets(plan)["one"]
    assert plan.arena_bytes == 8192 + 2048 + 1536 + 1024 + 1024


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"offset": -512}, "'a' lies outside the arena of 12288 bytes"),
        (1, {"offset": 8704}, "'b' lies outside the arena of 12288 bytes"),
        (2, {"nbytes": 8192 + 512}, "'c' (lies outside|is not)"),
        (0, {"nbytes": 512}, "'a' is not 512 bytes large"),
    ],
)
def test_a_place_must_lie_in_the_arena_and_be_large_enough(index: int, changes: dict[str, int], message: str) -> None:
    plan = plan_memory(FORK, side_by_side(FORK))
    assert plan.arena_bytes == 3 * 4096
    with pytest.raises(MemoryPlanError, match=message):
        verify_memory(FORK, side_by_side(FORK), with_placement(plan, index, **changes))


def test_symbolic_and_unknown_sizes_are_not_placed() -> None:
    buffers = [Buffer("a", "intermediate", "4*s0", planned=True), Buffer("b", "intermediate", None, planned=True)]
    graph = graph_of(("in", "a"), ("a", "b"), ("b", "c"), buffers=buffers)
    assert set(offsets(plan_memory(graph, in_order(graph)))) == {"c"}
    assert set(offsets(plan_memory(graph.bind({"a": 8, "b": 8}), in_order(graph)))) == {"a", "b", "c"}


OWN = [Buffer(name, "intermediate", None) for name in "ab"]
OWN_CHAIN = graph_of(("in", "a"), ("a", "b"), ("b", "c"), ("c", "d"), outputs=["d"], buffers=OWN)


def test_releases_by_hand() -> None:
    """On one stream: `a` goes before k2, its last user being k1, and `b` before k3."""
    assert plan_memory(OWN_CHAIN, in_order(OWN_CHAIN)).releases == ((), (), ("a",), ("b",))


def test_no_release_on_another_stream() -> None:
    """Nothing follows on the streams that allocated `a` and `b`, so they stay to the end."""
    schedule = with_waits(OWN_CHAIN, (0, 1, 2, 2), range(4))
    assert plan_memory(OWN_CHAIN, schedule).releases == ((), (), (), ())


def test_a_kernel_allocated_output_is_never_released() -> None:
    graph = replace(OWN_CHAIN, outputs=("a",))
    assert plan_memory(graph, in_order(graph)).releases == ((), (), (), ("b",))
    assert plan_memory(OWN_CHAIN, in_order(OWN_CHAIN), exclude=["a"]).releases == ((), (), (), ("b",))


@pytest.mark.parametrize(
    ("outputs", "releases"),
    [(("d",), ((), ("a",), (), ())), (("d",), (("b",), (), (), ())), (("a",), ((), (), ("a",), ()))],
    ids=["still in use", "not yet made", "returned"],
)
def test_a_release_too_early_is_rejected(outputs: tuple[str], releases: tuple[tuple[str, ...], ...]) -> None:
    graph = replace(OWN_CHAIN, outputs=outputs)
    plan = replace(plan_memory(graph, in_order(graph)), releases=releases)
    with pytest.raises(MemoryPlanError, match=r"'[ab]' is dropped before k\d, still in use"):
        verify_memory(graph, in_order(graph), plan)


def test_a_graph_without_kernels() -> None:
    empty = KernelGraph((), (Buffer("in", "input", 4),), (), ("in",))
    assert plan_memory(empty, Schedule((), (), ())) == MemoryPlan((), 0, ())


@given(scheduled_graphs())
def test_lifetimes_reach_from_the_first_to_the_last_kernel_that_touches(found: tuple[KernelGraph, Schedule]) -> None:
    graph, _ = found
    lives = lifetimes(graph)
    begun = {name: kernel for kernel, names in enumerate(lives.begin) for name in names}
    ended = {name: kernel for kernel, names in enumerate(lives.end) for name in names}
    temporary = {
        b.name
        for b in graph.buffers
        if b.kind == "intermediate" and b.part_of is None and b.name not in returned(graph)
    }
    used = {name: reference.users(graph, name) for name in temporary}
    assert begun == {name: min(users) for name, users in used.items() if users}
    assert ended == {name: max(users) for name, users in used.items() if users}
    assert sum(map(len, lives.begin)) == len(begun)
    assert sum(map(len, lives.end)) == len(ended)
    assert lives.buffers == begun.keys()
