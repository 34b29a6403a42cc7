"""A convolution and what follows it channel by channel as one kernel of cuDNN's.

Takes: an inference graph before Inductor's own passes. Gives: the same graph, in which a convolution, a batch norm or
bias behind it, a sum with another tensor and the ReLU behind that are one `operator`. Must not change: convolutions
whose result something else reads, those scaled by what is computed from the model's input, those that end in a
concatenation, whose parts are written where they belong by the kernel of the batch norm, and those with a sum that
cuDNN is slow at.

cuDNN adds a bias and applies a ReLU where it computes the sums: a kernel, and the time to the next, go from the
path through a network. The scale of a batch norm goes into the weights, anew at every call, so that weights that change
are seen: by kernels that wait for nothing and run beside others, the same that lay weights out for cuDNN where they do
not lie so. Scale and shift are computed in float32, weights and bias rounded once, as by Inductor's `freezing`: in
float16 a scale far from one, or a mean far above the deviation, loses digits that eager keeps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from opara_backend import upstream
from opara_backend.execution.libraries import convolution_relu, has_fused_convolutions
from opara_backend.lowering.operators import Operator, convolution_flops
from opara_backend.lowering.rewriting import Writer, arguments, moving, per_axis

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LONG, LARGE = 384, 1 << 23
"""Products summed for an element, elements of a result, from which cuDNN adds an image fast (`adds_fast`)."""
_STEPS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor)


@dataclass(frozen=True)
class _Chain:
    """What follows a convolution, a ReLU last: sums and products with what there is one of for each channel, in order,
    and then, perhaps, a sum with an image of the same size."""

    nodes: tuple[Node, ...]
    steps: tuple[tuple[Any, Node], ...]
    residual: Node | None


def fuse_convolutions(graph: Graph, static_inputs: Collection[int]) -> int:
    """Replace every convolution and what follows it up to a ReLU, where that saves a kernel; how many there were.

    static_inputs: which of the graph's inputs are parameters and buffers, by position.
    """
    found, changing = 0, moving(graph, static_inputs)
    for convolution in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
        chain = _followed(convolution) if _of_cudnn(convolution) else None
        if chain is None or not chain.steps or not _saves_a_kernel(chain.nodes[-1]):
            continue
        if changing & {convolution.args[1], *(operand for _, operand in chain.steps)}:
            continue
        relu = chain.nodes[-1]
        products = math.prod(arguments(convolution)[1].meta["val"].shape[1:])
        result = relu.meta["val"]
        if chain.residual is not None and not adds_fast(result.dtype, products, result.numel()):
            continue
        if not _equal(relu.meta["val"].stride(), convolution.meta["val"].stride()):  # on which views of it count
            continue
        relu.replace_all_uses_with(_fused(Writer(graph, relu), convolution, chain))
        for node in reversed(chain.nodes):
            graph.erase_node(node)
        found += 1
    return found


def _of_cudnn(convolution: Node) -> bool:
    image, weight, _, _, _, _, transposed, _, groups = arguments(convolution)
    x, w = image.meta["val"], weight.meta["val"]
    if x.device.type == "cuda" and not has_fused_convolutions():
        return False
    if x.device.type not in DEVICES or x.dtype not in DTYPES or w.dtype is not x.dtype:
        return False
    return bool(x.dim() == 4 and not transposed and groups == 1)


def _followed(convolution: Node) -> _Chain | None:
    """What follows `convolution`, up to a ReLU; None if anything else does."""
    aten, value = torch.ops.aten, convolution.meta["val"]
    bias = arguments(convolution)[2]
    steps: list[tuple[Any, Node]] = [] if bias is None else [(aten.add.Tensor, bias)]
    nodes, residual = [convolution], None
    while len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        operands = [one for one in user.args if one is not nodes[-1]]
        nodes.append(user)
        if user.target is aten.relu.default and user.meta["val"].dtype is value.dtype:
            return _Chain(tuple(nodes[1:]), tuple(steps), residual)
        if user.target is torch.ops.prims.convert_element_type.default and operands[0] in (torch.float32, value.dtype):
            continue
        if residual is not None or user.kwargs or len(operands) != 1 or not isinstance(operands[0], Node):
            return None
        if user.target in _STEPS and _one_a_channel(operands[0].meta["val"], value):
            if user.target is aten.sub.Tensor and user.args[0] is operands[0]:
                return None
            steps.append((user.target, operands[0]))
        elif user.target is aten.add.Tensor and _alike(operands[0].meta["val"], value):
            residual = operands[0]
        else:
            return None
    return None


def _one_a_channel(operand: Any, result: Tensor) -> bool:
    if not isinstance(operand, Tensor) or not operand.is_floating_point() or not 3 <= operand.dim() <= 4:
        return False
    expected = [1] * (operand.dim() - 3) + [result.shape[1], 1, 1]
    return all(isinstance(n, int) and n == m for n, m in zip(operand.shape, expected, strict=True))


def _alike(operand: Any, result: Tensor) -> bool:
    if not isinstance(operand, Tensor) or operand.dim() != result.dim() or operand.dtype is not result.dtype:
        return False
    return _equal(operand.shape, result.shape)


def _equal(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """True if they surely are; symbols are not asked for their values."""
    return all(upstream.known_equal(n, m) for n, m in zip(sizes, others, strict=True))


def adds_fast(dtype: torch.dtype, products: Any, elements: Any) -> bool:
    """False if cuDNN takes longer to add an image to a convolution's result than a kernel of its own would.

    products: summed for each of the `elements` of the result. In float32, where they are few, cuDNN adds by a kernel
    that takes up to 3.5 times as long as the one it has for a bias and a ReLU, unless images are large
    (bench/results/convolutions.json, an H200).
    """
    if dtype is not torch.float32:
        return True
    return upstream.known_at_least(products, LONG) or upstream.known_at_least(elements, LARGE)


def _saves_a_kernel(relu: Node) -> bool:
    """True if a kernel would have to write the result of `relu`, and nothing else.

    Whoever reads an image many times over finds it computed, and a part of a concatenation is computed in its place.
    """
    aten = torch.ops.aten
    if any(user.target is aten.cat.default for user in relu.users):
        return False
    return any(
        user.op == "output" or user.target is aten.convolution.default or "pool" in str(user.target)
        for user in relu.users
    )


def _fused(do: Writer, convolution: Node, chain: _Chain) -> Node:
    """The operator that stands for `chain`: `relu(convolution * scale + shift + residual)`."""
    aten = torch.ops.aten
    image, weight, _, stride, padding, dilation, *_, groups = arguments(convolution)

    def converted(node: Node, dtype: torch.dtype) -> Node:
        same = node.meta["val"].dtype is dtype
        return node if same else do(torch.ops.prims.convert_element_type.default, node, dtype)

    scale: Node | None = None
    shift: Node | None = None
    for operation, of_channels in chain.steps:
        operand = converted(do(aten.reshape.default, of_channels, [-1]), torch.float32)
        if operation is aten.mul.Tensor:
            scale = operand if scale is None else do(operation, scale, operand)
        if shift is not None:
            shift = do(operation, shift, operand)
        elif operation is not aten.mul.Tensor:
            shift = operand if operation is aten.add.Tensor else do(aten.neg.default, operand)
    dtype = weight.meta["val"].dtype
    if scale is not None:
        factors = do(aten.reshape.default, scale, [-1, 1, 1, 1])
        weight = converted(do(aten.mul.Tensor, converted(weight, torch.float32), factors), dtype)
    if shift is None:
        shift = do(aten.full.default, [weight.meta["val"].shape[0]], 0, dtype=dtype, device=weight.meta["val"].device)
    operands = (image, weight, converted(shift, dtype), chain.residual)
    settings = per_axis(2, stride, padding, dilation)
    convolution.update_arg(2, None)  # of the bias, which is in `shift`: on a GPU Inductor would add it apart
    return do(operator(), convolution, *operands, *settings, groups)


def _lower(like: Any, x: Any, weight: Any, bias: Any, residual: Any, *settings: Any) -> Any:
    """The call, of operands laid out as those of the convolution that nobody reads now, and Inductor forgets."""
    x, weight, *residuals = (
        upstream.laid_out_for_convolution(operand, like) for operand in (x, weight, residual) if operand is not None
    )
    return upstream.extern_call(operator(), None, x, weight, bias, *(residuals or [None]), *settings)


def _shape(like: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, residual: Any, *settings: Any) -> Tensor:
    if like is not None:
        return torch.empty_like(like)
    *strides, groups = settings
    return torch.ops.aten.convolution.default(x, weight, None, *strides, False, [0, 0], groups)


operator = Operator(
    "convolution_relu(Tensor? like, Tensor x, Tensor weight, Tensor bias, Tensor? residual, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    compute=lambda like, *others: convolution_relu(*others),
    shape=_shape,
    lower=_lower,
    flops=convolution_flops,
)
"""`execution.libraries.convolution_relu` as an operator that Inductor knows how to lower.

Its first argument is the convolution alone, for the layout of its result, or None where tensors say so themselves.
Inductor lowers that convolution too, tunes it if it is told to tune, and then finds that nobody reads it.
"""
