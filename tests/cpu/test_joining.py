"""Which kernels are joined into one launch: small ones that wait for the same others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend import upstream
from opara_backend.lowering import joining
from opara_backend.lowering.inductor import lowering
from opara_backend.lowering.inplace import inplace_pairs
from opara_backend.lowering.under_way import LoweringRequest, parameters


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """The groups for a function's graph, each by the operators its kernels come from; Inductor is given none of them,
    as it joins nothing on a CPU."""
    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    found: list[list[str]] = []

    def groups(scheduler: Any, *given: Any) -> list[list[Any]]:
        for nodes in original(scheduler, *given):
            found.append(sorted("+".join(sorted(_operators(node))) for node in nodes))
        return []

    original = joining.groups
    monkeypatch.setattr(joining, "groups", groups)

    def run(function: Callable[..., Any], *arguments: Tensor, **options: Any) -> list[list[str]]:
        found.clear()
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch({"force_disable_caches": True, "max_fusion_size": 1}):
            compiled = torch.compile(function, backend="opara", options={"join_small": True, **options})
            torch.testing.assert_close(compiled(*arguments), function(*arguments))
        return sorted(found)

    return run


def _operators(node: Any) -> set[str]:
    origins = (origin for part in node.get_nodes() for origin in part.node.origins)
    return {str(origin.target).split(".")[1] for origin in origins if origin.op == "call_function"}


def lookups(*tables: Tensor) -> list[Tensor]:
    index = tables[-1]
    return [table[index] for table in tables[:-1]]


def test_lookups_in_many_tables_are_joined(joined: Callable[..., list[list[str]]]) -> None:
    tables = [torch.randn(9, width) for width in (3, 4, 5, 6)]
    assert joined(lookups, *tables, torch.tensor([1, 8])) == [["index"] * 4]


def test_unless_they_are_large(joined: Callable[..., list[list[str]]]) -> None:
    tables = [torch.randn(9, width) for width in (3, 4, joining.FEW)]
    assert joined(lookups, *tables, torch.tensor([1, 8])) == [["index"] * 2]


def test_only_what_waits_for_the_same_kernels(joined: Callable[..., list[list[str]]]) -> None:
    """The cosine is as deep in the graph as the others, and would make them wait for the second product."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b = x @ x, y @ y
        return a.sigmoid(), a[:2].tanh(), b.cos()

    assert joined(function, torch.randn(4, 4), torch.randn(4, 4)) == [["sigmoid", "slice+tanh"]]


def test_sums_and_unknown_sizes_are_left_alone(joined: Callable[..., list[list[str]]]) -> None:
    def sums(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x.sum(1), y.sum(1)

    assert joined(sums, torch.randn(4, 50), torch.randn(6, 70)) == []
    x, y = torch.randn(4), torch.randn(6)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(y, 0)
    assert joined(lambda x, y: (x.cos(), y.sin()), x, y) == []


class Tables(nn.Module):
    """A row of each of many tables, which `index` chooses, and, if they are `scaled`, of each table its double."""

    def __init__(self, count: int, scaled: bool) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.randn(9, 2 + width) for width in range(count))
        self.scaled = scaled

    def forward(self, index: Tensor) -> list[Tensor]:
        rows = [table[index] for table in (self.tables if not self.scaled else self.tables[:3])]
        return rows + ([table * 2 for table in self.tables] if self.scaled else [])


def test_many_that_are_made_of_parameters_alone_are_joined_in_parts(joined: Callable[..., list[list[str]]]) -> None:
    """What the input decides is one launch still."""
    index, most = torch.tensor([1, 8]), joining.MOST
    assert joined(Tables(most - 3, scaled=True), index) == [["index"] * 3 + ["mul"] * (most - 3)]
    assert joined(Tables(most, scaled=True), index) == [["index"] * 3 + ["mul"] * most]
    parts = [["index"] * 3, ["mul"] * (most - 6), ["mul"] * (most - 6), ["mul"] * (most - 5)]
    assert joined(Tables(3 * most - 17, scaled=True), index) == parts
    assert joined(Tables(2 * most, scaled=False), index) == [["index"] * 2 * most]


def test_positions_of_parameters_are_those_of_the_whole_graph() -> None:
    """A subgraph has inputs of its own, perhaps fewer, and is called with whatever there is."""
    whole = SimpleNamespace(name=None, graph_input_names=["weight", "x", "bias"], constants={"seen": None})
    branch = SimpleNamespace(name="true_graph_0", graph_input_names=["x"], constants={})
    with lowering(LoweringRequest(static_inputs=(0, 2)), ()):
        for graph, expected in ((whole, {"weight", "bias", "seen"}), (branch, set())):
            with upstream.V.set_graph_handler(graph):
                assert parameters() == expected


def test_not_unless_asked_nor_where_inductor_is(joined: Callable[..., list[list[str]]]) -> None:
    tables = (torch.randn(9, 3), torch.randn(9, 4), torch.tensor([1, 8]))
    assert joined(lookups, *tables, join_small=False) == []
    assert joined(lookups, *tables, combo_kernels=True) == []
    default = upstream.ForeachKernelSchedulerNode._default_group_nodes_for_combo_kernels
    assert upstream.ForeachKernelSchedulerNode.group_algorithm_for_combo_kernels is default


def test_kernels_in_one_launch_write_over_nothing_that_another_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks run in any order: the last in the list is not the last to read."""
    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    found: list[tuple[int, ...]] = []

    def groups(scheduler: Any, *given: Any) -> list[list[Any]]:
        for nodes in original(scheduler, *given):
            launch = object.__new__(upstream.ForeachKernelSchedulerNode)
            launch.snodes, launch.scheduler = nodes, scheduler
            apart = [inplace_pairs(node) for node in nodes]
            found.append((len(launch.get_nodes()), len(apart[-1]), len(inplace_pairs(launch))))
        return []

    original = joining.groups
    monkeypatch.setattr(joining, "groups", groups)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        shared = x @ x
        return shared.sin() @ x, shared.cos() @ x

    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch({"force_disable_caches": True, "max_fusion_size": 1}):
        torch.compile(function, backend="opara", options={"join_small": True})(torch.randn(8, 8))
    assert found == [(2, 1, 0)]
