"""Writing operations into a graph that Inductor is about to lower.

Takes: a graph with the shapes of its values, and the node that new ones stand in for. Gives: nodes that have shapes
too, and the names and lines that kernels are called by. Must not change: nodes that are there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from opara_backend import upstream

VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
"""Operators whose result has the same elements in the same order, in another shape."""

_NAMES = ("stack_trace", "nn_module_stack", "original_aten", "source_fn_stack", "from_node")


class Writer:
    """Writes operations before `place`, with the shapes of their results and the names and lines of `place`, or of
    `named`."""

    def __init__(self, graph: Graph, place: Node, named: Node | None = None) -> None:
        self.graph, self.place, self.named = graph, place, named or place

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.place):
            made = self.graph.call_function(function, args, kwargs)
        made.meta.update({key: value for key, value in self.named.meta.items() if key in _NAMES})
        with upstream.V.fake_mode:
            values = torch.fx.node.map_arg(args, lambda node: node.meta["val"])
            made.meta["val"] = function(*values, **kwargs)
        return made


def arguments(node: Node) -> Any:
    """The positional arguments of `node`, of whatever type each of them is."""
    return node.args


def per_axis(axes: int, *settings: Sequence[Any]) -> list[list[Any]]:
    """Strides, paddings and the like with an entry for each axis, where one stands for all."""
    return [[*given] * axes if len(given) == 1 else [*given] for given in settings]


def moving(graph: Graph, static_inputs: Collection[int]) -> set[Any]:
    """The nodes that depend on an input other than `static_inputs`, positions of parameters and buffers."""
    found: set[Any] = set()
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            found |= {node} - ({node} if inputs in static_inputs else set())
            inputs += 1
        elif not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
