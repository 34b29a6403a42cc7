"""Depthwise convolutions as elementwise kernels, which Inductor fuses with what follows them.

Takes: an inference graph before Inductor's own passes. Gives: the same graph, in which a convolution of as many groups
as channels is one `operator`. Must not change: convolutions whose groups are larger, or that cuDNN mostly is faster at
(`pays`), and graphs whose images Inductor does not lay out channels last: there an element's neighbours have other
neighbours in the image, and nothing is loaded in wide words.

Each channel has a filter of its own, so that nothing is a product of matrices: an element of the result is a sum of few
products, computed where it is written. cuDNN's kernels for it take 3 us (3x3) to 27 us (7x7) at batch 1 on an H200,
41 per cent of the time of NASNet's kernels (bench/kernel_graphs/nasnet_large-float16.json.gz), and a batch norm or an
activation behind one is another kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from opara_backend import upstream
from opara_backend.lowering.operators import Operator, convolution_flops
from opara_backend.lowering.rewriting import Writer, arguments, per_axis

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST = 49
"""Elements of a filter, up to which the sum is written out. Chosen, not measured: no usual network's are larger."""
LARGE, SMALL = 1 << 21, 1 << 17
"""Elements of a result, above and below which larger filters are cuDNN's (`pays`)."""


def fuse_depthwise(graph: Graph) -> int:
    """Replace every depthwise convolution where that `pays`; how many there were."""
    convolutions = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    found = [node for node in convolutions if _is_depthwise(node)]
    if not found or not upstream.will_prefer_channels_last(graph):
        return 0
    for node in found:
        image, weight, bias, *settings = arguments(node)[:6]
        following, do = [*node.users], Writer(graph, node.next, node)
        made = do(operator(), node, image, weight, bias, *per_axis(2, *settings))
        for user in following:
            user.replace_input_with(node, made)
    return len(found)


def _is_depthwise(node: Node) -> bool:
    image, weight, _, *steps, transposed, _, groups = arguments(node)
    x, w = image.meta["val"], weight.meta["val"]
    if x.device.type not in DEVICES or x.dtype not in DTYPES or w.dtype is not x.dtype or transposed:
        return False
    numbers = (*x.shape, *w.shape, *itertools.chain(*steps))
    if not x.dim() == w.dim() == 4 or not all(isinstance(number, int) for number in numbers):
        return False
    channels, each, *window = w.shape
    if groups != channels or channels == 1 or each != 1 or x.shape[1] != channels:
        return False
    return pays(x.dtype, math.prod(window), math.prod(node.meta["val"].shape))


def pays(dtype: torch.dtype, taps: int, elements: int) -> bool:
    """False where cuDNN mostly is faster, by what an H200 shows (bench/results/depthwise.json).

    taps: elements of a filter; elements: of the result. In types of two bytes cuDNN has a good kernel for large images.
    A sum written out is long, and where it has few elements it takes as long as its instructions take to be fetched;
    cuDNN's kernels for float32 are shorter.
    """
    if dtype is torch.float32:
        return taps <= 25 or (taps <= MOST and elements >= SMALL)
    return taps <= 9 or (taps <= MOST and elements <= LARGE)


def _lower(
    like: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """The convolution of Inductor's boxes of tensors: summed in float32, rounded once.

    like: the box of cuDNN's result, which nobody reads now, and Inductor forgets.
    """
    if not upstream.prefers_channels_last():  # another pass, after ours, left it with other convolutions to go by
        return like
    x, ops = upstream.channels_last(x), upstream.ops
    channels, _, *window = map(int, weight.get_size())
    aten, lowered = torch.ops.aten, upstream.lowerings()
    rows = lowered[aten.reshape.default](weight, [channels, math.prod(window)])
    filters = upstream.contiguous(lowered[aten.permute.default](rows, [1, 0]))  # neighbours are channels, as in `x`
    load, load_filter = x.make_loader(), filters.make_loader()
    load_bias = None if bias is None else bias.make_loader()
    sizes = zip(map(int, x.get_size()[2:]), map(int, like.get_size()[2:]), strict=True)
    axes = [*zip(sizes, window, stride, padding, dilation, strict=True)]

    def element(index: Sequence[Any]) -> Any:
        image, channel, *place = index
        rows, columns = (_along(at, *axis) for at, axis in zip(place, axes, strict=True))
        total = None if load_bias is None else ops.to_dtype(load_bias([channel]), torch.float32)
        for number, ((row, above), (column, beside)) in enumerate(itertools.product(rows, columns)):
            read = functools.partial(load, [image, channel, row, column])
            asked = [*above, *beside]
            value = ops.masked(functools.reduce(ops.and_, asked), read, 0.0) if asked else read()
            factor = load_filter([number, channel])
            term = ops.mul(ops.to_dtype(value, torch.float32), ops.to_dtype(factor, torch.float32))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, x.get_dtype())

    return upstream.elementwise(element, like)


def _along(
    place: Any, sizes: tuple[int, int], window: int, stride: int, padding: int, dilation: int
) -> list[tuple[Any, list[Any]]]:
    """Where each of a filter's elements reads along one axis, and the conditions on which that is in the image.

    sizes: of the image and of the result. Few are asked, once each: Inductor takes its time over every operation.
    """
    ops, (size, count) = upstream.ops, sizes
    found = []
    for offset in (tap * dilation - padding for tap in range(window)):
        at, asked = place * stride + offset, []
        if offset < 0:
            asked.append(ops.ge(ops.index_expr(at, torch.int64), ops.index_expr(0, torch.int64)))
        if offset + (count - 1) * stride >= size:
            asked.append(ops.lt(ops.index_expr(at, torch.int64), ops.index_expr(size, torch.int64)))
        found.append((at, asked))
    return found


operator = Operator(
    "depthwise(Tensor like, Tensor x, Tensor weight, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor",
    compute=lambda like, *others: like.clone(),
    shape=lambda like, *others: torch.empty_like(like),
    lower=_lower,
    flops=convolution_flops,
)
"""The convolution as an operator that Inductor knows how to lower.

Its first argument is the convolution as it was: for what Inductor decides by the convolutions of a graph.
"""
