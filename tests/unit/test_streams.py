"""Algorithm 1: the paper's example, its four cases, and what they amount to for any graph."""

from __future__ import annotations

import pytest
from hypothesis import given

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.streams import opara, sequential
from tests.strategies import graph_with_edges, kernel_graphs

# The paper's example, its operators counted from 1.
PAPER_EDGES = (
    *((1, 2), (1, 3), (1, 4), (2, 5), (3, 6), (5, 7), (4, 8), (6, 8), (7, 9), (7, 10), (8, 11), (8, 12)),
    *((9, 13), (10, 13), (11, 13), (12, 13)),
)
PAPER_STREAMS = ({1, 2, 5, 7, 9, 13}, {3, 6}, {4, 8, 11}, {10}, {12})


def test_the_example_of_the_paper() -> None:
    graph = graph_with_edges(13, [(first - 1, second - 1) for first, second in PAPER_EDGES])
    stream = opara(graph)
    together: dict[int, set[int]] = {}
    for kernel, own in enumerate(stream):
        together.setdefault(own, set()).add(kernel + 1)
    assert tuple(together.values()) == PAPER_STREAMS


@pytest.mark.parametrize(
    ("count", "edges", "stream"),
    [
        pytest.param(0, [], (), id="nothing"),
        pytest.param(2, [], (0, 1), id="every root opens a stream"),
        pytest.param(3, [(0, 1), (1, 2)], (0, 0, 0), id="a single predecessor hands its stream on"),
        pytest.param(4, [(0, 1), (0, 2), (0, 3)], (0, 0, 1, 2), id="only the first successor inherits"),
        pytest.param(3, [(0, 2), (1, 2)], (0, 1, 0), id="a join takes its first predecessor's stream"),
        pytest.param(4, [(0, 2), (0, 3), (1, 3)], (0, 1, 0, 1), id="a join takes the first that has not handed on"),
        pytest.param(
            5, [(0, 2), (1, 3), (0, 4), (1, 4)], (0, 1, 0, 1, 2), id="a join whose predecessors all handed on opens one"
        ),
    ],
)
def test_cases(count: int, edges: list[tuple[int, int]], stream: tuple[int, ...]) -> None:
    assert opara(graph_with_edges(count, edges)) == stream


@given(kernel_graphs())
def test_each_stream_is_a_chain_of_true_dependencies(graph: KernelGraph) -> None:
    """Hence independent kernels never share a stream, and every hand-over saves a wait."""
    last: dict[int, int] = {}
    for kernel, stream in enumerate(opara(graph)):
        if stream in last:
            assert last[stream] in graph.predecessors(kernel)
        last[stream] = kernel


@given(kernel_graphs())
def test_a_stream_is_opened_only_where_no_predecessor_is_left_to_inherit_from(graph: KernelGraph) -> None:
    stream = opara(graph)
    assert sorted(set(stream)) == list(range(len(set(stream)))), "streams are numbered as they are opened"
    for kernel, own in enumerate(stream):
        if own not in stream[:kernel]:
            heirs = [stream[before] in stream[before + 1 : kernel] for before in graph.predecessors(kernel)]
            assert all(heirs)


@given(kernel_graphs())
def test_sequential_is_one_stream(graph: KernelGraph) -> None:
    assert sequential(graph) == (0,) * len(graph)
