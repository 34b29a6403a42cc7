"""Products of one row or one column as reductions, which Inductor fuses with what surrounds them.

Takes: an inference graph that Inductor is about to lower. Gives: the same graph, in which `mm`, `addmm` and `bmm` of a
vector and a matrix are one `operator` each. Must not change: products of other shapes or types, and those whose sums
run across the matrix's rows in memory.

At batch 1 a product reads every weight once and computes next to nothing. cuBLAS runs its kernels for matrices all the
same, in tiles that but for one row are padding: on an H200 a block takes 164 KiB of shared memory and nearly all
registers, so that no other kernel finds room on the multiprocessor, and a stream a workspace. Reductions do not. Those
that read the same vector become one kernel (query, key and value; gate and up; every expert of a layer), and bias,
activation and residual are computed where the sum is. Inductor does this itself under `coordinate_descent_tuning`, but
not where there is a bias (torch/_inductor/decomposition.py, `mm`).

Where Inductor cannot ask `nvidia-smi` how fast the GPU is, in a container without it or under load, it times products
of sizes that are no multiple of 8 with operands copied into padded ones, too (torch/_inductor/fx_passes/pad_mm.py).
A reduction has no use for that: zeros behind what is summed, and behind the columns, are left out again.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from opara_backend import upstream
from opara_backend.lowering.operators import Operator
from opara_backend.lowering.rewriting import Writer, arguments

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 4  # outputs that share a vector, up to which each computes it anew; chosen, not measured


def fuse_gemv(graph: torch.fx.Graph) -> int:
    """Replace every product of a vector and a matrix; how many there were."""
    aten = torch.ops.aten
    found = 0
    if graph.find_nodes(op="call_function", target=aten.as_strided.default):  # it counts on memory that is not ours
        return found
    for node in [*graph.nodes]:
        if node.target in (aten.mm.default, aten.bmm.default):
            operands = node.args
        elif node.target is aten.addmm.default and len(node.args) == 3 and {*node.kwargs.values()} <= {1}:  # not scaled
            operands = (*node.args[1:], node.args[0])
        else:
            continue
        do = Writer(graph, node)
        *bare, more = _without_padding(node, *operands[:2])
        if not _reads_a_matrix_once(*(operand.meta.get("val") for operand in bare)):
            continue
        biases = operands[2:]
        if more:  # nobody reads these
            biases = tuple(_first(do, bias, bare[1].meta["val"].shape[-1]) for bias in biases)
        made = do(operator(), *bare, *biases)
        if more:
            made = do(aten.constant_pad_nd.default, made, [0, more])
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        found += 1
    return found


def _without_padding(product: Node, left: Node, right: Node) -> tuple[Node, Node, int]:
    """The operands of `product` without zeros behind what is summed, and behind columns of which nobody reads the sums,
    and how many of these there were; as they are, and none, if they are not padded so."""
    (x, more_rows, more_left), (w, more_right, more_columns) = _padding(left), _padding(right)
    if more_rows or more_left != more_right or (more_columns and not _reads_first(product, more_columns)):
        return left, right, 0
    return x, w, more_columns


def _padding(operand: Node) -> tuple[Node, int, int]:
    """What `operand` is with zeros behind it, and how many more rows and columns they make of it."""
    if operand.target is torch.ops.aten.constant_pad_nd.default and not operand.kwargs:
        inner, padding, value = [*arguments(operand), 0][:3]
        if isinstance(inner, Node) and isinstance(padding, list | tuple) and value == 0:
            columns, rows, *others = [*list(padding)[1::2], 0, 0]
            if not any(padding[::2]) and not any(others) and all(isinstance(n, int) and n >= 0 for n in padding):
                return inner, rows, columns
    return operand, 0, 0


def _reads_first(product: Node, but: int) -> bool:
    """True if all that is read of `product` are its columns but the last `but`; symbols are not asked for values."""
    value = product.meta["val"]
    columns = value.shape[-1] - but
    for user in product.users:
        if user.target is not torch.ops.aten.slice.Tensor or user.kwargs:
            return False
        given = list(arguments(user))
        _, axis, start, end, step = given + [None, 0, 0, None, 1][len(given) :]
        if not all(isinstance(number, int) for number in (axis, start or 0, step)) or isinstance(end, Node | None):
            return False
        if axis not in (value.dim() - 1, -1) or start not in (0, None) or step != 1:
            return False
        if not (end == -but if isinstance(end, int) and end < 0 else upstream.known_equal(end, columns)):
            return False
    return True


def _first(do: Writer, bias: Node, columns: Any) -> Node:
    """`bias` of so many columns, of what may be a larger result's."""
    shape = bias.meta["val"].shape
    if not shape or _is_one(shape[-1]) or upstream.known_equal(shape[-1], columns):
        return bias
    return do(torch.ops.aten.slice.Tensor, bias, -1, 0, columns)


def _reads_a_matrix_once(left: Any, right: Any) -> bool:
    """True if one operand is a vector, and the other's elements that are summed lie side by side in memory."""
    if not all(isinstance(t, Tensor) and t.dtype in DTYPES and t.device.type in DEVICES for t in (left, right)):
        return False
    row, column = _is_one(left.shape[-2]), _is_one(right.shape[-1])
    return (row and (column or _is_one(right.stride(-2)))) or (column and _is_one(left.stride(-1)))


def _is_one(number: Any) -> bool:
    """Never a symbol's value: Dynamo specialises sizes of one."""
    return isinstance(number, int) and number == 1


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right + bias`, of `(..., m, k)` and `(..., k, n)`, where m or n is 1; summed in float32, rounded once."""
    total = (left.float().unsqueeze(-1) * right.float().unsqueeze(-3)).sum(-2)
    return (total if bias is None else total + bias.float()).to(left.dtype)


def _lower(left: Any, right: Any, bias: Any = None) -> Any:
    """`product` of Inductor's boxes of tensors."""
    # What many outputs read is computed once: left where it is, each of them would compute it.
    for vector, outputs in ((left, right.get_size()[-1]), (right, left.get_size()[-2])):
        if not (isinstance(outputs, int | sympy.Integer) and outputs <= FEW):
            vector.realize()
    aten, prims, lowered = torch.ops.aten, torch.ops.prims, upstream.lowerings()

    def wide(operand: Any) -> Any:
        return lowered[prims.convert_element_type.default](operand, torch.float32)

    columns = lowered[aten.unsqueeze.default](wide(left), -1)
    terms = lowered[aten.mul.Tensor](columns, lowered[aten.unsqueeze.default](wide(right), -3))
    total = lowered[aten.sum.dim_IntList](terms, [-2])
    if bias is not None:
        total = lowered[aten.add.Tensor](total, wide(bias))
    return lowered[prims.convert_element_type.default](total, left.get_dtype())


def _shape(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def _flops(left: Any, right: Any, *bias: Any, out_shape: Any = None) -> int:
    return 2 * math.prod(out_shape) * int(left[-1])


operator = Operator(
    "gemv(Tensor left, Tensor right, Tensor? bias=None) -> Tensor",
    compute=product,
    shape=_shape,
    lower=_lower,
    flops=_flops,
)
"""`product` as an operator that Inductor knows how to lower."""
