"""Buffers written over one another: only where nobody needs the one below any more, and with nobody waiting longer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend import memory
from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.memory import (
    MemoryPlan,
    MemoryPlanError,
    Placement,
    accesses_of,
    ancestors_of,
    plan_memory,
    replaces,
    verify_memory,
)
from opara_backend.profiling.profile import build_profile
from opara_backend.scheduling.in_place import written_in_place
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule, verify, with_waits
from tests import reference
from tests.strategies import graph_of, graphs_written_in_place, scheduled_graphs

BLOCK = 512


def over(graph: KernelGraph, **pairs: str) -> KernelGraph:
    """`graph` with kernels that may write in place, `k1="a>b c>d"`: b over a and d over c."""
    kernels = [
        replace(k, inplace=tuple(tuple(pair.split(">")) for pair in pairs.get(k.name, "").split()))  # type: ignore[misc]
        for k in graph.kernels
    ]
    return replace(graph, kernels=tuple(kernels))


def sized(names: str, nbytes: int = 1024) -> list[Buffer]:
    return [Buffer(name, "intermediate", nbytes, planned=True) for name in names]


def offsets(plan: MemoryPlan) -> dict[str, int]:
    return {p.buffer: p.offset for p in plan.placements}


def overwritten(graph: KernelGraph, schedule: Schedule, plan: MemoryPlan, order: Sequence[int]) -> list[str]:
    """Reads, when kernels run in `order`, that find bytes which another buffer's kernel wrote last."""
    places = {p.buffer: range(p.offset // BLOCK, -(-(p.offset + p.nbytes) // BLOCK)) for p in plan.placements}
    owner: dict[int, str] = {}
    wrong = []
    written: set[str] = set()
    for kernel in order:
        for name in graph.kernels[kernel].reads:
            for whole in reference.wholes(graph, name):
                if whole in written and any(owner.get(block) != whole for block in places.get(whole, ())):
                    wrong.append(f"{graph.kernels[kernel].name} reads {whole}")
        for name in graph.kernels[kernel].writes:
            for whole in reference.wholes(graph, name):
                written.add(whole)
                owner.update(dict.fromkeys(places.get(whole, ()), whole))
    return wrong + [
        f"{name} is returned"
        for name in {w for n in graph.outputs if n is not None for w in reference.wholes(graph, n)} & written
        if any(owner.get(block) != name for block in places.get(name, ()))
    ]


@given(graphs_written_in_place(), st.integers(0, 1000))
def test_in_every_order_kernels_find_what_was_written_for_them(found: tuple[KernelGraph, Schedule], seed: int) -> None:
    """By running them, with no look at how plans are made or checked."""
    graph, schedule = found
    plan = plan_memory(graph, schedule)
    verify_memory(graph, schedule, plan)
    before = reference.happens_before(schedule)
    rng = random.Random(seed)
    left, order = list(range(len(graph))), []
    while left:
        kernel = rng.choice([k for k in left if not any(before[other][k] for other in left)])
        left.remove(kernel)
        order.append(kernel)
    assert overwritten(graph, schedule, plan, order) == []


@given(graphs_written_in_place())
def test_every_buffer_has_its_place_either_way(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    plans = [plan_memory(graph, schedule, in_place=yes) for yes in (True, False)]
    assert offsets(plans[0]).keys() == offsets(plans[1]).keys()
    assert plans[0].releases == plans[1].releases


@given(scheduled_graphs(min_kernels=1), st.data())
def test_a_kernel_may_replace_what_all_others_are_done_with(
    found: tuple[KernelGraph, Schedule], data: st.DataObject
) -> None:
    """One buffer by another: who touches the one happens before the kernel, who touches the other after it."""
    graph, schedule = found
    before, kernels = reference.happens_before(schedule), range(len(graph))
    kernel = data.draw(st.sampled_from(kernels))
    earlier = {k for k in kernels if before[k][kernel]} | {kernel}
    later = {k for k in kernels if before[kernel][k]} | {kernel}
    stray = st.sets(st.sampled_from(kernels), max_size=1)
    read = {kernel} | data.draw(st.sets(st.sampled_from(sorted(earlier)))) | data.draw(stray)
    written = {kernel} | data.draw(st.sets(st.sampled_from(sorted(later)))) | data.draw(stray)
    expected = read <= earlier and written <= later
    sets = (sum(1 << k for k in chosen) for chosen in (read, written))
    assert replaces(kernel, *sets, ancestors_of(schedule)) == expected


def test_a_plan_that_writes_over_what_is_still_read_is_found_by_other_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the planner wrong about it, the check would not be wrong in the same way."""
    graph = graph_of(("", "a"), ("a", "b"), ("a b", "o"), outputs="o", buffers=sized("abo"))
    schedule = with_waits(graph, (0, 0, 0), range(3))
    monkeypatch.setattr(memory, "replaces", lambda *given: True)
    plan = plan_memory(over(graph, k1="a>b"), schedule)
    assert offsets(plan)["a"] == offsets(plan)["b"]
    with pytest.raises(MemoryPlanError, match="live together"):
        verify_memory(over(graph, k1="a>b"), schedule, plan)


def test_a_kernel_further_down_in_the_program_need_not_come_later() -> None:
    """k2 follows k1 alone: what both k0 and k2 touch is not k0's to begin."""
    graph = graph_of(("", "a"), ("", "b"), ("b", "c"))
    ancestors = ancestors_of(with_waits(graph, (0, 1, 1), range(3)))
    assert replaces(0, 0b001, 0b001, ancestors)
    assert replaces(1, 0b010, 0b110, ancestors)
    assert not replaces(0, 0b001, 0b101, ancestors)
    assert not replaces(2, 0b101, 0b100, ancestors)


CHAIN = graph_of(("", "a"), ("a", "b"), ("b", "c"), ("c", "end"), buffers=[*sized("abc"), Buffer("end", "input", 0)])


def test_a_chain_of_elementwise_kernels_needs_one_buffer() -> None:
    graph = over(CHAIN, k1="a>b", k2="b>c")
    schedule = with_waits(graph, [0] * 4, range(4))
    assert plan_memory(graph, schedule).arena_bytes == 1024
    assert plan_memory(graph, schedule, in_place=False).arena_bytes == 2048


@pytest.mark.parametrize("streams", [(0, 0, 1, 0), (0, 1, 0, 0)], ids=str)
def test_not_while_somebody_else_may_still_read(streams: tuple[int, ...]) -> None:
    """Another kernel reads `a` on a stream of its own: writing over it would race, or make one wait."""
    graph = over(graph_of(("", "a"), ("a", "b"), ("a", "c"), ("b c", "d"), buffers=sized("abcd")), k1="a>b")
    plan = plan_memory(graph, with_waits(graph, streams, range(4)))
    assert offsets(plan)["a"] != offsets(plan)["b"]


def test_but_behind_it_on_one_stream() -> None:
    graph = over(graph_of(("", "a"), ("a", "c"), ("a", "b"), ("b c", "d"), buffers=sized("abcd")), k2="a>b")
    plan = plan_memory(graph, with_waits(graph, [0] * 4, range(4)))
    assert offsets(plan)["a"] == offsets(plan)["b"]
    assert plan.arena_bytes == 2048 + 1024


def test_an_output_is_never_written_over_but_may_lie_over_another() -> None:
    graph = over(graph_of(("", "a"), ("a", "b"), ("b", "c"), outputs=("b",), buffers=sized("abc")), k1="a>b", k2="b>c")
    plan = plan_memory(graph, with_waits(graph, [0] * 3, range(3)))
    places = offsets(plan)
    assert places["a"] == places["b"] != places["c"]


def test_what_lies_under_an_output_is_kept_as_well_and_what_lies_under_another_is_not() -> None:
    """b is returned and lies over a: nothing comes there later. d lies over c, where f may come."""
    touched = (("", "a"), ("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "f"), ("f", "end"))
    graph = graph_of(*touched, outputs=("b",), buffers=[*sized("abcdef"), Buffer("end", "input", 0)])
    graph = over(graph, k1="a>b", k3="c>d")
    plan = plan_memory(graph, schedule := with_waits(graph, [0] * 7, range(7)))
    verify_memory(graph, schedule, plan)
    assert [name for name, place in offsets(plan).items() if place == offsets(plan)["a"]] == ["a", "b"]
    assert plan.arena_bytes == 3 * 1024


@pytest.mark.parametrize("nbytes", [512, 2048])
def test_a_buffer_of_another_size_is_not_replaced(nbytes: int) -> None:
    buffers = [*sized("a"), *sized("b", nbytes), Buffer("end", "input", 0)]
    graph = over(graph_of(("", "a"), ("a", "b"), ("b", "end"), buffers=buffers), k1="a>b")
    schedule = with_waits(graph, [0] * 3, range(3))
    assert plan_memory(graph, schedule).arena_bytes == 1024 + nbytes
    for names in ("ab", "ba"):
        there = tuple(Placement(name, 0, {"a": 1024, "b": nbytes}[name]) for name in names)
        with pytest.raises(MemoryPlanError, match="live together"):
            verify_memory(graph, schedule, MemoryPlan(there, 2048, ((),) * 3))


@pytest.mark.parametrize(
    ("pairs", "sizes", "placed"),
    [
        ("a>c b>d", (2048, 1024, 1024, 1024), "b=d"),
        ("a>c b>c", (1024, 1024, 1024, 512), "a=c"),
        ("a>c a>d", (1024, 512, 1024, 1024), "a=c"),
        ("a>d b>c", (1024, 1024, 1024, 1024), "a=d b=c"),
    ],
)
def test_of_several_pairs_each_is_looked_at_and_each_buffer_used_once(
    pairs: str, sizes: tuple[int, ...], placed: str
) -> None:
    """One kernel reads a and b, whose last use that is, and writes c and d."""
    buffers = [Buffer(name, "intermediate", nbytes, planned=True) for name, nbytes in zip("abcd", sizes, strict=True)]
    graph = over(
        graph_of(("", "a b"), ("a b", "c d"), ("c d", "end"), buffers=[*buffers, Buffer("end", "input", 0)]), k1=pairs
    )
    plan = plan_memory(graph, schedule := with_waits(graph, [0] * 3, range(3)))
    verify_memory(graph, schedule, plan)
    places = offsets(plan)
    shared = {(x, y) for x in "ab" for y in "cd" if places[x] == places[y]}
    assert shared == {(pair[0], pair[2]) for pair in placed.split()}


@pytest.mark.parametrize("nbytes", [1, 2])
@pytest.mark.parametrize("exclude", ["a", "b"])
def test_what_somebody_else_allocates_takes_no_part(exclude: str, nbytes: int) -> None:
    """However small it is: a single truth value takes one byte."""
    graph = over(graph_of(("", "a"), ("a", "b"), ("b", "c"), buffers=sized("abc", nbytes)), k1="a>b", k2="b>c")
    schedule = with_waits(graph, [0] * 3, range(3))
    plan = plan_memory(graph, schedule, exclude=[exclude])
    assert offsets(plan).keys() == set("abc") - {exclude}
    verify_memory(graph, schedule, plan)


def test_the_check_knows_when_it_is_wrong() -> None:
    """Sharing is refused for a kernel that does not say so, in another place, and while somebody else reads."""
    schedule = with_waits(CHAIN, [0] * 4, range(4))
    shared = MemoryPlan((Placement("a", 0, 1024), Placement("b", 0, 1024), Placement("c", 1024, 1024)), 2048, ((),) * 4)
    verify_memory(over(CHAIN, k1="a>b"), schedule, shared)
    with pytest.raises(MemoryPlanError, match="'a' and 'b'"):
        verify_memory(CHAIN, schedule, shared)
    shifted = (Placement("a", 0, 1024), Placement("b", 512, 1024), Placement("c", 2048, 1024))
    with pytest.raises(MemoryPlanError, match="live together"):
        verify_memory(over(CHAIN, k1="a>b"), schedule, MemoryPlan(shifted, 4096, ((),) * 4))
    fork = over(graph_of(("", "a"), ("a", "b"), ("a", "c"), ("b c", "d"), buffers=sized("abcd")), k1="a>b")
    placed = tuple(Placement(name, place * 1024, 1024) for name, place in zip("abcd", (0, 0, 1, 2), strict=True))
    with pytest.raises(MemoryPlanError, match="'a' and 'b'"):
        verify_memory(fork, with_waits(fork, (0, 0, 1, 0), range(4)), MemoryPlan(placed, 4096, ((),) * 4))


@pytest.mark.parametrize("names", list(itertools.permutations("abd")), ids="".join)
def test_what_is_written_over_hides_nobody_else(names: tuple[str, ...]) -> None:
    """b may lie over a; d, which is alive with both, may not lie there too, wherever it is named."""
    graph = over(graph_of(("", "a d"), ("a", "b"), ("b d", "c"), buffers=sized("abcd")), k1="a>b")
    schedule = with_waits(graph, [0] * 3, range(3))
    there = tuple(Placement(name, 0, 1024) for name in names)
    with pytest.raises(MemoryPlanError, match="'d'"):
        verify_memory(graph, schedule, MemoryPlan((*there, Placement("c", 1024, 1024)), 2048, ((),) * 3))


def test_pairs_survive_the_way_through_json_and_are_checked() -> None:
    graph = over(CHAIN, k1="a>b")
    again = KernelGraph.from_json(graph.to_json())
    assert again == graph
    graph.verify()
    schedule = with_waits(graph, [0] * 4, range(4))
    assert plan_memory(again, schedule) == plan_memory(graph, schedule)
    with pytest.raises(Exception, match="in place"):
        over(CHAIN, k1="c>b").verify()


@given(graphs_written_in_place())
def test_whoever_touches_a_buffer_comes_before_the_kernel_that_could_write_over_it(
    found: tuple[KernelGraph, Schedule],
) -> None:
    """Then the planner writes in place under any schedule what it would on one stream, but for parts and outputs."""
    graph, _ = found
    patient = written_in_place(graph)
    assert replace(patient, edges=graph.edges) == graph
    assert patient.edges[: len(graph.edges)] == graph.edges
    profile = build_profile(graph, [1e-6] * len(graph), None, None)
    row = build(graph, profile, policy="sequential", launch_order="program", streams=1)
    wide = build(patient, profile, policy="opara", launch_order="critical_path", streams=8)
    verify(graph, wide)
    before, after = ancestors_of(row), ancestors_of(wide)
    apart = {*graph.outputs, *(b.name for b in graph.buffers if b.part_of), *(b.part_of for b in graph.buffers)}
    touched = accesses_of(graph)
    for index, kernel in enumerate(graph.kernels):
        for read, written in kernel.inplace:
            if not apart & {read, written} and replaces(index, touched[read], touched[written], before):
                assert replaces(index, touched[read], touched[written], after)


def test_who_else_reads_what_is_written_over_comes_first() -> None:
    graph = over(graph_of(("in", "a"), ("a", "b"), ("a", "c"), buffers=sized("abc")), k2="a>c")
    assert [(e.src, e.dst, e.kind) for e in written_in_place(graph).edges if e not in graph.edges] == [(1, 2, "ORDER")]


@pytest.mark.parametrize(
    "graph",
    [
        over(graph_of(("in", "a"), ("a", "b"), ("a", "c"), buffers=sized("abc")), k1="a>b"),  # not the last to read it
        over(graph_of(("in", "a"), ("a", "b"), buffers=sized("ab")), k1="a>b"),  # nobody else reads it
        over(graph_of(("in", "a"), ("a", "b"), ("a", "c"), buffers=[*sized("ab"), *sized("c", 512)]), k2="a>c"),
        over(graph_of(("in", "a"), ("a", "b"), ("a", "c"), buffers=sized("abc"), outputs=("a",)), k2="a>c"),
        over(graph_of(("in", "a"), ("a", "b"), ("a", "c"), buffers=sized("abc"), outputs=("c",)), k2="a>c"),
    ],
)
def test_nobody_waits_where_nothing_can_be_written_over(graph: KernelGraph) -> None:
    assert written_in_place(graph) is graph
