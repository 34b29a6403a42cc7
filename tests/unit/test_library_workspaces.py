"""What libraries take beside the arena, and which schedules are not tried for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.gathering import gathered, library_kernels
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.search import candidates
from opara_backend.scheduling.workspaces import (
    MORE,
    NONE,
    Workspaces,
    admission,
    is_product,
    segment_bytes,
    workspace_bytes,
)
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import WIDTHS, graph_with_edges

MIB = 1 << 20


def calling(graph: KernelGraph, call: str, kernels: set[int]) -> KernelGraph:
    """`graph`, in which some kernels are calls of a library."""
    changed = (replace(k, kind="extern", call=call) if i in kernels else k for i, k in enumerate(graph.kernels))
    return replace(graph, kernels=tuple(changed))


BRANCHES = graph_with_edges(6, [(0, k) for k in range(1, 5)] + [(k, 5) for k in range(1, 5)])
FORK = calling(BRANCHES, "extern_kernels.mm", {1, 2, 3, 4})
FORK_PROFILE = Profile(tuple(kernel(1e-6 * (3 + k), 20) for k in range(6)), GPU)
CUBLAS = Workspaces(product=32 * MIB)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("extern_kernels.mm", True),
        ("extern_kernels.bias_addmm", True),
        ("extern_kernels.convolution", False),
        ("torch.ops.aten._scaled_mm.default", True),
        ("torch.ops.aten._scaled_dot_product_cudnn_attention.default", False),
        ("torch.ops.mine.mm.default", False),
        ("convolution_out", False),
        ("triton_mm", False),
    ],
)
def test_what_calls_cublas(call: str, expected: bool) -> None:
    assert is_product(calling(BRANCHES, call, {1}).kernels[1]) == expected


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        *((0, 0), (1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 1, 20)),
        *((10 * MIB, 10), (32 * MIB, 32), (32 * MIB + 1, 34)),
    ],
)
def test_what_the_allocator_reserves_for_a_block(nbytes: int, reserved: int) -> None:
    """reserved: MiB."""
    assert segment_bytes(nbytes) == reserved * MIB


@pytest.mark.parametrize(
    ("stream", "needed", "expected"),
    [
        ((0,) * 6, CUBLAS, 32),
        ((0, 0, 1, 2, 1, 0), CUBLAS, 96),
        ((0, 1, 1, 1, 1, 0), CUBLAS, 32),  # the others are no products
        ((0,) * 6, Workspaces({1: 3 * MIB, 2: 12 * MIB}), 12),  # one after the other
        ((0, 0, 1, 0, 0, 0), Workspaces({1: 3 * MIB, 2: 12 * MIB}), 20 + 12),
        ((0, 0, 1, 1, 0, 0), Workspaces({1: 3 * MIB, 2: 12 * MIB, 3: 11 * MIB}, 32 * MIB), 20 + 12 + 2 * 32),
        ((0, 1, 2, 3, 4, 5), NONE, 0),
    ],
)
def test_each_stream_has_its_own(stream: tuple[int, ...], needed: Workspaces, expected: int) -> None:
    assert workspace_bytes(FORK, stream, needed) == expected * MIB


@pytest.mark.parametrize(("extra", "streams"), [(0, 1), (28, 1), (29, 2), (60, 2), (61, 3), (93, 4)])
def test_as_many_streams_of_products_as_there_is_memory_for(extra: int, streams: int) -> None:
    """extra: MiB, beside a tenth of what one stream takes."""
    admits = admission(FORK, CUBLAS, extra * MIB)
    for width in range(1, 6):
        schedule = build(FORK, FORK_PROFILE, policy="nimble", launch_order="program", streams=width)
        together = gathered(schedule, library_kernels(FORK))
        used = len({together.stream[k] for k in (1, 2, 3, 4)})
        assert admits(schedule) == (used <= streams)


def test_a_chain_of_products_is_admitted_whatever_streams_a_policy_spreads_it_over() -> None:
    chain = calling(graph_with_edges(4, [(0, 1), (1, 2), (2, 3)]), "extern_kernels.addmm", {0, 1, 2, 3})
    schedule = Schedule((0, 1, 0, 1), (0, 1, 2, 3), ((), (0,), (1,), (2,)))
    assert workspace_bytes(chain, schedule.stream, CUBLAS) == 64 * MIB
    assert admission(chain, CUBLAS, 0)(schedule)


@given(gpu_schedules(), WIDTHS, st.sets(st.integers(0, 30)), st.sampled_from([0, 20, 32, 100]), st.integers(1, 9))
def test_no_schedule_that_takes_more_than_it_may_is_tried(
    problem: Scheduled, streams: int, calls: set[int], extra: int, count: int
) -> None:
    graph, profile, _ = problem
    graph = calling(graph, "extern_kernels.mm", calls)
    needed = Workspaces({k: (k + 1) * MIB for k in calls if k < len(graph) and k % 3 == 0}, 32 * MIB)
    admits = admission(graph, needed, extra * MIB)
    found = candidates(graph, profile, count=count, streams=streams, admits=admits)
    least = workspace_bytes(graph, (0,) * len(graph), needed)
    for schedule in found:
        together = gathered(schedule, library_kernels(graph))
        taken = min(workspace_bytes(graph, each.stream, needed) for each in (schedule, together))
        assert taken <= least * (1 + MORE) + extra * MIB
