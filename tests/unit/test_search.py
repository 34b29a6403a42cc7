"""What is worth measuring: one stream first, then what is predicted best, each once and each valid."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import recorded
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import plan_memory
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling import search
from opara_backend.scheduling.policies import build, in_a_row
from opara_backend.scheduling.schedule import Schedule, ScheduleError, happens_before, verify, with_waits
from opara_backend.scheduling.search import MENU, NOISE, candidates, kept
from opara_backend.scheduling.simulator import simulate
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import WIDTHS, graph_with_edges, layered_graph, random_profile

COUNTS = st.sampled_from([1, 2, 6, 20, 40])
FORK = graph_with_edges(9, [(0, k) for k in range(1, 8)] + [(k, 8) for k in range(1, 8)])
FORK_PROFILE = Profile(tuple(kernel(1e-6 * (3 + k), 60 + 20 * k, threads=512) for k in range(9)), GPU)


def by_hand(graph: KernelGraph, profile: Profile, streams: int) -> list[Schedule]:
    """Everything on the menu that fits the width and uses more than one stream, in the order of the menu."""
    built = [
        build(graph, profile, policy=policy, launch_order=order, streams=width or streams)
        for policy, order, width in MENU
        if width is None or width <= streams
    ]
    return [schedule for schedule in built if schedule.streams > 1]


@given(gpu_schedules(), COUNTS, WIDTHS)
def test_one_stream_comes_first_and_the_others_are_valid_and_different(
    problem: Scheduled, count: int, streams: int
) -> None:
    graph, profile, _ = problem
    found = candidates(graph, profile, count=count, streams=streams)
    assert 1 <= len(found) <= count
    assert found[0] == in_a_row(graph)
    assert len({each.launches for each in found}) == len(found)
    for schedule in found[1:]:
        verify(graph, schedule)
        assert 1 < schedule.streams <= streams
    assert candidates(graph, profile, count=count, streams=streams) == found


@given(gpu_schedules(), WIDTHS)
def test_half_are_those_of_the_menu_that_are_predicted_best(problem: Scheduled, streams: int) -> None:
    graph, profile, _ = problem

    def predicted(schedule: Schedule) -> float:
        return simulate(graph, profile, schedule, GPU).makespan

    found = [predicted(schedule) for schedule in candidates(graph, profile, count=8, streams=streams)[1:]]
    menu = {schedule.launches: predicted(schedule) for schedule in by_hand(graph, profile, streams)}
    if len(menu) > 7:
        assert found[:4] == sorted(menu.values())[:4]
    else:
        assert set(menu.values()) <= set(found), "random ones fill up"


@given(gpu_schedules(), WIDTHS)
def test_with_what_rivals_make_among_them(problem: Scheduled, streams: int) -> None:
    """So that none of them is faster, however wrong the prediction is."""
    graph, profile, _ = problem
    found = {schedule.launches for schedule in candidates(graph, profile, count=8, streams=streams)}
    for policy in ("opara", "nimble", "wavefront"):
        named = build(graph, profile, policy=policy, launch_order="opara", streams=streams)
        assert named.streams == 1 or named.launches in found


@pytest.mark.parametrize("seed", [10, 31, 57])
def test_what_is_tried_in_place_displaces_no_rival(seed: int) -> None:
    """It took the last place, which wavefront's schedule had."""
    chosen, count = Random(seed), 14
    edges = {(chosen.randrange(0, k), k) for k in range(1, count) for _ in range(2)}
    plain = graph_with_edges(count, sorted(edges))
    pairs = [tuple((read, k.writes[0]) for read in k.reads if read.startswith("b"))[:1] for k in plain.kernels]
    graph = replace(plain, kernels=tuple(replace(k, inplace=p) for k, p in zip(plain.kernels, pairs, strict=True)))
    kernels = [
        kernel(1e-6 * chosen.randint(3, 20), chosen.randint(10, 300), threads=chosen.choice([128, 512]))
        for _ in range(count)
    ]
    found = candidates(graph, Profile(tuple(kernels), GPU), count=8, streams=8)
    assert "in place" in found[-1].policy
    named = build(graph, Profile(tuple(kernels), GPU), policy="wavefront", launch_order="opara", streams=8)
    assert named.launches in {schedule.launches for schedule in found}


