"""Products of one row or one column as reductions, which Inductor fuses with what surrounds them.

Takes: an inference graph before Inductor's own passes. Gives: the same graph, in which `mm`, `addmm` and `bmm` of a
vector and a matrix are one `operator` each. Must not change: products of other shapes or types, and those whose sums
run across the matrix's rows in memory.

At batch 1 a product reads every weight once and computes next to nothing. cuBLAS runs its kernels for matrices all the
same, in tiles that but for one row are padding: on an H200 a block takes 164 KiB of shared memory and nearly all
registers, so that no other kernel finds room on the multiprocessor, and a stream a workspace. Reductions do not. Those
that read the same vector become one kernel (query, key and value; gate and up; every expert of a layer), and bias,
activation and residual are computed where the sum is. Inductor does this itself under `coordinate_descent_tuning`, but
not where there is a bias (torch/_inductor/decomposition.py, `mm`).
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from opara_backend import upstream
from opara_backend.lowering.operators import Operator
from opara_backend.lowering.rewriting import Writer

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
        elif node.target is aten.addmm.default and len(node.args) == 3 and not node.kwargs:  # not scaled
            operands = (*node.args[1:], node.args[0])
        else:
            continue
        if not _reads_a_matrix_once(*(operand.meta.get("val") for operand in operands[:2])):
            continue
        node.replace_all_uses_with(Writer(graph, node)(operator(), *operands))
        graph.erase_node(node)
        found += 1
    return found


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


operator = Operator(
    "gemv(Tensor left, Tensor right, Tensor? bias=None) -> Tensor", compute=product, shape=_shape, lower=_lower
)
"""`product` as an operator that Inductor knows how to lower."""
