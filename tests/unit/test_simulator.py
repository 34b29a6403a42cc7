"""The simulator: what holds of every timeline, and small cases whose times can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import recorded
from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.costs import FREE, CostModel
from opara_backend.scheduling.policies import BUILT_IN_ORDERS, BUILT_IN_POLICIES, build, in_a_row
from opara_backend.scheduling.schedule import Schedule, with_waits
from opara_backend.scheduling.simulator import Timeline, simulate
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import graph_of, graph_with_edges

MODELS = st.sampled_from([FREE, CostModel(), CostModel(ramp=5e-6, sync_latency=2e-6, bandwidth=0.1)])
RECORDINGS = recorded.load_all()


def at_most(first: float, second: float) -> bool:
    """first <= second, but for rounding."""
    return first <= second or math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)


def side_by_side(*kernels: KernelProfile, order: tuple[int, ...] = (), costs: CostModel = FREE) -> Timeline:
    """Independent kernels, each on a stream of its own, launched in `order`."""
    everyone = tuple(range(len(kernels)))
    graph = graph_of(*[("in", f"b{k}") for k in everyone])
    return simulate(graph, Profile(kernels, GPU), with_waits(graph, everyone, order or everyone), GPU, costs)


# --- what holds of every timeline ------------------------------------------------------------------------------------


@given(gpu_schedules(), MODELS)
def test_the_same_input_gives_the_same_timeline(found: Scheduled, costs: CostModel) -> None:
    assert simulate(*found, GPU, costs) == simulate(*found, GPU, costs)


@given(gpu_schedules(), MODELS)
def test_a_kernel_starts_after_its_stream_and_what_it_waits_for(found: Scheduled, costs: CostModel) -> None:
    schedule, timeline = found[2], simulate(*found, GPU, costs)
    last: dict[int, int] = {}
    for k in schedule.order:
        before = [*schedule.waits[k], *([last[schedule.stream[k]]] if schedule.stream[k] in last else [])]
        assert all(timeline.end[b] <= timeline.start[k] for b in before)
        last[schedule.stream[k]] = k


@given(gpu_schedules(), MODELS)
def test_no_kernel_ends_sooner_than_alone(found: Scheduled, costs: CostModel) -> None:
    timeline = simulate(*found, GPU, costs)
    for own, start, end in zip(found[1].kernels, timeline.start, timeline.end, strict=True):
        ramp = min(costs.ramp, own.duration / 2)
        assert at_most(own.duration - ramp, end - start)
        assert at_most(ramp, start)


@given(gpu_schedules(), st.sampled_from([0.0, 1e-6]), st.sampled_from([0.5e-6, 5e-6]))
def test_streams_that_cost_more_make_nothing_faster(found: Scheduled, latency: float, more: float) -> None:
    costs = CostModel(stream_latency=latency)
    dearer = replace(costs, stream_latency=latency + more)
    assert at_most(simulate(*found, GPU, costs).makespan, simulate(*found, GPU, dearer).makespan)


@given(gpu_schedules(), MODELS)
def test_one_stream_takes_the_sum_of_the_durations(found: Scheduled, costs: CostModel) -> None:
    graph, profile, _ = found
    schedule = in_a_row(graph)
    makespan = simulate(graph, profile, schedule, GPU, costs).makespan
    assert makespan == pytest.approx(sum(profile.durations()), rel=1e-9)


@given(gpu_schedules(contended=False))
def test_no_schedule_is_slower_than_one_stream_where_nothing_but_kernels_costs(found: Scheduled) -> None:
    """Of kernels that share no bandwidth: at any time all but the youngest on the GPU run as fast as alone."""
    assert at_most(simulate(*found, GPU, FREE).makespan, sum(found[1].durations()))


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_no_recorded_graph_is_slower_by_any_policy(recording: recorded.Recording) -> None:
    graph, profile = recording.graph, recording.profile
    assert profile.device is not None
    for policy in BUILT_IN_POLICIES:
        for order in BUILT_IN_ORDERS:
            schedule = build(graph, profile, policy=policy, launch_order=order, streams=8)
            makespan = simulate(graph, profile, schedule, profile.device, FREE).makespan
            assert at_most(makespan, sum(profile.durations())), schedule.policy


# --- cases -----------------------------------------------------------------------------------------------------------


def test_nothing_takes_no_time() -> None:
    empty = KernelGraph((), (), ())
    assert simulate(empty, Profile((), GPU), Schedule((), (), ()), GPU) == Timeline((), ())
    assert Timeline((), ()).makespan == 0.0


def test_kernels_that_fit_run_side_by_side() -> None:
    """132 multiprocessors hold two blocks of 1024 threads each."""
    timeline = side_by_side(kernel(2e-6, 132, threads=1024), kernel(3e-6, 132, threads=1024))
    assert timeline == Timeline((0.0, 0.0), (pytest.approx(2e-6), pytest.approx(3e-6)))


def test_kernels_that_each_fill_the_gpu_run_one_after_the_other_in_launch_order() -> None:
    full = kernel(2e-6, 264, threads=1024)
    assert side_by_side(full, full).end == pytest.approx((2e-6, 4e-6))
    assert side_by_side(full, full, order=(1, 0)).end == pytest.approx((4e-6, 2e-6))


def test_a_large_kernel_launched_first_blocks_a_small_one() -> None:
    large, small = kernel(10e-6, 264, threads=1024), kernel(1e-6, 1)
    assert side_by_side(large, small).end == pytest.approx((10e-6, 11e-6))
    assert side_by_side(large, small, order=(1, 0)).makespan < 12e-6


def test_no_kernel_overtakes_an_older_one_that_does_not_fit() -> None:
    """One block of 1 waits for the threads that 0 holds, and 2, which would fit, waits for 1."""
    kernels = [kernel(5e-6, 2, threads=1024), kernel(10e-6, 263, threads=1024), kernel(1e-6, 1, threads=32)]
    assert side_by_side(*kernels).start == (0.0, 0.0, 0.0), "they arrive together"
    assert side_by_side(*kernels).end == pytest.approx((5e-6, 15e-6, 6e-6))
    assert side_by_side(*kernels, order=(0, 2, 1)).end == pytest.approx((5e-6, 15e-6, 1e-6))


@pytest.mark.parametrize("blocks", [264, 265, 5 * 264, 100_000])
def test_a_kernel_of_many_waves_takes_its_duration_alone(blocks: int) -> None:
    alone = kernel(7e-6, blocks, threads=1024, memory_bound=True, nbytes=1 << 30)
    assert side_by_side(alone).makespan == pytest.approx(7e-6)
    assert side_by_side(alone, costs=CostModel()).makespan == pytest.approx(7e-6)


def test_the_last_wave_leaves_room() -> None:
    """A kernel of one wave and one block more, 2 us each; of the other's blocks all but one fit beside that one."""
    kernels = (kernel(4e-6, 265, threads=1024), kernel(3e-6, 264, threads=1024))
    assert side_by_side(*kernels).end == pytest.approx((4e-6, 7e-6))
    fewer = (kernels[0], kernel(3e-6, 263, threads=1024))
    assert side_by_side(*fewer).end == pytest.approx((4e-6, 5e-6))