def test_without_a_gpu_they_come_in_the_order_of_the_menu() -> None:
    found = candidates(FORK, replace(FORK_PROFILE, device=None), count=4, streams=8)
    different = list(dict.fromkeys(each.launches for each in by_hand(FORK, FORK_PROFILE, 8)))
    assert [schedule.launches for schedule in found[1:]] == different[:3]


def test_beyond_the_menu_come_random_orders() -> None:
    found = candidates(FORK, FORK_PROFILE, count=60, streams=8)
    assert len(found) == 60
    assert sum("random" in schedule.policy for schedule in found) >= 60 - 1 - len(MENU)


def test_the_best_predicted_is_tried_with_kernels_that_write_in_place_too() -> None:
    """Kernel 7 reads last what 1 to 6 read, so it waits for them where it is to write over that."""
    graph = replace(
        FORK, kernels=(*FORK.kernels[:7], replace(FORK.kernels[7], inplace=(("b0", "b7"),)), FORK.kernels[8])
    )
    found = candidates(graph, FORK_PROFILE, count=6, streams=8)
    without = candidates(graph, FORK_PROFILE, count=6, streams=8, in_place=False)
    assert without == candidates(FORK, FORK_PROFILE, count=6, streams=8)
    assert found[:5] == without[:5]
    assert found[5].policy == f"{found[1].policy}, in place"
    assert all(happens_before(found[5]).ordered(kernel, 7) for kernel in range(1, 7))
    plans = [plan_memory(graph, schedule) for schedule in (found[1], found[5])]
    places = [{p.buffer: p.offset for p in plan.placements} for plan in plans]
    assert [place["b0"] == place["b7"] for place in places] == [False, True]
    for count in (1, 2, 3):
        assert candidates(graph, FORK_PROFILE, count=count, streams=8) == candidates(
            FORK, FORK_PROFILE, count=count, streams=8
        )


def on(streams: int) -> Schedule:
    """Eight kernels, dealt out to streams by turns."""
    return Schedule(tuple(k % streams for k in range(8)), tuple(range(8)), ((),) * 8)


@pytest.mark.parametrize(
    ("streams", "nbytes", "seconds", "index"),
    [
        ((1, 4, 8), (1, 9, 9), (3.0, 2.0, 1.0), 2),  # the fastest
        ((1, 4, 8), (1, 9, 5), (3.0, 1.0, 1.004), 2),  # as fast, in less memory
        ((1, 4, 4), (1, 5, 5), (3.0, 1.004, 1.0), 2),  # alike in all but the last thousandth
        ((1, 4, 4), (1, 9, 5), (3.0, 1.0, 1.006), 1),  # not as fast
        ((1, 4), (5, 1), (1.0, 1.0), 1),  # one stream needs more, rarely
        ((2, 1), (1, 1), (1.0, 1.0), 1),  # alike, on fewer streams
    ],
)
def test_of_those_as_fast_as_the_fastest_the_one_that_needs_least_is_kept(
    streams: tuple[int, ...], nbytes: tuple[int, ...], seconds: tuple[float, ...], index: int
) -> None:
    assert kept([on(count) for count in streams], nbytes, seconds) == index


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 9), st.floats(1e-6, 1e-2)), min_size=1))
def test_what_is_kept_is_as_fast_as_anything(measured: list[tuple[int, int, float]]) -> None:
    streams, arenas, seconds = zip(*measured, strict=True)
    index = kept([on(count) for count in streams], arenas, seconds)
    assert seconds[index] <= NOISE * min(seconds)


