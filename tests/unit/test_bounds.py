"""Bounds that no timeline of the simulator beats, nor any schedule that was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import recorded
from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling import bounds
from opara_backend.scheduling.costs import FREE, CostModel
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.simulator import simulate
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import ORDERS, graph_with_edges

ROUNDING = 1 - 1e-9


@given(gpu_schedules(), st.sampled_from([FREE, CostModel()]))
def test_no_timeline_beats_the_bounds(found: Scheduled, costs: CostModel) -> None:
    graph, profile, _ = found
    makespan = simulate(*found, GPU, costs).makespan
    assert makespan >= bounds.critical_path(graph, profile) * ROUNDING
    assert makespan >= bounds.lower_bound(graph, profile, costs) * ROUNDING


@given(gpu_schedules(), st.integers(1, 16))
def test_list_scheduling_does_not_beat_the_critical_path(found: Scheduled, streams: int) -> None:
    graph, profile, _ = found
    schedule = build(graph, profile, policy="list_k", launch_order="critical_path", streams=streams)
    for costs in (FREE, CostModel()):
        assert (
            simulate(graph, profile, schedule, GPU, costs).makespan >= bounds.critical_path(graph, profile) * ROUNDING
        )


@given(gpu_schedules(contended=False), st.integers(1, 16), st.sampled_from(ORDERS))
def test_list_scheduling_lies_between_the_bound_and_one_stream(found: Scheduled, streams: int, order: str) -> None:
    """Where nothing but kernels costs anything and none shares the memory's bandwidth."""
    graph, profile, _ = found
    schedule = build(graph, profile, policy="list_k", launch_order=order, streams=streams)
    makespan = simulate(graph, profile, schedule, GPU, FREE).makespan
    assert bounds.lower_bound(graph, profile, FREE) * ROUNDING <= makespan * (1 + 1e-9)
    assert makespan <= sum(profile.durations()) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("recording", recorded.load_all(), ids=lambda r: r.name)
def test_no_measured_schedule_beats_the_bound(recording: recorded.Recording) -> None:
    assert recording.profile.device is not None
    bound = bounds.lower_bound(recording.graph, recording.profile)
    assert 0 < bound <= min(measured.seconds for measured in recording.measured)


def test_the_critical_path_is_the_slowest_chain() -> None:
    graph = graph_with_edges(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    profile = Profile(tuple(KernelProfile(seconds, 0.0) for seconds in (1.0, 2.0, 5.0, 3.0)))
    assert bounds.critical_path(graph, profile) == 9.0


def test_work_is_counted_in_the_scarcest_resource() -> None:
    """Blocks of 1024 threads and blocks of much shared memory run side by side: their shares do not add up."""
    threads, shared = kernel(4e-6, 264, threads=1024), kernel(3e-6, 132, threads=32, shared=200_000)
    assert bounds.work_bound(Profile((threads, shared), GPU), FREE) == pytest.approx(4e-6, rel=0.02)
    assert bounds.work_bound(Profile((threads, threads, shared), GPU), FREE) == pytest.approx(8e-6, rel=0.02)


def test_a_wave_that_is_not_full_leaves_room() -> None:
    """Half a wave holds half of the GPU; of a wave and a half in 4 us, the second lasts 2 us and leaves a half free."""
    assert bounds.work_bound(Profile((kernel(4e-6, 132, threads=1024),), GPU), FREE) == pytest.approx(2e-6)
    assert bounds.work_bound(Profile((kernel(4e-6, 396, threads=1024),), GPU), FREE) == pytest.approx(3e-6)


def test_while_it_ramps_up_a_kernel_holds_nothing() -> None:
    full = Profile((kernel(4e-6, 264, threads=1024),), GPU)
    assert bounds.work_bound(full, CostModel(ramp=1e-6)) == pytest.approx(3e-6)


def test_without_a_gpu_nothing_runs_side_by_side() -> None:
    graph = graph_with_edges(2, [])
    assert bounds.lower_bound(graph, Profile((KernelProfile(1.0, 0.1), KernelProfile(2.0, 0.1)))) == 3.0


def test_the_gap_is_a_fraction_of_the_bound() -> None:
    graph = graph_with_edges(1, [])
    profile = Profile((kernel(4e-6, 1),), GPU)
    assert bounds.gap(5e-6, graph, profile) == pytest.approx(0.25)


def test_nothing_is_bounded_by_nothing() -> None:
    empty = KernelGraph((), (), ())
    assert bounds.lower_bound(empty, Profile((), GPU)) == 0.0
    assert bounds.lower_bound(empty, Profile(())) == 0.0
    assert bounds.gap(1.0, empty, Profile((), GPU)) == 0.0