def test_memory_is_shared_and_arithmetic_is_not() -> None:
    """Kernels that move as much as the memory can slow each other to half; one that computes runs on."""
    moving = kernel(4e-6, 132, memory_bound=True, nbytes=round(4e-6 * GPU.memory_bandwidth))
    computing = replace(moving, memory_bound=False)
    assert side_by_side(moving, moving).end == pytest.approx((8e-6, 8e-6), rel=1e-6)
    assert side_by_side(moving, computing).end == pytest.approx((4e-6, 4e-6), rel=1e-6)


def test_a_wave_asks_for_its_part_of_the_bytes() -> None:
    """Of two waves each moves half in half the time: the memory is as busy as with one wave."""
    nbytes = round(6e-6 * GPU.memory_bandwidth)
    waves = kernel(6e-6, 2 * 132, shared=120_000, memory_bound=True, nbytes=nbytes)
    beside = KernelProfile(6e-6, 0.0, memory_bound=True, nbytes=nbytes)
    assert side_by_side(beside, waves).makespan == pytest.approx(12e-6, rel=1e-6)


def test_streams_begin_one_after_the_other_and_launches_are_an_interval_apart() -> None:
    """Two streams; what each beyond the first costs comes before all, 1 begins 1 us after 0, and 2 and 3 behind 0."""
    graph = graph_with_edges(4, [(0, 2), (0, 3)])
    profile = Profile((kernel(4e-6, 1), kernel(1e-6, 1), kernel(1e-6, 1), kernel(1e-6, 1)), GPU)
    costs = replace(FREE, stream_latency=0.25e-6, branch_latency=1e-6, launch_interval=0.5e-6)
    timeline = simulate(graph, profile, Schedule((0, 1, 0, 1), (0, 1, 2, 3), ((), (), (), (0,))), GPU, costs)
    assert timeline.start == pytest.approx((0.25e-6, 1.25e-6, 4.25e-6, 4.75e-6))