@pytest.mark.parametrize("streams", [1, 8])
def test_a_chain_has_one_candidate(streams: int) -> None:
    chain = graph_with_edges(3, [(0, 1), (1, 2)])
    profile = Profile(FORK_PROFILE.kernels[:3], GPU)
    assert len(candidates(chain, profile, count=6, streams=streams)) == 1


@pytest.mark.parametrize("recording", recorded.load_all(), ids=lambda r: r.name)
def test_of_six_that_were_measured_the_best_is_nearly_the_best_of_all(recording: recorded.Recording) -> None:
    """Of six that are picked now the recordings know three at least: they are older than `just_in_time`."""
    measured = {item.schedule.launches: item.seconds for item in recording.measured}
    tried = [schedule.launches for schedule in candidates(recording.graph, recording.profile, count=6, streams=8)]
    found = [measured[schedule] for schedule in tried if schedule in measured]
    assert len(found) >= 3
    assert min(found) <= 1.06 * min(measured.values())


@given(gpu_schedules(), st.sampled_from([1, 2, 3, 6]), WIDTHS, st.integers(0, 1000))
def test_what_won_for_other_sizes_comes_second(problem: Scheduled, count: int, streams: int, seed: int) -> None:
    graph, profile, _ = problem
    known = candidates(graph, profile, count=40, streams=streams)
    near = known[seed % len(known)]
    found = candidates(graph, profile, count=count, streams=streams, near=near)
    assert found[0] == known[0]
    assert len(found) <= count
    assert len({each.launches for each in found}) == len(found)
    if near.streams > 1 and count > 1:
        assert found[1] == near
        assert len(found) <= max(2, count // 2 + 1) + 1
    else:
        assert found == candidates(graph, profile, count=count, streams=streams)


def test_what_won_elsewhere_is_verified() -> None:
    broken = replace(build(FORK, FORK_PROFILE, policy="opara", launch_order="opara", streams=4), waits=((),) * 9)
    with pytest.raises(ScheduleError):
        candidates(FORK, FORK_PROFILE, count=6, streams=8, near=broken)


@given(gpu_schedules(), WIDTHS, st.integers(2, 9), st.integers(0, 9))
def test_what_won_for_other_sizes_is_made_to_fit_or_left(
    problem: Scheduled, streams: int, count: int, seed: int
) -> None:
    """`fit` puts all on two streams, or refuses."""
    graph, profile, _ = problem
    known = [in_a_row(graph), *by_hand(graph, profile, 8)]
    near = known[seed % len(known)]

    def folded(schedule: Schedule) -> Schedule | None:
        return with_waits(graph, [s % 2 for s in schedule.stream], schedule.order)

    found = candidates(graph, profile, count=count, streams=streams, near=near, fit=folded, in_place=False)
    assert all(schedule.streams <= 2 for schedule in found)
    expected = folded(near)
    if 1 < near.streams <= streams and expected is not None and expected.streams > 1:
        assert found[1].launches == expected.launches
    assert candidates(graph, profile, count=count, streams=streams, near=near, fit=lambda _: None) == found[:1]


@pytest.mark.parametrize(("kernels", "made"), [(40, 22), (700, 15), (5000, 4), (20_000, 3)])
def test_of_large_graphs_fewer_schedules_are_made_but_what_rivals_make_is(
    monkeypatch: pytest.MonkeyPatch, kernels: int, made: int
) -> None:
    """As many of the menu as `PATIENCE` is for, and no random ones where that are not all."""
    dishes: list[tuple[str, str, int | None]] = []

    def built(graph: KernelGraph, profile: Profile, dish: Any, streams: int) -> Schedule | None:
        dishes.append(dish)
        return None

    monkeypatch.setattr(search, "_built", built)
    graph = layered_graph(kernels, 20)
    candidates(graph, random_profile(kernels), count=8, streams=8, in_place=False)
    assert len(dishes) == made
    assert set(search.RIVALS) <= set(dishes)
