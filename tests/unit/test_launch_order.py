"""Algorithm 2: least demand first, memory- and compute-bound kernels by turns, always topological."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import preset
from opara_backend.profiling.profile import Profile, build_profile
from opara_backend.scheduling.launch_order import LAUNCH_ORDERS, opara, program
from tests.strategies import graph_of, graph_with_edges, profile_of, profiled_graphs

M, C = "memory", "compute"


@pytest.mark.parametrize(
    ("kernels", "edges", "order"),
    [
        pytest.param([], [], (), id="nothing"),
        pytest.param([(M, 0.5), (M, 0.1), (M, 0.3)], [], (1, 2, 0), id="least demand first"),
        pytest.param([(C, 0.5), (C, 0.1), (C, 0.3)], [], (1, 2, 0), id="least demand first, compute-bound"),
        pytest.param([(M, 0.5), (M, 0.5), (M, 0.1), (M, 0.5)], [], (2, 0, 1, 3), id="ties in program order"),
        pytest.param([(M, 0.5), (M, 0.1), (C, 0.9), (C, 0.2)], [], (1, 3, 0, 2), id="by turns, memory-bound first"),
        pytest.param([(M, 0.9), (C, 0.1)], [], (0, 1), id="whose turn it is counts more than demand"),
        pytest.param([(M, 0.9), (M, 0.1)], [(0, 1)], (0, 1), id="dependencies count more than demand"),
        pytest.param(
            [(M, 0.1), (C, 0.5), (C, 0.4), (M, 0.2), (M, 0.3)],
            [(0, 1), (0, 2)],
            (0, 2, 3, 1, 4),
            id="what becomes ready joins the list of its kind",
        ),
        pytest.param(
            [(M, 0.1), (M, 0.2), (C, 0.5), (M, 0.9)],
            [(1, 2)],
            (0, 1, 2, 3),
            id="an empty list's turn is kept for it",
        ),
        pytest.param(
            [(C, 0.1), (M, 0.9), (C, 0.2), (M, 0.1)], [(1, 3)], (1, 0, 3, 2), id="a freed kernel may overtake"
        ),
    ],
)
def test_by_hand(kernels: list[tuple[str, float]], edges: list[tuple[int, int]], order: tuple[int, ...]) -> None:
    assert opara(graph_with_edges(len(kernels), edges), profile_of(*kernels)) == order


@given(profiled_graphs(), st.sampled_from(sorted(LAUNCH_ORDERS)))
def test_every_order_is_topological(problem: tuple[KernelGraph, Profile], name: str) -> None:
    graph, profile = problem
    order = LAUNCH_ORDERS[name](graph, profile)
    assert sorted(order) == list(range(len(graph)))
    assert all(order.index(edge.src) < order.index(edge.dst) for edge in graph.edges)


@given(profiled_graphs())
def test_every_step_of_algorithm_2_is_the_one_described(problem: tuple[KernelGraph, Profile]) -> None:
    graph, profile = problem
    launched: list[int] = []
    for kernel in opara(graph, profile):
        ready = [
            k
            for k in range(len(graph))
            if k not in launched and all(before in launched for before in graph.predecessors(k))
        ]
        kinds = {profile.kernels[k].memory_bound for k in ready}
        own = profile.kernels[kernel].memory_bound
        if len(kinds) == 2:
            assert own == (not launched or not profile.kernels[launched[-1]].memory_bound)
        assert kernel == min(
            (k for k in ready if profile.kernels[k].memory_bound == own), key=lambda k: (profile.kernels[k].demand, k)
        )
        launched.append(kernel)


@given(profiled_graphs())
def test_order_is_deterministic(problem: tuple[KernelGraph, Profile]) -> None:
    graph, profile = problem
    assert opara(KernelGraph.from_json(graph.to_json()), profile) == opara(graph, profile)


def test_program_order_is_that_of_the_kernels() -> None:
    assert program(graph_with_edges(3, [(0, 2)]), profile_of((M, 3.0), (C, 2.0), (M, 1.0))) == (0, 1, 2)


@pytest.mark.parametrize("device", [None, "H200"])
def test_kernels_whose_launches_are_unknown_go_by_duration(device: str | None) -> None:
    """As without cuda-bindings: the shortest first, on a GPU that is known as on one that is not."""
    graph = graph_of(("", "a"), ("", "b"), ("", "c"))
    profile = build_profile(graph, [3e-6, 1e-6, 2e-6], None, None if device is None else preset(device))
    assert opara(graph, profile) == (1, 2, 0)
