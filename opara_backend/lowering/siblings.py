"""Products, or convolutions, of one input as one, their weights laid side by side.

Takes: an inference graph before Inductor's own passes, and which of its inputs are parameters. Gives: the same graph,
in which several products of the same rows (query, key and value of an attention layer), or several convolutions of the
same image with windows of one size (the branches of an Inception block), are one, and who read a result reads a part of
that one's. Must not change: values, but for rounding.

None of them alone fills a GPU at batch 1, and side by side they keep each other out all the same: a block of cuBLAS's
takes most of an SM's shared memory. BERT's at 128 tokens are 96 blocks of 180 KB each, for 132 SMs. Weights are laid
side by side at every call, because they may change between calls; that waits for nothing and runs beside other kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from opara_backend.lowering import fused_convolutions
from opara_backend.lowering.rewriting import VIEWS, Writer, arguments, moving

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = 64
"""Rows, or pixels, from which on siblings are merged: with fewer a product only reads its weights. Chosen."""
LARGEST = 16 << 20
"""Bytes of weights that are laid side by side at most; more take longer to copy than to use. Chosen, not measured."""


@dataclass(frozen=True)
class _Sibling:
    """A product or convolution: its node, input, weights (the output's channels along `axis`) and bias."""

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    axis: int

    @property
    def channels(self) -> int:
        """How many of them it computes."""
        return int(self.weight.meta["val"].shape[self.axis])


def merge_products(graph: Graph, static_inputs: Collection[int]) -> int:
    """Merge every family of products; how many there were. static_inputs: positions of parameters and buffers."""
    return _merge_all(graph, static_inputs, axis=1)


def merge_convolutions(graph: Graph, static_inputs: Collection[int]) -> int:
    """The same of convolutions."""
    return _merge_all(graph, static_inputs, axis=0)


def _merge_all(graph: Graph, static_inputs: Collection[int], axis: int) -> int:
    if graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default):  # it counts on how results lie
        return 0
    changing = moving(graph, static_inputs)
    families: dict[Hashable, list[_Sibling]] = {}
    for key, sibling in _siblings(graph):
        if sibling.axis == axis and changing.isdisjoint({sibling.weight, sibling.bias}):
            families.setdefault(key, []).append(sibling)
    found = 0
    for family in families.values():
        if len(family) > 1 and sum(one.weight.meta["val"].nbytes for one in family) <= LARGEST:
            _merge(graph, family)
            found += 1
    return found


def _siblings(graph: Graph) -> Iterator[tuple[Hashable, _Sibling]]:
    """Every product and convolution that may be one, with what its siblings have in common."""
    aten = torch.ops.aten
    for node in graph.nodes:
        given = arguments(node)
        if node.target is aten.mm.default:
            one = _Sibling(node, given[0], given[1], None, 1)
        elif node.target is aten.addmm.default and len(given) == 3 and not node.kwargs:  # not scaled
            one = _Sibling(node, given[1], given[2], given[0], 1)
        elif node.target is aten.convolution.default and given[6] is False and given[8] == 1:
            one = _Sibling(node, given[0], given[1], given[2], 0)
        else:
            continue
        if _suits(one):
            window = one.weight.meta["val"].shape[2:]
            settings = [tuple(given[i]) for i in (3, 4, 5)] if one.axis == 0 else []
            yield (_value(one.source), one.axis, tuple(window), *settings), one


def _suits(one: _Sibling) -> bool:
    result, source, weight = (node.meta.get("val") for node in (one.node, one.source, one.weight))
    for tensor in (result, source, weight):
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.device.type not in DEVICES:
            return False
        if not all(isinstance(n, int) for n in tensor.shape):
            return False
    if one.bias is not None and list(one.bias.meta["val"].shape) != [one.channels]:
        return False
    # Whoever must have it in one piece would copy its part; and what is fused only tells how its result lies.
    if any(user.op == "output" or user.target is torch.ops.aten.convolution.default for user in one.node.users):
        return False
    if any(fused_convolutions.operator.names(user.target) for user in one.node.users):
        return False
    return one.channels > 0 and one.node.meta["val"].numel() // one.channels >= ROWS


def _value(node: Node) -> Hashable:
    """What is the same for nodes of the same value: every linear layer has a view of its own of what it reads."""
    if node.target in VIEWS and not node.kwargs:
        return _value(arguments(node)[0]), tuple(node.meta["val"].shape)
    return node


def _merge(graph: Graph, family: list[_Sibling]) -> None:
    first = family[0].node
    place = {node: index for index, node in enumerate(graph.nodes)}
    for one in family:
        for operand in (one.weight, one.bias):
            if operand is not None:
                _hoist(operand, first, place)
    do, aten = Writer(graph, first), torch.ops.aten
    weight, bias = _side_by_side(do, family), None
    if any(one.bias is not None for one in family):
        bias = do(aten.cat.default, [_bias(do, one) for one in family])
    source = family[0].source
    if family[0].axis == 0:
        merged = do(aten.convolution.default, source, weight, bias, *arguments(first)[3:])
    else:
        merged = do(aten.mm.default, source, weight) if bias is None else do(aten.addmm.default, bias, source, weight)
    ends = list(itertools.accumulate(one.channels for one in family))
    parts = [do(aten.slice.Tensor, merged, 1, end - one.channels, end) for one, end in zip(family, ends, strict=True)]
    for one, part in zip(family, parts, strict=True):
        one.node.replace_all_uses_with(part)
        graph.erase_node(one.node)


def _side_by_side(do: Writer, family: list[_Sibling]) -> Node:
    """All weights as one, which lies in memory as they do."""
    aten, axis = torch.ops.aten, family[0].axis
    weights = [one.weight for one in family]
    if axis == 1 and all(weight.meta["val"].stride(0) == 1 for weight in weights):  # of linear layers
        rows = [do(aten.permute.default, weight, [1, 0]) for weight in weights]
        return do(aten.permute.default, do(aten.cat.default, rows), [1, 0])
    return do(aten.cat.default, weights, axis)


def _bias(do: Writer, one: _Sibling) -> Node:
    if one.bias is not None:
        return one.bias
    weight = one.weight.meta["val"]
    return do(torch.ops.aten.full.default, [one.channels], 0, dtype=weight.dtype, device=weight.device)


def _hoist(node: Node, before: Node, place: dict[Node, int]) -> None:
    """Move `node`, which depends on parameters alone, and what it is computed from before the node `before`."""
    if place[node] < place[before]:
        return
    for source in node.all_input_nodes:
        _hoist(source, before, place)
    before.prepend(node)
    place[node] = place[before] - 1  # of those that were moved nobody asks for more
