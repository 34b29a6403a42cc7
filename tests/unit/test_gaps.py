"""What a replay takes beyond its critical path, by cause."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.costs import FREE
from opara_backend.scheduling.gaps import gap_of
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.simulator import simulate, simulate_with_room
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import graph_with_edges

FORK = graph_with_edges(6, [(0, k) for k in range(1, 5)] + [(k, 5) for k in range(1, 5)])
TEN = 10e-6


def four_branches(blocks: int) -> Profile:
    """Kernels of 10 us each; a block fills an SM."""
    return Profile(tuple(kernel(TEN, blocks, threads=1024) for _ in range(6)), GPU)


@given(gpu_schedules(), st.floats(0.0, 1.0))
def test_the_parts_add_up_and_none_is_gained_by_waiting(found: Scheduled, seconds: float) -> None:
    gap = gap_of(*found, seconds)
    assert math.isclose(gap.critical_path + gap.streams + gap.launch + gap.contention, seconds, abs_tol=1e-12)
    assert gap.streams >= 0
    assert gap.launch >= 0


@given(gpu_schedules(contended=False))
def test_room_is_the_only_difference_to_the_simulator(found: Scheduled) -> None:
    alone = simulate_with_room(*found, FREE).makespan
    assert alone <= simulate(*found, GPU, FREE).makespan * (1 + 1e-9)


def of(graph: KernelGraph, profile: Profile, streams: int) -> tuple[float, float]:
    """Streams' part and contention of what the simulator predicts when nothing costs but kernels, in kernels."""
    schedule = build(graph, profile, policy="list_k", launch_order="critical_path", streams=streams)
    gap = gap_of(graph, profile, schedule, simulate(graph, profile, schedule, GPU, FREE).makespan, FREE)
    assert gap.critical_path == pytest.approx(3 * TEN)
    assert gap.launch == pytest.approx(0.0)
    return gap.streams / TEN, gap.contention / TEN


def test_too_few_streams_and_too_little_room_are_told_apart() -> None:
    small, large = four_branches(1), four_branches(2 * GPU.sms)
    assert of(FORK, small, 1) == pytest.approx((3.0, 0.0))
    assert of(FORK, small, 2) == pytest.approx((1.0, 0.0))
    assert of(FORK, small, 4) == pytest.approx((0.0, 0.0))
    streams, contention = of(FORK, large, 4)
    assert streams == pytest.approx(0.0)
    assert contention == pytest.approx(3.0, rel=0.1)
