"""Reads and writes -> edges: each case by example, and for any program every conflicting pair is ordered."""

from __future__ import annotations

import pytest
from hypothesis import given

from opara_backend.kernel_graph import KernelGraph
from opara_backend.lowering.dependencies import edges
from tests import reference
from tests.strategies import kernel, kernel_graphs


@pytest.mark.parametrize(
    ("touched", "expected"),
    [
        pytest.param([("in", "a"), ("a", "b")], ["0 -> 1 RAW a"], id="read after write"),
        pytest.param([("in", "a"), ("", "in")], ["0 -> 1 WAR in"], id="write after read"),
        pytest.param([("", "a"), ("", "a")], ["0 -> 1 WAW a"], id="write after write"),
        pytest.param([("in", "a"), ("in", "b")], [], id="two readers"),
        pytest.param([("in", "a"), ("other", "b")], [], id="nothing shared"),
        pytest.param(
            [("", "a"), ("a", "b"), ("a", "c"), ("", "a")],
            ["0 -> 1 RAW a", "0 -> 2 RAW a", "1 -> 3 WAR a", "2 -> 3 WAR a"],
            id="readers stand between two writers",
        ),
        pytest.param([("", "a"), ("a", "a"), ("a", "b")], ["0 -> 1 RAW a", "1 -> 2 RAW a"], id="in place"),
        pytest.param(
            [("", "a"), ("a", "b"), ("a", "a")],
            ["0 -> 1 RAW a", "0 -> 2 RAW a", "1 -> 2 WAR a"],
            id="read, then in place",
        ),
        pytest.param([("in", "in"), ("in", "in")], ["0 -> 1 RAW in"], id="an input changed twice"),
        pytest.param([("rng", "a rng"), ("rng", "b rng")], ["0 -> 1 RAW rng"], id="random numbers keep their order"),
        pytest.param([("a a", "b"), ("", "a a")], ["0 -> 1 WAR a"], id="a name mentioned twice counts once"),
        pytest.param([("", "a b"), ("a b", "c")], ["0 -> 1 RAW a", "0 -> 1 RAW b"], id="once per buffer"),
        pytest.param(
            [("", "a"), ("", "a"), ("a", "b")], ["0 -> 1 WAW a", "1 -> 2 RAW a"], id="the last writer is read"
        ),
    ],
)
def test_cases(touched: list[tuple[str, str]], expected: list[str]) -> None:
    kernels = [kernel(index, reads.split(), writes.split()) for index, (reads, writes) in enumerate(touched)]
    assert [f"{e.src} -> {e.dst} {e.kind} {e.buffer}" for e in edges(kernels)] == expected


@given(kernel_graphs())
def test_edges_order_every_conflicting_pair_and_no_other(graph: KernelGraph) -> None:
    reach = reference.closure(len(graph), [(e.src, e.dst) for e in edges(graph.kernels)])
    conflicting = {(first, second) for first, second, _ in reference.conflicts(graph)}
    assert all(reach[first][second] for first, second in conflicting)
    assert reach == reference.closure(len(graph), conflicting)


@given(kernel_graphs())
def test_each_edge_is_a_conflict_of_the_kind_it_claims(graph: KernelGraph) -> None:
    found = edges(graph.kernels)
    assert len(set(found)) == len(found)
    for edge in found:
        first, second = graph.kernels[edge.src], graph.kernels[edge.dst]
        assert edge.src < edge.dst
        assert edge.buffer in (first.reads if edge.kind == "WAR" else first.writes)
        assert edge.buffer in (second.reads if edge.kind == "RAW" else second.writes)
