"""What is opened of Inductor's lowering: the boxes of tensors that operators become, and what is known of their sizes.

Takes: boxes, while Inductor lowers a graph. Gives: boxes. Must not change: what is computed; a box that is laid out
otherwise is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from opara_backend.upstream.private import GraphLowering, V, ir
from opara_backend.upstream.private import lowerings as known_lowerings


def lowerings() -> dict[Any, Callable[..., Any]]:
    """What Inductor makes of each operator: functions from its boxes of tensors to others. Entries may be added.

    Seen 2.11, 2.13, 2.15. Without it products of vectors stay calls of libraries.
    """
    found: dict[Any, Callable[..., Any]] = known_lowerings
    return found


def laid_out_for_convolution(operand: Any, result: Any) -> Any:
    """The box of an operand, laid out as Inductor lays out those of the convolution that has the box `result`.

    Seen 2.11, 2.13, 2.15 (torch/_inductor/kernel/conv.py). Without it a library copies its operands at every call.
    """
    operand.realize()
    if V.graph.layout_opt:
        return ir.ExternKernel.require_channels_last(operand)
    order = ir.get_stride_order(result.get_layout().stride, V.graph.sizevars.shape_env)
    return ir.ExternKernel.require_stride_order(operand, order)


def will_prefer_channels_last(graph: torch.fx.Graph) -> bool:
    """Whether `prefers_channels_last` will be true of an inference graph. Seen 2.11, 2.13, 2.14."""
    return bool(GraphLowering.decide_layout_opt(SimpleNamespace(graph=graph), is_inference=True))


def prefers_channels_last() -> bool:
    """True if Inductor lays out the images of the graph that it lowers channels last. Seen 2.11, 2.13, 2.14."""
    return bool(V.graph.layout_opt)


def channels_last(image: Any) -> Any:
    """The box of an image, computed, and laid out channels last. Seen 2.11, 2.13, 2.14.

    Without it neighbouring threads would read what lies far apart.
    """
    image.realize()
    return ir.ExternKernel.require_channels_last(image)


def contiguous(operand: Any) -> Any:
    """The box of a tensor in a buffer, row after row. Seen 2.11, 2.13, 2.14.

    Without it Inductor computes it where it is read, or lays it out as what it is computed from.
    """
    operand.realize()
    return ir.ExternKernel.require_stride_order(operand, [*reversed(range(len(operand.get_size())))])


def elementwise(element: Callable[[Sequence[Any]], Any], like: Any) -> Any:
    """The box of a tensor as the one of the box `like`, whose elements `element` computes from their indices by `ops`.

    Computed once, whoever reads it. Seen 2.11, 2.13, 2.14. Without it depthwise convolutions stay calls of cuDNN.
    """
    box = ir.Pointwise.create(
        device=like.get_device(), dtype=like.get_dtype(), inner_fn=element, ranges=list(like.get_size())
    )
    box.realize()
    return box


def known_equal(one: Any, other: Any) -> bool:
    """True if two sizes are surely the same number; asks for no guard where they are symbols.

    Seen 2.11, 2.13, 2.15. Without it convolutions of dynamic sizes are not fused with a residual.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))


def known_at_least(size: Any, least: int) -> bool:
    """True if a size surely is `least` or more, with no guard asked for. Seen 2.11, 2.13, 2.15."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size >= least))


def extern_call(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """The box of what a call of `operator` returns, which allocates it. Seen 2.11, 2.13, 2.15."""
    return ir.TensorBox.create(ir.FallbackKernel.create(operator, *args))
