"""Schedules planned within bounds of memory, alone and with those of their heat."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.execution.affordable import MORE_ARENA, affordable
from opara_backend.execution.host import Plan
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import plan_memory
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.policies import build, in_a_row
from opara_backend.scheduling.schedule import Schedule, verify, with_waits
from opara_backend.scheduling.segments import segment_bytes
from opara_backend.scheduling.workspaces import Pools, Workspaces, allocations, allowed
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import ORDERS, POLICIES, graph_with_edges

MIB = 1 << 20


def planner(graph: KernelGraph, profile: Profile, arena: int = 0) -> tuple[list[Schedule], Callable[[Schedule], Plan]]:
    """Schedules of `graph` as they are planned, and what plans them. arena: bytes a stream, if not the plan's own."""
    seen: list[Schedule] = []

    def plan_of(schedule: Schedule) -> Plan:
        verify(graph, schedule)
        seen.append(schedule)
        memory = plan_memory(graph, schedule)
        if arena:
            memory = replace(memory, arena_bytes=arena * schedule.streams)
        return Plan(graph, profile, schedule, memory)

    return seen, plan_of


def convolutions(count: int) -> KernelGraph:
    """Kernels of a library side by side, between a kernel that they read and one that reads them."""
    graph = graph_with_edges(
        count + 2, [(0, k) for k in range(1, count + 1)] + [(k, count + 1) for k in range(1, count + 1)]
    )
    calls = {*range(1, count + 1)}
    kernels = (
        replace(k, kind="extern", call="convolution_out") if i in calls else k for i, k in enumerate(graph.kernels)
    )
    return replace(graph, kernels=tuple(kernels))


FOUR = convolutions(4)
PROFILE = Profile(tuple(kernel(5e-6, 20) for _ in FOUR.kernels), GPU)
APART = build(FOUR, PROFILE, policy="nimble", launch_order="program", streams=4)
NEEDED = Workspaces(dict.fromkeys((1, 2, 3, 4), 3 * MIB))


@pytest.mark.parametrize(("extra", "streams"), [(0, 1), (10, 2), (20, 3), (30, 4)])
def test_what_would_take_too_much_is_tried_with_libraries_on_fewer_streams(extra: int, streams: int) -> None:
    """Each stream with a convolution takes 10 MiB; other kernels stay where they are."""
    _, plan_of = planner(FOUR, PROFILE)
    (found,) = affordable(plan_of, [in_a_row(FOUR), APART], allocations(FOUR, NEEDED), 0, extra * MIB)
    used = [len({one.schedule.stream[k] for k in NEEDED.transient}) for one in found]
    assert used == ([1] if streams == 1 else [1, streams]), "on one stream there is nothing else to run beside"


def test_an_arena_that_grows_leaves_less_for_libraries() -> None:
    """Of 40 MiB more, an arena of four streams takes 30."""
    _, plan_of = planner(FOUR, PROFILE, arena=10 * MIB)
    schedules = [in_a_row(FOUR), APART]
    for extra, most in ((40, 2), (60, 4)):
        (found,) = affordable(plan_of, schedules, allocations(FOUR, NEEDED), 0, extra * MIB)
        assert [len({one.schedule.stream[k] for k in NEEDED.transient}) for one in found] == [1, most]


def test_candidates_share_what_they_take_stream_by_stream() -> None:
    """Schedules of two convolutions side by side: together they take more if these are on other streams.

    Those that do are of another heat.
    """
    row = in_a_row(FOUR)
    first = with_waits(FOUR, (0, 0, 1, 0, 1, 0), range(6))
    same = with_waits(FOUR, (0, 1, 0, 0, 1, 0), range(6))
    other = with_waits(FOUR, (0, 0, 2, 0, 2, 1), range(6))
    alike = with_waits(FOUR, (0, 2, 0, 0, 2, 1), range(6))
    _, plan_of = planner(FOUR, PROFILE)
    heats = affordable(plan_of, [row, first, other, same, alike], allocations(FOUR, NEEDED), 0, 10 * MIB)
    assert [[one.schedule for one in heat] for heat in heats] == [[row, first, same], [other, alike]]


def test_those_of_a_heat_share_the_widest_arena_among_them() -> None:
    """One stream of convolutions in 30 MiB of arena, or three in less: of 64 MiB either, but not both."""
    row, wide, three = (with_waits(FOUR, s, range(6)) for s in ((0,) * 6, (1, 0, 0, 0, 0, 1), (0, 0, 1, 2, 2, 0)))
    _, narrow = planner(FOUR, PROFILE)

    def plan_of(schedule: Schedule) -> Plan:
        plan = narrow(schedule)
        return replace(plan, memory=replace(plan.memory, arena_bytes=30 * MIB)) if schedule == wide else plan

    heats = affordable(plan_of, [row, wide, three], allocations(FOUR, NEEDED), 0, 40 * MIB)
    assert [[one.schedule for one in heat] for heat in heats] == [[row, wide], [three]]


