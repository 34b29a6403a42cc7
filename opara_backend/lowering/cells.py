"""Recurrent cells at batch 1 as the arithmetic they are, which Inductor fuses, and no library call for the gates.

Takes: an inference graph before Inductor's own passes, products of vectors fused (`gemv`). Gives: the same graph, in
which the cells of LSTM and GRU that PyTorch has one CUDA kernel for are sums, sigmoids and products; with the columns
of the products that go into each gate (`columns`) a step is one kernel. Must not change: cells of several rows, and
those whose saved values somebody reads, which only training does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from opara_backend.lowering import gemv
from opara_backend.lowering.columns import ColumnWriter, erase_unread
from opara_backend.lowering.rewriting import arguments

MANY = 64
"""Cells of a graph up to which they are opened: each takes Inductor a quarter of a second to fuse."""


def open_cells(graph: Graph) -> int:
    """Write out every cell that reads the product of one row, its hidden state; how many there were."""
    aten = torch.ops.aten
    written: dict[Any, tuple[int, Callable[..., tuple[Node, ...]]]] = {
        aten._thnn_fused_lstm_cell.default: (2, _lstm),
        aten._thnn_fused_gru_cell.default: (1, _gru),
    }
    found = 0
    cells = [node for node in graph.nodes if node.target in written]
    for node in cells if len(cells) <= MANY else []:
        if arguments(node)[1].target is not gemv.operator():
            continue
        results, write = written[node.target]
        read: dict[Node, Any] = {user: user.args[1] for user in node.users if user.target is operator.getitem}
        if len(read) < len(node.users) or any(number >= results for number in read.values()):
            continue
        values = write(_Gates(graph, node), *arguments(node))
        for user, number in read.items():
            user.replace_all_uses_with(values[number])
            graph.erase_node(user)
        products = node.all_input_nodes
        graph.erase_node(node)
        for product in products:
            erase_unread(graph, product)
        found += 1
    return found


class _Gates(ColumnWriter):
    """Arithmetic on gates, which lie side by side in the columns of what a cell reads."""

    def gate(self, number: int, width: int, *sources: Node | None) -> Node:
        """Gate `number` of all `sources` together; a product that others read too is not computed again."""
        first, last = number * width, (number + 1) * width
        parts = [
            self.columns(one, first, last) if len(one.users) == 1 else self.slice(one, first, last)
            for one in sources
            if one is not None
        ]
        return self.sum(*parts)

    def sum(self, first: Node, *others: Node) -> Node:
        for other in others:
            first = self(torch.ops.aten.add.Tensor, first, other)
        return first

    def times(self, first: Node, second: Node) -> Node:
        return self(torch.ops.aten.mul.Tensor, first, second)

    def sigmoid(self, x: Node) -> Node:
        return self(torch.ops.aten.sigmoid.default, x)

    def tanh(self, x: Node) -> Node:
        return self(torch.ops.aten.tanh.default, x)


def _lstm(do: _Gates, of_input: Node, of_hidden: Node, memory: Node, *biases: Node | None) -> tuple[Node, Node]:
    """torch.nn.LSTMCell: the hidden state and the memory after a step."""
    width = memory.meta["val"].shape[-1]
    let_in, keep, new, let_out = (do.gate(number, width, of_input, of_hidden, *biases) for number in range(4))
    after = do.sum(do.times(do.sigmoid(keep), memory), do.times(do.sigmoid(let_in), do.tanh(new)))
    return do.times(do.sigmoid(let_out), do.tanh(after)), after


def _gru(do: _Gates, of_input: Node, of_hidden: Node, hidden: Node, *biases: Node | None) -> tuple[Node]:
    """torch.nn.GRUCell: the hidden state after a step."""
    width = hidden.meta["val"].shape[-1]
    of_bias, other = (*biases, None, None)[:2]
    reset, keep = (do.sigmoid(do.gate(number, width, of_input, of_hidden, of_bias, other)) for number in range(2))
    state = do.gate(2, width, of_hidden, other)
    new = do.tanh(do.sum(do.gate(2, width, of_input, of_bias), do.times(reset, state)))
    return (do.sum(new, do.times(keep, do(torch.ops.aten.sub.Tensor, hidden, new))),)
