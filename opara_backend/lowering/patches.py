"""Convolutions of patches that do not overlap as one matrix product.

Takes: an inference graph before Inductor's own passes. Gives: the same graph, in which a convolution whose stride is
its kernel's size (the first layer of a vision transformer, a downsampling layer of ConvNeXt) is a product of the
patches, laid out as rows, and the weights. Must not change: sizes, strides and values of its result, but for rounding.

cuDNN has no good kernel for these at batch 1: the one of ViT-B/16 takes 104 us in float16 on an H200, of the 697 us
that the model's kernels take one by one (bench/kernel_graphs/vit_b16-float16.json.gz). A product of 196 rows is what
the layers after it are made of; its rows are laid out by one elementwise kernel.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from opara_backend.lowering.rewriting import Writer, arguments

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SUMMED = 128
"""Elements of a patch from which a product is used. Chosen, not measured."""


def unfold_patches(graph: Graph) -> int:
    """Replace every convolution of patches by a product; how many there were."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
        if _of_patches(node):
            node.replace_all_uses_with(_product(Writer(graph, node), *arguments(node)[:3]))
            graph.erase_node(node)
            found += 1
    return found


def _of_patches(node: Node) -> bool:
    image, weight, _, stride, padding, dilation, transposed, _, groups = arguments(node)
    x, w = image.meta["val"], weight.meta["val"]
    window = list(w.shape[2:])
    if x.device.type not in DEVICES or transposed or groups != 1 or any(padding) or any(d != 1 for d in dilation):
        return False
    # Sizes that are symbols are left to cuDNN, and images that do not divide into patches.
    if x.dtype not in DTYPES or not all(isinstance(size, int) and size > 0 for size in (*x.shape, *w.shape)):
        return False
    whole = all(size % step == 0 for size, step in zip(x.shape[2:], window, strict=True))
    # What views of the result count on can be had only of the usual layouts.
    value = node.meta["val"]
    usual = value.is_contiguous() or (x.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
    return usual and whole and list(stride) == window and math.prod(window) > 1 and math.prod(w.shape[1:]) >= SUMMED


def _product(do: Writer, image: Node, weight: Node, bias: Node | None) -> Node:
    aten = torch.ops.aten
    count, channels, *extent = image.meta["val"].shape
    filters, _, *window = weight.meta["val"].shape
    axes, patches = len(window), [size // step for size, step in zip(extent, window, strict=True)]
    # (n, c, h * k, w * l) -> (n, c, h, k, w, l) -> (n, h, w, c, k, l): a row is a patch, in the order of the weights.
    cut = [part for pair in zip(patches, window, strict=True) for part in pair]
    split = do(aten.reshape.default, image, [count, channels, *cut])
    within, flat = [1, *range(3, 3 + 2 * axes, 2)], weight
    if not weight.meta["val"].is_contiguous():  # channels last, or a copy would be made of them at every call
        within = [*within[1:], 1]
        flat = do(aten.permute.default, weight, [0, *range(2, 2 + axes), 1])
    rows = do(aten.permute.default, split, [0, *range(2, 2 + 2 * axes, 2), *within])
    size = [count * math.prod(patches), channels * math.prod(window)]
    operands = [
        do(aten.reshape.default, rows, size),
        do(aten.permute.default, do(aten.reshape.default, flat, [filters, size[1]]), [1, 0]),
    ]
    made = do(aten.mm.default, *operands) if bias is None else do(aten.addmm.default, bias, *operands)
    image_of_filters = do(aten.reshape.default, made, [count, *patches, filters])
    result = do(aten.permute.default, image_of_filters, [0, axes + 1, *range(1, axes + 1)])
    # Views of it count on the strides that it had.
    if result.meta["val"].stride() == do.place.meta["val"].stride():
        return result
    return do(aten.clone.default, result, memory_format=torch.contiguous_format)
