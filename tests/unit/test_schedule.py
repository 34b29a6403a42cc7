"""`verify` against a checker that looks at every pair, and against many ways of breaking a schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule, ScheduleError, happens_before, verify, with_waits
from tests import reference
from tests.strategies import FREE_POLICIES, graph_of, kernel_graphs, profiled_graphs, scheduled_graphs


def accepted(graph: KernelGraph, schedule: Schedule) -> bool:
    try:
        verify(graph, schedule)
    except ScheduleError:
        return False
    return True


def with_wait(schedule: Schedule, kernel: int, waits: Sequence[int]) -> Schedule:
    return replace(schedule, waits=(*schedule.waits[:kernel], tuple(waits), *schedule.waits[kernel + 1 :]))


def on_stream(schedule: Schedule, kernel: int, stream: int) -> Schedule:
    return replace(schedule, stream=(*schedule.stream[:kernel], stream, *schedule.stream[kernel + 1 :]))


def swapped(order: Sequence[int], first: int, second: int) -> tuple[int, ...]:
    other = {first: second, second: first}
    return tuple(other.get(kernel, kernel) for kernel in order)


@st.composite
def free_schedules(draw: st.DrawFn, graph: KernelGraph) -> Schedule:
    """Any streams, an order that is the program's but for a few swaps, waits at random or where they are needed."""
    count = len(graph)
    stream = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order: Sequence[int] = range(count)
    kernels = st.integers(0, max(0, count - 1))
    for first, second in draw(st.lists(st.tuples(kernels, kernels), max_size=2)):
        order = swapped(order, first, second)
    if draw(st.booleans()):
        return with_waits(graph, stream, range(count))
    waits = [
        tuple(draw(st.lists(st.sampled_from(order[:place]), max_size=3, unique=True))) if place else ()
        for place in range(count)
    ]
    by_kernel = dict(zip(order, waits, strict=True))
    return Schedule(tuple(stream), tuple(order), tuple(by_kernel[kernel] for kernel in range(count)))


@st.composite
def corrupted(draw: st.DrawFn, graph: KernelGraph, schedule: Schedule) -> Schedule:
    """`schedule` after one careless change, which may or may not matter."""
    assume(len(graph))
    kernel, other = draw(st.integers(0, len(graph) - 1)), draw(st.integers(0, len(graph) - 1))
    change = draw(st.sampled_from(["drop", "swap", "move", "event", "launch twice", "launch fewer"]))
    waits = schedule.waits[kernel]
    if change == "drop":
        assume(waits)
        return with_wait(schedule, kernel, waits[1:])
    if change == "swap":
        return replace(schedule, order=swapped(schedule.order, kernel, other))
    if change == "move":
        return on_stream(schedule, kernel, draw(st.integers(0, schedule.streams)))
    if change == "event":
        assume(waits)
        return with_wait(schedule, kernel, (other, *waits[1:]))
    if change == "launch twice":
        return replace(schedule, order=(*schedule.order, kernel))
    return replace(schedule, order=tuple(k for k in schedule.order if k != kernel))


@given(st.data())
def test_the_verdict_is_that_of_a_checker_of_all_pairs(data: st.DataObject) -> None:
    graph = data.draw(kernel_graphs())
    schedule = data.draw(free_schedules(graph))
    assert accepted(graph, schedule) == reference.is_valid(graph, schedule)


@given(st.data())
def test_so_it_is_for_corrupted_schedules(data: st.DataObject) -> None:
    graph, schedule = data.draw(scheduled_graphs(min_kernels=1))
    schedule = data.draw(corrupted(graph, schedule))
    assert accepted(graph, schedule) == reference.is_valid(graph, schedule)


@given(scheduled_graphs())
def test_happens_before_is_the_closure_of_stream_order_and_waits(found: tuple[KernelGraph, Schedule]) -> None:
    graph, schedule = found
    before, expected = happens_before(schedule), reference.happens_before(schedule)
    kernels = range(len(graph))
    assert [[before.ordered(a, b) for b in kernels] for a in kernels] == expected


@given(st.data())
def test_a_dropped_wait_is_named_with_both_kernels_and_the_buffer(data: st.DataObject) -> None:
    graph, profile = data.draw(profiled_graphs(min_kernels=6))
    schedule = build(graph, profile, policy="opara", launch_order="opara", streams=8)
    waiting = [kernel for kernel, waits in enumerate(schedule.waits) if waits]
    assume(waiting)
    kernel = data.draw(st.sampled_from(waiting))
    broken = with_wait(schedule, kernel, schedule.waits[kernel][:-1])
    with pytest.raises(ScheduleError) as raised:
        verify(graph, broken)
    named = re.search(r"kernels k(\d+) .*and k(\d+) .*both touch '(.+?)'", str(raised.value))
    assert named is not None
    first, second, buffer = named.groups()
    before = reference.happens_before(broken)
    unordered = [(a, b, name) for a, b, name in reference.conflicts(graph) if not before[a][b]]
    assert (int(first), int(second), buffer) in unordered


@given(st.data())
def test_launching_a_kernel_before_what_it_depends_on_is_rejected(data: st.DataObject) -> None:
    graph, schedule = data.draw(scheduled_graphs(min_kernels=2))
    assume(graph.edges)
    edge = data.draw(st.sampled_from(graph.edges))
    broken = replace(schedule, order=swapped(schedule.order, edge.src, edge.dst))
    with pytest.raises(ScheduleError, match=r"k\d+"):
        verify(graph, broken)


