"""Depthwise convolutions as elementwise kernels, which Inductor fuses with what follows them.

Takes: an inference graph before Inductor's own passes. Gives: the same graph, in which a convolution of as many groups
as channels is one `operator`. Must not change: convolutions whose groups are larger, or that take more than `MOST`
elements of the image for one of the result.

Each channel has a filter of its own, so that nothing is a product of matrices: an element of the result is a sum of few
products, computed where it is written. cuDNN's kernels for it take 3 us (3x3) to 27 us (7x7) at batch 1 on an H200,
37 per cent of the time of NASNet's kernels (bench/kernel_graphs/nasnet_large-float16.json.gz), and a batch norm or an
activation behind one is another kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from opara_backend import upstream
from opara_backend.lowering.rewriting import Writer, arguments

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST = 49
"""Elements of a filter, up to which the sum is written out. Chosen, not measured: no usual network's are larger."""
_REGISTERING = threading.Lock()


def fuse_depthwise(graph: Graph) -> int:
    """Replace every depthwise convolution; how many there were."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
        if not _is_depthwise(node):
            continue
        image, weight, bias, stride, padding, dilation, *_ = arguments(node)
        do, aten = Writer(graph, node), torch.ops.aten
        channels, _, *window = weight.meta["val"].shape
        filters = do(aten.permute.default, do(aten.reshape.default, weight, [channels, math.prod(window)]), [1, 0])
        made = do(operator(), image, filters, bias, window, stride, padding, dilation)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        found += 1
    return found


def _is_depthwise(node: Node) -> bool:
    image, weight, _, _, _, _, transposed, _, groups = arguments(node)
    x, w = image.meta["val"], weight.meta["val"]
    if x.device.type not in DEVICES or x.dtype not in DTYPES or w.dtype is not x.dtype or transposed:
        return False
    if not 3 <= x.dim() <= 4 or x.dim() != w.dim() or not all(isinstance(size, int) for size in w.shape):
        return False
    channels, each, *window = w.shape
    return bool(groups == channels > 1 and each == 1 and math.prod(window) <= MOST and x.shape[1] == channels)


def convolution(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of `x`, `(n, channels, *extent)`, with `filters`, `(product of window, channels)`."""
    weight = filters.t().reshape(-1, 1, *window)
    return torch.ops.aten.convolution.default(x, weight, bias, stride, padding, dilation, False, [0] * len(window), len(weight))


def _lower(
    x: Any,
    filters: Any,
    bias: Any,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """`convolution` of Inductor's boxes of tensors: summed in float32, rounded once."""
    x = upstream.channels_last_if_preferred(x)
    # Neighbours in memory are channels, as they are in images that are laid out channels last.
    load_filter = upstream.row_major(filters).make_loader()
    load_bias = None if bias is None else bias.make_loader()
    edges = [edge for width in reversed(padding) for edge in (width, width)]
    padded = upstream.lowerings()[torch.ops.aten.constant_pad_nd.default](x, edges, 0) if any(padding) else x
    load = padded.make_loader()
    reach = [step * (taps - 1) + 1 for taps, step in zip(window, dilation, strict=True)]
    extent = [
        (size - length) // step + 1
        for size, length, step in zip(padded.get_size()[2:], reach, stride, strict=True)
    ]
    ops = upstream.ops

    def element(index: Sequence[Any]) -> Any:
        image, channel, *place = index
        total = None if load_bias is None else ops.to_dtype(load_bias([channel]), torch.float32)
        for number, taps in enumerate(itertools.product(*map(range, window))):
            at = [p * s + t * d for p, s, t, d in zip(place, stride, taps, dilation, strict=True)]
            value, factor = load([image, channel, *at]), load_filter([number, channel])
            term = ops.mul(ops.to_dtype(value, torch.float32), ops.to_dtype(factor, torch.float32))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, x.get_dtype())

    return upstream.elementwise(element, [*x.get_size()[:2], *extent], x.get_dtype(), x.get_device())


def _flops(x: Any, filters: Any, bias: Any, window: Any, *others: Any, out_shape: Any = None) -> int:
    return conv_flop_count([*x], [filters[1], 1, *window], [*out_shape])


def operator() -> torch._ops.OpOverload:
    """`convolution` as an operator that Inductor knows how to lower; registered when first asked for."""
    with _REGISTERING:
        return _registered()[0]


def is_depthwise(target: Any) -> bool:
    """True if `target` is `operator()`, which is not registered for the question."""
    return isinstance(target, torch._ops.OpOverload) and target.name() == "opara_backend::depthwise"


@functools.cache
def _registered() -> tuple[torch._ops.OpOverload, torch.library.Library]:
    library = torch.library.Library("opara_backend", "FRAGMENT")  # the operator lives as long as it
    operands, settings = "Tensor x, Tensor filters, Tensor? bias", "int[] stride, SymInt[] padding, int[] dilation"
    library.define(f"depthwise({operands}, int[] window, {settings}) -> Tensor")
    library.impl("depthwise", convolution, "CompositeExplicitAutograd")
    torch.library.register_fake("opara_backend::depthwise", convolution, lib=library)
    registered: torch._ops.OpOverload = torch.ops.opara_backend.depthwise.default
    upstream.lowerings()[registered] = _lower
    register_flop_formula(torch.ops.opara_backend.depthwise)(_flops)
    return registered, library
