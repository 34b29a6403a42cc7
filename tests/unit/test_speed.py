"""Nothing here grows faster than the graph: limits with much room, on graphs far larger than any model's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import plan_memory, verify_memory
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling import launch_order, streams
from opara_backend.scheduling.gathering import gathered
from opara_backend.scheduling.schedule import verify, with_waits
from opara_backend.scheduling.workspaces import Workspaces, allocations, squeezing
from tests.strategies import layered_graph, random_profile

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, which must not take longer than `seconds` of processor time.

    At best of three: processes beside this one take caches and half of a core away, and the time counts all the same.
    """
    taken = []
    for _ in range(3):
        start = time.process_time()
        result = work()
        taken.append(time.process_time() - start)
        if taken[-1] < seconds:
            return result
    raise AssertionError(f"took {', '.join(f'{t:.2f}' for t in taken)} s, {seconds} s allowed")


@pytest.fixture(scope="module")
def huge() -> tuple[KernelGraph, Profile]:
    return layered_graph(100_000, 50), random_profile(100_000)


def test_algorithm_1_on_100000_kernels(huge: tuple[KernelGraph, Profile]) -> None:
    within(2, lambda: streams.opara(huge[0]))


def test_algorithm_2_on_100000_kernels(huge: tuple[KernelGraph, Profile]) -> None:
    within(2, lambda: launch_order.opara(*huge))


def test_bound_width_on_100000_kernels(huge: tuple[KernelGraph, Profile]) -> None:
    graph, profile = huge
    stream, order = streams.opara(graph), launch_order.opara(*huge)
    within(2, lambda: streams.bound_width(graph, stream, order, profile.durations(), 8))


def test_waits_and_their_check_on_20000_kernels() -> None:
    graph, profile = layered_graph(20_000, 40), random_profile(20_000)
    order = launch_order.opara(graph, profile)
    stream = streams.bound_width(graph, streams.opara(graph), order, profile.durations(), 8)
    schedule = within(2, lambda: with_waits(graph, stream, order))
    within(2, lambda: verify(graph, schedule))
    gathered_again = within(2, lambda: gathered(schedule, dict.fromkeys(range(0, 20_000, 2), 0)))
    within(2, lambda: verify(graph, gathered_again))


def test_what_5000_kernels_allocate_and_how_to_have_them_allocate_less() -> None:
    """Every other kernel is a library's, of 3 MiB while it runs and 1 MiB that it leaves."""
    graph, profile = layered_graph(5000, 40), random_profile(5000)
    calls = range(0, 5000, 2)
    kernels = (replace(k, kind="extern", call="convolution") if i in calls else k for i, k in enumerate(graph.kernels))
    buffers = (replace(b, planned=False, nbytes=1 << 20) if int(b.name[1:]) in calls else b for b in graph.buffers)
    graph = replace(graph, kernels=tuple(kernels), buffers=tuple(buffers))
    needed = Workspaces(dict.fromkeys(calls, 3 << 20))
    order = launch_order.opara(graph, profile)
    stream = streams.bound_width(graph, streams.opara(graph), order, profile.durations(), 8)
    schedule = with_waits(graph, stream, order)
    within(2, lambda: allocations(graph, needed).reserved(schedule))
    assert within(4, lambda: squeezing(allocations(graph, needed))(schedule, 0)) is None  # after a look at all there is
    found = squeezing(allocations(graph, needed))(schedule, 1 << 40)
    assert found is not None
    verify(graph, found)


@pytest.mark.parametrize("width", [4, 40, 400])
def test_memory_of_1500_buffers_on_8_streams(width: int) -> None:
    graph, profile = layered_graph(1500, width), random_profile(1500)
    order = launch_order.opara(graph, profile)
    stream = streams.bound_width(graph, streams.opara(graph), order, profile.durations(), 8)
    schedule = with_waits(graph, stream, order)
    plan = within(1, lambda: plan_memory(graph, schedule))
    within(1, lambda: verify_memory(graph, schedule, plan))
    assert plan.arena_bytes < plan.requested_bytes / 2
