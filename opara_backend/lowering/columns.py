"""Columns of a product of a vector that are used apart are summed apart, where they are used.

Takes: an inference graph before Inductor's own passes, products of vectors fused (`gemv`). Gives: the same graph, in
which a product that is only cut into equal parts (gate and up of one matrix, say) is a product each, so that what is
done to the parts fuses with their sums. Must not change: products that are used whole, or cut unevenly, whose parts
would become kernels of their own.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from opara_backend.lowering import gemv
from opara_backend.lowering.rewriting import VIEWS, Writer, arguments

_SPLITS = (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)


class ColumnWriter(Writer):
    """Writes operations on columns."""

    def slice(self, source: Node, first: int, last: int) -> Node:
        return self(torch.ops.aten.slice.Tensor, source, -1, first, last)

    def columns(self, source: Node, first: int, last: int) -> Node:
        """`source[..., first:last]`; of a product, the sums of these alone."""
        shape = source.meta["val"].shape
        if len(shape) == 0 or shape[-1] == 1:  # a bias that all columns share
            return source
        if source.target is not gemv.operator():
            return self.slice(source, first, last)
        vector, matrix, *bias = arguments(source)
        return self(gemv.operator(), vector, *(self.columns(operand, first, last) for operand in (matrix, *bias)))


def split_products(graph: Graph) -> int:
    """Replace every product that is only cut into equal parts by as many products; how many there were."""
    found = 0
    for product in graph.find_nodes(op="call_function", target=gemv.operator()):
        parts = _equal_parts(product)
        for part, (first, last) in parts.items():
            do = ColumnWriter(graph, part)
            made, shape = do.columns(product, first, last), list(part.meta["val"].shape)
            same = shape == list(made.meta["val"].shape)
            part.replace_all_uses_with(made if same else do(torch.ops.aten.reshape.default, made, shape))
        for part in parts:
            erase_unread(graph, part)
        found += bool(parts)
    return found


def erase_unread(graph: Graph, node: Node) -> None:
    """Erase `node`, if nobody reads it, and what only it read, as far as that is a product or a part of one."""
    parts = (operator.getitem, torch.ops.aten.slice.Tensor, *_SPLITS, *VIEWS)
    if node.users or node.target not in (*parts, gemv.operator()):
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        erase_unread(graph, source)


def _equal_parts(product: Node) -> dict[Node, tuple[int, int]]:
    """Who reads which columns of `product`, or of a view of it with as many; nothing if not all of them read equally
    many, apart from one another."""
    whole, width = product, product.meta["val"].shape[-1]
    if not isinstance(width, int):
        return {}
    while len(whole.users) == 1 and (user := next(iter(whole.users))).target in VIEWS:
        shape = user.meta["val"].shape
        if not all(isinstance(n, int) for n in shape) or not (
            shape[-1] == width == shape.numel()
        ):  # no longer the last
            return {}
        whole = user
    parts: dict[Node, tuple[int, int]] = {}
    for user in whole.users:
        found = _columns_read(user, width, len(whole.meta["val"].shape))
        if found is None:
            return {}
        parts.update(found)
    if any(user.op == "output" for part in parts for user in part.users):  # which lie beside each other in memory
        return {}
    bounds = sorted(parts.values())
    even = len({last - first for first, last in bounds}) == 1
    apart = all(last <= first for (_, last), (first, _) in itertools.pairwise(bounds))
    return parts if len(bounds) > 1 and even and apart else {}


def _columns_read(user: Node, width: int, axes: int) -> dict[Node, tuple[int, int]] | None:
    """The parts that `user` cuts from the last dimension; None if it does something else."""
    given: tuple[Any, ...] = arguments(user)[1:]
    if user.kwargs:
        return None
    if user.target is torch.ops.aten.slice.Tensor:
        defaults: tuple[Any, ...] = (0, None, None, 1)
        dim, first, last, step = (*given, *defaults[len(given) :])
        first, last = first or 0, width if last is None else last
        if dim not in (-1, axes - 1) or step != 1 or not (isinstance(first, int) and isinstance(last, int)):
            return None
        return {user: (first, min(last, width))} if 0 <= first < last else None
    if user.target not in _SPLITS or any(part.target is not operator.getitem for part in user.users):
        return None
    sizes, dim = (*given, 0)[:2]
    if isinstance(sizes, int):
        sizes = [min(sizes, width - first) for first in range(0, width, sizes)]
    if dim not in (-1, axes - 1) or not isinstance(sizes, list | tuple) or not all(isinstance(n, int) for n in sizes):
        return None
    bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    return {part: bounds[arguments(part)[1]] for part in user.users}