JOINED_TWICE = graph_with_edges(6, [(0, 2), (1, 2), (2, 4), (3, 4), (1, 3), (0, 5)])
"""0, 2 and 4 on one stream, 1, 3 and 5 on another: 2 joins first, 4 joins again, 5 waits for 0, long ended."""


def joined_twice(costs: CostModel, between: float = 1e-6) -> tuple[float, ...]:
    """How much later than what they wait for 2, 4 and 5 start."""
    profile = Profile((*(kernel(1e-6, 1) for _ in range(3)), kernel(between, 1), kernel(1e-6, 1), kernel(1e-6, 1)), GPU)
    schedule = Schedule((0, 1, 0, 1, 0, 1), (0, 1, 2, 3, 4, 5), ((), (), (1,), (), (3,), (0,)))
    timeline = simulate(JOINED_TWICE, profile, schedule, GPU, costs)
    before = {2: (0, 1), 4: (2, 3), 5: (3, 0)}
    return tuple(timeline.start[k] - max(timeline.end[b] for b in waits) for k, waits in before.items())


def test_streams_that_join_for_the_first_time_cost_more() -> None:
    costs = replace(FREE, sync_latency=3e-6, step_memory=1.0)
    assert joined_twice(costs) == pytest.approx((3e-6, 0.0, 0.0), abs=1e-12)


def test_a_wait_that_lies_far_back_costs_as_much() -> None:
    costs = replace(FREE, sync_latency=3e-6, step_memory=5e-6)
    assert joined_twice(costs, between=4e-6) == pytest.approx((3e-6, 0.0, 0.0), abs=1e-12)
    assert joined_twice(costs, between=6e-6) == pytest.approx((3e-6, 0.0, 3e-6), abs=1e-12)


def test_no_streams_are_in_step_when_a_replay_has_just_begun() -> None:
    costs = replace(FREE, sync_latency=3e-6, step_memory=1.0, settling=4.5e-6)
    assert joined_twice(costs) == pytest.approx((3e-6, 0.0, 3e-6), abs=1e-12), "5 starts at 2 us, 4 at 5 us"


def test_a_kernel_that_waits_for_one_other_starts_at_once() -> None:
    graph = graph_with_edges(2, [(0, 1)])
    schedule = Schedule((0, 1), (0, 1), ((), (0,)))
    timeline = simulate(graph, Profile((kernel(1e-6, 1),) * 2, GPU), schedule, GPU, replace(FREE, sync_latency=3e-6))
    assert timeline.makespan == pytest.approx(2e-6)


def test_a_kernel_slows_down_with_the_part_of_the_gpu_that_others_hold() -> None:
    """Half the GPU each: at 0.4 both run at 1 / 1.2; what is left of the longer runs undisturbed."""
    half = kernel(2e-6, 132, threads=1024)
    costs = replace(FREE, interference=0.4)
    assert side_by_side(half, half, costs=costs).end == pytest.approx((2.4e-6, 2.4e-6))
    assert side_by_side(half, replace(half, duration=3e-6), costs=costs).end == pytest.approx((2.4e-6, 3.4e-6))
    assert side_by_side(half, costs=costs).makespan == pytest.approx(2e-6)


def test_of_a_kernel_shorter_than_two_ramps_half_is_ramp() -> None:
    timeline = side_by_side(kernel(1e-6, 1), costs=CostModel(ramp=5e-6))
    assert timeline == Timeline((pytest.approx(0.5e-6),), (pytest.approx(1e-6),))


def test_a_kernel_of_unknown_launch_holds_nothing() -> None:
    full = kernel(2e-6, 264, threads=1024)
    assert side_by_side(full, KernelProfile(2e-6, 0.0, memory_bound=False)).makespan == pytest.approx(2e-6)


def test_a_launch_that_fits_no_multiprocessor_is_an_error() -> None:
    launch = replace(kernel(1e-6, 1).launches[0], dynamic_shared=1 << 20)
    with pytest.raises(ValueError, match="shared memory per block"):
        side_by_side(KernelProfile(1e-6, 1.0, False, (launch,)))
