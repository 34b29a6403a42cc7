"""The graph as data: what is legal, its JSON form, how it reads, and that it never changes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import Buffer, Edge, Kernel, KernelGraph, KernelGraphError, problems
from tests.strategies import graph_of, kernel_graphs

PARTS = (
    Buffer("whole", "intermediate", 64, planned=True),
    Buffer("left", "intermediate", 0, part_of="whole"),
    Buffer("right", "intermediate", 0, part_of="whole"),
    Buffer("out", "intermediate", 64),
)
LEGAL = graph_of(
    ("in", "left"), ("in", "right"), ("whole left right", "out"), ("out", "in"), outputs=["out"], buffers=PARTS
)


def test_the_example_is_legal() -> None:
    LEGAL.verify()


@given(kernel_graphs())
def test_graphs_that_the_strategies_draw_are_legal(graph: KernelGraph) -> None:
    assert list(problems(graph)) == []


def with_kernel(index: int, **changes: Any) -> KernelGraph:
    changed = replace(LEGAL.kernels[index], **changes)
    return replace(LEGAL, kernels=(*LEGAL.kernels[:index], changed, *LEGAL.kernels[index + 1 :]), edges=())


def with_buffer(name: str, **changes: Any) -> KernelGraph:
    return replace(LEGAL, buffers=tuple(replace(b, **changes) if b.name == name else b for b in LEGAL.buffers))


@pytest.mark.parametrize(
    ("illegal", "problem"),
    [
        (replace(LEGAL, buffers=(*LEGAL.buffers, Buffer("in", "input"))), "two buffers are called 'in'"),
        (with_kernel(1, name="k0"), "two kernels have the same name"),
        (with_buffer("in", kind="output"), "buffer 'in' is of kind 'output'; accepted: input, constant"),
        (with_buffer("out", nbytes=-1), "buffer 'out' has -1 bytes"),
        (with_buffer("left", part_of="nowhere"), "buffer 'left' is part of something that is no buffer"),
        (with_buffer("whole", part_of="left"), "buffer 'left' is part of itself"),
        (with_buffer("left", part_of="left"), "buffer 'left' is part of itself"),
        (with_kernel(0, kind="cuda"), "kernel 'k0' is of kind 'cuda'; accepted: triton, extern"),
        (with_kernel(0, reads=("in", "x")), "kernel 'k0' touches 'x', which is no buffer of the graph"),
        (with_kernel(0, writes=("left", "x")), "kernel 'k0' touches 'x', which is no buffer of the graph"),
        (with_kernel(0, reads=("out",)), "kernel 'k0' reads 'out' before any kernel wrote it"),
        (with_kernel(2, reads=("whole", "left")), "kernel 'k2' touches 'whole' but not its part 'right'"),
        (
            with_kernel(0, reads=("left",), writes=("whole", "right")),
            "kernel 'k0' touches 'whole' but not its part 'left'",
        ),
        (with_buffer("in", kind="constant"), "kernel 'k3' writes the constant 'in'"),
        (replace(LEGAL, edges=(Edge(2, 1, "RAW", "right"),)), "edge 2 -> 1 goes backwards in program order"),
        (replace(LEGAL, edges=(Edge(1, 1, "RAW", "right"),)), "edge 1 -> 1 goes backwards in program order"),
        (replace(LEGAL, edges=(Edge(0, 1, "RAW", "left"),)), "edge 0 -> 1 claims a RAW on 'left'"),
        (replace(LEGAL, edges=(Edge(0, 2, "WAR", "left"),)), "edge 0 -> 2 claims a WAR on 'left'"),
        (replace(LEGAL, edges=(Edge(0, 2, "WAW", "left"),)), "edge 0 -> 2 claims a WAW on 'left'"),
        (replace(LEGAL, edges=(Edge(0, 2, "RAW", "out"),)), "edge 0 -> 2 claims a RAW on 'out'"),
        (replace(graph_of(("", "a"), ("", "a")), edges=(Edge(0, 1, "why", "a"),)), "edge 0 -> 1 claims a why on 'a'"),  # type: ignore[arg-type]
        (replace(LEGAL, outputs=("out", "x")), "output 'x' is no buffer of the graph"),
        (replace(LEGAL, segments=()), r"segments \(\) must start at 0"),
        (replace(LEGAL, segments=(1,)), r"segments \(1,\) must start at 0"),
        (replace(LEGAL, segments=(0, 3, 2)), r"segments \(0, 3, 2\) must start at 0"),
        (replace(LEGAL, segments=(0, 5)), r"segments \(0, 5\) must .* stay within 4 kernels"),
    ],
)
def test_each_rule_is_enforced(illegal: KernelGraph, problem: str) -> None:
    found = list(problems(illegal))
    assert any(re.search(problem, sentence) for sentence in found), found
    with pytest.raises(KernelGraphError, match=re.escape(found[0])):
        illegal.verify()


@pytest.mark.parametrize("edge", [(0, 4), (4, 0), (-1, 0)])
def test_an_edge_must_stay_in_the_graph(edge: tuple[int, int]) -> None:
    with pytest.raises(KernelGraphError, match=rf"edge {edge[0]} -> {edge[1]} leaves the graph of 4 kernels"):
        replace(LEGAL, edges=(Edge(*edge, "RAW", "in"),))


def test_what_is_legal_though_it_looks_odd() -> None:
    """Memory read as it was allocated; a host that looks first and last; numbers as outputs; nothing at all."""
    replace(with_kernel(0, reads=("out",)), buffers=with_buffer("out", planned=True).buffers).verify()
    replace(LEGAL, segments=(0, 0, 2, 4), outputs=(None, "in")).verify()
    KernelGraph((), (), ()).verify()


def test_neighbours_come_once_each_in_order() -> None:
    graph = graph_of(("in", "a b"), ("in", "c"), ("c a b", "d"), ("a", "e"))
    assert graph.predecessors(2) == (0, 1)
    assert graph.successors(0) == (2, 3)
    assert graph.predecessors(0) == graph.successors(3) == ()
    assert len(graph) == 4


@given(kernel_graphs())
def test_json_round_trip(graph: KernelGraph) -> None:
    text = graph.to_json()
    again = KernelGraph.from_json(text)
    assert "\n" not in text
    assert again == graph
    assert again.to_json() == text
    assert [again.predecessors(k) for k in range(len(graph))] == [graph.predecessors(k) for k in range(len(graph))]


def test_json_keeps_every_field() -> None:
    kernel = Kernel("k", "cpp", "f", ("a",), ("b",), "cuda:1", "bfloat16", 7, "model.py:3 in forward", True)
    buffers = (Buffer("a", "input", "4*s0", "f32[s0]", "cuda:1"), Buffer("b", "intermediate", None, planned=True))
    graph = KernelGraph((kernel,), buffers, (), ("b", None), (0, 1), ("s0",), "cuda:1")
    assert KernelGraph.from_json(graph.to_json()) == graph


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a kernel graph"),
        ("{", "not a kernel graph"),
        ("kernel_graph(in)", "not a kernel graph"),
        ("null", "of schema 'NoneType'"),
        ("[1]", "of schema 'list'"),
        ("{}", "of schema None; this version reads 1"),
        ('{"schema":2}', "of schema 2; this version reads 1"),
        ('{"schema":1}', "missing or unknown fields: 'kernels'"),
        ('{"schema":1,"kernels":7}', "missing or unknown fields"),
        ('{"schema":1,"kernels":[7]}', "missing or unknown fields"),
    ],
)
def test_json_that_is_no_kernel_graph(text: str, message: str) -> None:
    with pytest.raises(KernelGraphError, match=message):
        KernelGraph.from_json(text)


@pytest.mark.parametrize("where", ["", "kernels", "buffers", "edges"])
def test_json_with_a_field_missing_or_too_many(where: str) -> None:
    required = {"": "segments", "kernels": "reads", "buffers": "name", "edges": "src"}[where]

    def changed(change: Callable[[dict[str, Any]], Any]) -> str:
        data = json.loads(LEGAL.to_json())
        change(data[where][0] if where else data)
        return json.dumps(data)

    with pytest.raises(KernelGraphError, match=f"missing or unknown fields.*{required}"):
        KernelGraph.from_json(changed(lambda record: record.pop(required)))
    if where:
        with pytest.raises(KernelGraphError, match=r"missing or unknown fields.*colour"):
            KernelGraph.from_json(changed(lambda record: record.update(colour="red")))


_FIELDS = st.sampled_from(["schema", "kernels", "buffers", "edges", "segments", "name", "reads"])
_JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FIELDS, inner, max_size=3),
    max_leaves=10,
)


@given(_JSON)
def test_any_json_is_a_graph_or_a_kernel_graph_error(value: Any) -> None:
    if isinstance(value, dict):
        value = {**json.loads(LEGAL.to_json()), **value, "schema": 1}
    try:
        graph = KernelGraph.from_json(json.dumps(value))
    except KernelGraphError:
        return
    assert isinstance(graph, KernelGraph)


def test_it_reads_like_a_program() -> None:
    kernels = (
        Kernel("k0", "extern", "extern_kernels.mm", ("x", "w"), ("buf0",), source="net.py:4 in forward"),
        Kernel("k1", "triton", "triton_relu", ("buf0",), ("buf1", "buf2")),
        Kernel("k2", "triton", "triton_add", ("buf1", "x"), ("x",)),
    )
    buffers = (
        Buffer("x", "input", 128, "f32[4, 8]"),
        Buffer("w", "constant", 64),
        Buffer("n", "input", 4),
        Buffer("buf0", "intermediate", 64, "f32[4, 4]"),
        Buffer("buf1", "intermediate", 64, "f32[4, 4]"),
        Buffer("buf2", "intermediate", 64),
    )
    edges = (Edge(0, 1, "RAW", "buf0"), Edge(0, 2, "WAR", "x"), Edge(1, 2, "RAW", "buf1"))
    graph = KernelGraph(kernels, buffers, edges, ("buf2", None), (0, 2, 3), device="cuda:0")
    assert str(graph).splitlines() == [
        "kernel_graph(x, n) on cuda:0:",
        "  %0 buf0: f32[4, 4] = extern_kernels.mm(x, w)  # net.py:4 in forward",
        "  %1 buf1: f32[4, 4], buf2 = triton_relu(buf0)  after %0",
        "  -- the host looks at a result --",
        "  %2 x: f32[4, 8] = triton_add(buf1, x)  after %0, %1",
        "  -- the host looks at a result --",
        "  return buf2, None",
    ]
    assert str(KernelGraph((), (), ())).splitlines() == ["kernel_graph() on cpu:", "  return nothing"]


def test_bind_fills_in_sizes_and_leaves_the_rest() -> None:
    symbolic = with_buffer("whole", nbytes="4*s0")
    bound = symbolic.bind({"whole": 400, "nobody": 1})
    assert bound.buffer("whole").nbytes == 400
    assert replace(bound, buffers=symbolic.buffers) == symbolic
    assert symbolic.buffer("whole").nbytes == "4*s0", "binding changed the graph it was asked of"
    assert bound.predecessors(2) == symbolic.predecessors(2)


def test_an_unknown_buffer_is_named() -> None:
    assert LEGAL.buffer("out").name == "out"
    with pytest.raises(KernelGraphError, match="no buffer 'x'"):
        LEGAL.buffer("x")


def test_a_graph_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LEGAL.device = "cuda"  # type: ignore[misc]
    assert hash(LEGAL) == hash(KernelGraph.from_json(LEGAL.to_json()))
