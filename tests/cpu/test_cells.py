"""Recurrent cells written out, and products cut into parts: the graphs compute what they did, in fewer kernels."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from opara_backend import upstream
from opara_backend.lowering import cells, gemv
from opara_backend.lowering.cells import open_cells
from opara_backend.lowering.columns import split_products
from opara_backend.report.record import GraphRecord, collect

aten = torch.ops.aten
WIDTH = 6
Cell = nn.LSTMCell | nn.GRUCell
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "DEVICES", ("cpu",))


def count(graph: Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


class Step:
    """One step of a cell, as a graph has it that is traced for a GPU: only there the gates are one operator."""

    def __init__(self, cell: Cell, rows: int = 1) -> None:
        self.graph, self.mode, self.cell = Graph(), FakeTensorMode(), cell
        lstm = isinstance(cell, nn.LSTMCell)
        self.x, self.states = torch.randn(rows, 4), tuple(torch.randn(rows, WIDTH) for _ in range(1 + lstm))
        biases = [cell.bias_ih, cell.bias_hh] if cell.bias else []
        self.given = (self.x, *self.states, cell.weight_ih, cell.weight_hh, *biases)
        x, *states = (self._input(tensor) for tensor in self.given[: 2 + lstm])
        w_ih, w_hh, *bias = (self._input(tensor) for tensor in self.given[2 + lstm :])
        self.products = [self._product(x, w_ih), self._product(states[0], w_hh)]
        target = (aten._thnn_fused_lstm_cell if lstm else aten._thnn_fused_gru_cell).default
        self.made = self.graph.call_function(target, (*self.products, states[-1], *bias))

    def _input(self, tensor: Tensor) -> Node:
        node = self.graph.placeholder(f"given_{len(self.graph.nodes)}")
        node.meta["val"] = self.mode.from_tensor(tensor)
        return node

    def _call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda one: one.meta["val"]))
        return node

    def _product(self, x: Node, weight: Node) -> Node:
        return self._call(aten.mm.default, x, self._call(aten.permute.default, weight, [1, 0]))

    def opened(self, *read: int, beside: tuple[Node, ...] = ()) -> int:
        """Return these results of the cell, and nodes beside them, and see how many cells are written out."""
        results = [self.graph.call_function(operator.getitem, (self.made, number)) for number in read]
        self.graph.output((*results, *beside))
        with upstream.V.set_fake_mode(self.mode):
            gemv.fuse_gemv(self.graph)
            return open_cells(self.graph)

    def run(self) -> Any:
        self.graph.lint()
        with torch.no_grad():
            return GraphModule(nn.Module(), self.graph)(*self.given)

    def expected(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = self.cell(self.x, self.states if len(self.states) > 1 else self.states[0])
        return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("bias", [True, False], ids=["with biases", "without"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_step_computes_what_the_cell_does(kind: str, bias: bool) -> None:
    step = Step(CELLS[kind](4, WIDTH, bias))
    expected = step.expected()
    assert step.opened(*range(len(expected))) == 1
    for result, wanted in zip(step.run(), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_of_many_cells_none_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusing what they are opened to takes Inductor long."""
    monkeypatch.setattr(cells, "MANY", 0)
    step = Step(nn.LSTMCell(4, WIDTH))
    assert step.opened(0) == 0
    assert count(step.graph, aten._thnn_fused_lstm_cell.default) == 1
    assert count(step.graph, gemv.operator()) == 2, "its products are reductions all the same"


def test_gates_are_summed_apart_and_nothing_twice() -> None:
    step = Step(nn.LSTMCell(4, WIDTH))
    step.opened(0)
    assert count(step.graph, gemv.operator()) == 8, "four gates, of the input and of the hidden state"
    shapes = {
        tuple(node.meta["val"].shape) for node in step.graph.find_nodes(op="call_function", target=gemv.operator())
    }
    assert shapes == {(1, WIDTH)}


def test_a_product_that_others_read_is_computed_once() -> None:
    step = Step(nn.LSTMCell(4, WIDTH))
    assert step.opened(0, beside=(step.products[1],)) == 1
    assert count(step.graph, gemv.operator()) == 4 + 1
    result, product = step.run()
    torch.testing.assert_close(result, step.expected()[0])
    torch.testing.assert_close(product, step.states[0] @ step.cell.weight_hh.T)


@pytest.mark.parametrize(("kind", "saved"), [("lstm", 2), ("gru", 1)])
def test_cells_whose_saved_values_are_read_stay(kind: str, saved: int) -> None:
    assert Step(CELLS[kind](4, WIDTH)).opened(0, saved) == 0


def test_cells_of_several_rows_stay() -> None:
    assert Step(nn.LSTMCell(4, WIDTH), rows=2).opened(0) == 0


# --- products in parts ------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Gate and up are one matrix; `cut` takes them apart."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.both, self.down, self.cut = nn.Linear(8, 24), nn.Linear(12, 8), cut

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        if self.cut == "unevenly":
            gate, up = y.split([8, 16], -1)
            return gate.sigmoid() * up[..., :8]
        if self.cut == "rows":
            gate, up = y.view(*x.shape[:-1], 12, 2).chunk(2, -2)
            return (gate * up).flatten(-2)
        gate, up = (y[..., :12], y[..., 12:]) if self.cut == "by slices" else y.chunk(2, -1)
        if self.cut == "overlapping":
            up = y[..., 6:18]
        return y.sum() + gate * up if self.cut == "beside the whole" else self.down(gate.sigmoid() * up)


def compiled(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, GraphRecord, list[int]]:
    split: list[int] = []

    def counting(graph: Graph) -> int:
        split.append(split_products(graph))
        return split[-1]

    monkeypatch.setattr("opara_backend.lowering.passes.split_products", counting)
    with torch.no_grad(), collect() as records, torch._inductor.config.patch(force_disable_caches=True):
        result = torch.compile(model, backend="opara", options={"fuse_gemv": True})(x)
    return result, records[0], split


@pytest.mark.parametrize("shape", [(1, 8), (1, 1, 8), (8,)], ids=str)
@pytest.mark.parametrize("cut", ["evenly", "by slices"])
def test_parts_of_a_product_are_products(cut: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Gated(cut), torch.randn(shape)
    result, record, split = compiled(model, x, monkeypatch)
    torch.testing.assert_close(result, model(x))
    assert split == [1]
    made = [buffer.layout for buffer in record.graph.buffers if buffer.kind == "intermediate"]
    assert "f32[1, 24]" not in made, "nobody keeps the whole"


@pytest.mark.parametrize("cut", ["unevenly", "rows", "beside the whole", "overlapping"])
def test_other_products_stay_whole(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Gated(cut), torch.randn(1, 8)
    result, _, split = compiled(model, x, monkeypatch)
    torch.testing.assert_close(result, model(x))
    assert split == [0]


def test_a_bias_that_all_columns_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(40, 24))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = torch.addmm(self.bias, x, self.weight.mT).chunk(2, 1)
            return gate * up

    model, x = Shared(), torch.randn(1, 24)
    result, _, split = compiled(model, x, monkeypatch)
    torch.testing.assert_close(result, model(x))
    assert split == [1]