@given(st.data())
def test_a_kernel_moved_off_the_stream_that_ordered_it_is_rejected(data: st.DataObject) -> None:
    graph = data.draw(kernel_graphs(min_kernels=2))
    conflicting = sorted({kernel for first, second, _ in reference.conflicts(graph) for kernel in (first, second)})
    assume(conflicting)
    one_stream = with_waits(graph, [0] * len(graph), range(len(graph)))
    moved = data.draw(st.sampled_from(conflicting))
    with pytest.raises(ScheduleError, match=rf"\bk{moved}\b"):
        verify(graph, on_stream(one_stream, moved, 1))


@given(st.data())
def test_a_wait_for_another_event_is_rejected(data: st.DataObject) -> None:
    """For any event but those recorded behind the one that is needed."""
    graph, profile = data.draw(profiled_graphs(min_kernels=4))
    policy = data.draw(st.sampled_from(FREE_POLICIES))
    schedule = build(graph, profile, policy=policy, launch_order="opara", streams=8)
    before = reference.happens_before(schedule)
    place = {kernel: index for index, kernel in enumerate(schedule.order)}
    wrong = [
        (kernel, awaited, other)
        for kernel, waits in enumerate(schedule.waits)
        for awaited in waits
        for other in schedule.order[: place[kernel]]
        if other != awaited and not before[awaited][other]
    ]
    assume(wrong)
    kernel, awaited, other = data.draw(st.sampled_from(wrong))
    waits = [other if wait == awaited else wait for wait in schedule.waits[kernel]]
    with pytest.raises(ScheduleError, match="both touch"):
        verify(graph, with_wait(schedule, kernel, waits))


CHAIN = graph_of(("in", "a"), ("a", "b"), ("b", "c"))
VALID = Schedule((0, 1, 0), (0, 1, 2), ((), (0,), (1,)), "mine")


def test_the_hand_made_schedule_is_valid() -> None:
    verify(CHAIN, VALID)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (with_wait(VALID, 1, ()), r"k0 \(f0\) and k1 \(f1\) both touch 'a'.*'mine' does not order them"),
        (with_wait(VALID, 1, (2,)), "k1 waits for an event of k2, which is not launched before it"),
        (with_wait(VALID, 1, (1,)), "k1 waits for an event of k1, which is not launched before it"),
        (with_wait(VALID, 1, (7,)), "k1 waits for an event of kernel 7, which is not launched before it"),
        (with_wait(VALID, 1, (-1,)), "k1 waits for an event of kernel -1, which is not launched before it"),
        (with_wait(VALID, 2, (0,)), "k1 .*and k2 .*both touch 'b'"),
        (replace(VALID, order=(1, 0, 2)), "k1 waits for an event of k0"),
        (replace(VALID, order=(0, 1)), "each of the 3 kernels exactly once"),
        (replace(VALID, order=(0, 1, 1)), "each of the 3 kernels exactly once"),
        (replace(VALID, order=(0, 1, 2, 2)), "each of the 3 kernels exactly once"),
        (replace(VALID, order=(0, 1, 3)), "each of the 3 kernels exactly once"),
        (replace(VALID, stream=(0, 1)), "each of the 3 kernels exactly once"),
        (replace(VALID, waits=((), (0,))), "each of the 3 kernels exactly once"),
        (replace(VALID, stream=(0, -1, 0)), "k1 has no stream"),
    ],
)
def test_verify_says_what_is_wrong(broken: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        verify(CHAIN, broken)


def test_verify_trusts_reads_and_writes_not_edges() -> None:
    with pytest.raises(ScheduleError, match="'a'"):
        verify(replace(CHAIN, edges=()), with_wait(VALID, 1, ()))


def test_two_readers_need_no_order() -> None:
    verify(graph_of(("in", "a"), ("in", "b")), Schedule((0, 1), (1, 0), ((), ())))


@pytest.mark.parametrize("touched", [("in", "in"), ("", "in")], ids=["in place", "overwritten"])
def test_a_reader_comes_before_the_next_writer(touched: tuple[str, str]) -> None:
    graph = graph_of(("in", "a"), touched)
    with pytest.raises(ScheduleError, match=r"k0 .*k1 .*'in'"):
        verify(graph, Schedule((0, 1), (0, 1), ((), ())))
    with pytest.raises(ScheduleError, match=r"k0 .*k1 .*'in'"):
        verify(graph, Schedule((0, 0), (1, 0), ((), ())))
    verify(graph, Schedule((0, 1), (0, 1), ((), (0,))))


def test_a_wait_covers_what_the_awaited_stream_did_before() -> None:
    graph = graph_of(("in", "a"), ("in", "b"), ("a b", "c"))
    schedule = with_waits(graph, (0, 0, 1), (0, 1, 2))
    assert schedule.waits == ((), (), (1,))
    verify(graph, schedule)


def test_a_wait_covers_what_the_awaited_stream_waited_for() -> None:
    graph = graph_of(("in", "a"), ("a", "b"), ("a b", "c"))
    assert with_waits(graph, (0, 1, 2), (0, 1, 2)).waits == ((), (0,), (1,))


def test_an_earlier_wait_of_its_own_stream_is_enough() -> None:
    graph = graph_of(("in", "a"), ("a", "b"), ("a", "c"))
    assert with_waits(graph, (0, 1, 1), (0, 1, 2)).waits == ((), (0,), ())


def test_counts() -> None:
    assert (VALID.streams, VALID.wait_count) == (2, 2)
    assert (Schedule((), (), ()).streams, Schedule((), (), ()).wait_count) == (0, 0)


def test_schedules_that_launch_alike_are_told_from_others_whoever_made_them() -> None:
    assert replace(VALID, policy="another").launches == VALID.launches
    for other in (replace(VALID, stream=(0,) * len(VALID.stream)), replace(VALID, order=VALID.order[::-1])):
        assert other.launches != VALID.launches
    assert replace(VALID, waits=((),) * len(VALID.waits)).launches != VALID.launches