def test_time_is_asked_after_before_each_schedule_but_the_first() -> None:
    """With how many have been found, those that cannot be tried not counted: as many as must be are looked for."""
    wide = planner(FOUR, PROFILE, arena=40 * MIB)[1]
    narrow = planner(FOUR, PROFILE)[1]
    row, other = in_a_row(FOUR), with_waits(FOUR, (0, 1, 0, 1, 0, 0), range(6))
    asked: list[tuple[int, int]] = []

    def go_on(found: int, looked: int) -> bool:
        asked.append((found, looked))
        return found < 2

    def plan_of(schedule: Schedule) -> Plan:
        return (wide if schedule == APART else narrow)(schedule)

    (found,) = affordable(plan_of, [row, APART, other, row], allocations(FOUR, Workspaces()), 0, 0, go_on)
    assert [one.schedule for one in found] == [row, other]
    assert asked == [(1, 1), (1, 2), (2, 3)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Scheduled, list[Schedule], Workspaces]:
    """A graph, schedules of it, one stream first, and what its libraries need."""
    graph, profile, schedule = draw(gpu_schedules())
    calls = draw(st.sets(st.integers(0, 30)))
    kernels = (
        replace(k, kind="extern", call="extern_kernels.mm") if i in calls else k for i, k in enumerate(graph.kernels)
    )
    graph = replace(graph, kernels=tuple(kernels))
    made = draw(st.lists(st.tuples(st.sampled_from(POLICIES), st.sampled_from(ORDERS), st.integers(2, 8)), max_size=4))
    schedules = [build(graph, profile, policy=p, launch_order=o, streams=s) for p, o, s in made]
    transient = {k: (k + 1) * MIB for k in calls if k < len(graph) and k % 3 == 0}
    needed = Workspaces(transient, draw(st.sampled_from([0, 32])) * MIB)
    return (graph, profile, schedule), [in_a_row(graph), schedule, *schedules], needed


@given(problems(), st.sampled_from([0, 100, 1000]), st.sampled_from([0, 20, 32, 100]))
def test_neither_one_nor_all_together_exceed_what_is_allowed(
    problem: tuple[Scheduled, list[Schedule], Workspaces], static: int, extra: int
) -> None:
    (graph, profile, _), schedules, needed = problem
    seen, plan_of = planner(graph, profile)
    kernels = allocations(graph, needed)
    heats = affordable(plan_of, schedules, kernels, static * MIB, extra * MIB)
    row = heats[0][0]
    assert row.schedule == schedules[0], "one stream always may"
    assert all(heats)
    most = allowed(static * MIB, row.reserved, kernels.spared, extra * MIB)
    arena = row.memory.arena_bytes
    largest = arena + max(MORE_ARENA, (static * MIB + arena) // 10, arena // 4)
    for found in heats:
        assert all(one.schedule in seen for one in found)
        together = Pools()
        for one in found:
            alone = kernels.reserved(one.schedule, one.memory.releases)
            assert one.reserved == segment_bytes(one.memory.arena_bytes) + sum(alone.values())
            together = kernels.captured(one.schedule, one.memory.releases, together, one.segments)
        widest = max(one.memory.arena_bytes for one in found)
        assert widest <= largest
        assert found == [row] or segment_bytes(widest) + together.reserved <= most
    launches = [one.schedule.launches for found in heats for one in found]
    assert len({*launches}) == len(launches), "none is tried twice"


@given(problems(), st.sampled_from([0, 20, 100]))
def test_what_may_be_tried_as_it_is_is_not_changed(
    problem: tuple[Scheduled, list[Schedule], Workspaces], extra: int
) -> None:
    (graph, profile, _), schedules, needed = problem
    _, plan_of = planner(graph, profile)
    (generous,) = affordable(plan_of, schedules, allocations(graph, needed), 0, 1 << 40)
    assert {one.schedule.launches for one in generous} == {schedule.launches for schedule in schedules}
    for one in generous[1:]:  # alone, so that what others reserve does not count
        heats = affordable(plan_of, [schedules[0], one.schedule], allocations(graph, needed), 0, extra * MIB)
        row, *found = itertools.chain(*heats)
        most = allowed(0, row.reserved, 0, extra * MIB)
        arena = row.memory.arena_bytes
        if one.memory.arena_bytes > arena + max(MORE_ARENA, arena // 4):
            assert not found
        elif one.reserved > most:
            assert all(other.schedule.launches != one.schedule.launches for other in found)
        else:
            assert [other.schedule for other in found] == [one.schedule]


def test_results_that_are_dropped_late_leave_less_for_others() -> None:
    """A kernel's own result is dropped only before a later launch on its stream that all who read it precede.

    Convolutions 0, 4, 5 and 2, 6, 7 make 8 MiB each on a stream of theirs; 1 and 3 read those of 0 and 2 on another,
    and nobody waits for them: three results a stream, where two would do.
    """
    graph = graph_with_edges(9, [(0, 1), (2, 3), *((k, 8) for k in (1, 3, 4, 5, 6, 7))])
    calls = {0, 2, 4, 5, 6, 7}
    kernels = (replace(k, kind="extern", call="convolution") if i in calls else k for i, k in enumerate(graph.kernels))
    buffers = (replace(b, planned=False, nbytes=8 * MIB) if int(b.name[1:]) in calls else b for b in graph.buffers)
    graph = replace(graph, kernels=tuple(kernels), buffers=tuple(buffers))
    profile = Profile(tuple(kernel(5e-6, 20) for _ in graph.kernels), GPU)
    apart = with_waits(graph, (0, 2, 1, 2, 0, 0, 1, 1, 2), range(9))
    _, plan_of = planner(graph, profile)
    schedules = [in_a_row(graph), apart]
    row, one = itertools.chain(*affordable(plan_of, schedules, allocations(graph, Workspaces()), 0, 16 * MIB))
    assert one.reserved == (2 * 24 + 2) * MIB, "with the arena"
    assert one.reserved - row.reserved == 16 * MIB
    ((only,),) = affordable(plan_of, schedules, allocations(graph, Workspaces()), 0, 12 * MIB)
    assert only.schedule.streams == 1


def test_a_segment_that_another_candidate_cut_may_be_too_small() -> None:
    """12 MiB on a stream, then 14: the second does not fit what the first left, and both are reserved."""
    pools = Pools()
    for nbytes in (12 * MIB, 14 * MIB):
        pools = allocations(FOUR, Workspaces({1: nbytes})).captured(in_a_row(FOUR), None, pools)
    assert pools.reserved == 26 * MIB
