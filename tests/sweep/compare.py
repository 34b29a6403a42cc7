"""How far two results of one sample are apart.

Takes: what two calls returned, any structure of tensors and Python values. Gives: a `Problem`, or None where they
agree. Must not change: what it is given.

Layouts are told apart from values, since compilers may choose them: strides count only along dimensions that have
more than one element.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Relative and absolute. Fused kernels round differently from eager ones; stale or misplaced data is far off.
_TOLERANCES = {
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float32: (1e-4, 1e-4),
    torch.complex64: (1e-4, 1e-4),
    torch.float64: (1e-5, 1e-6),
    torch.complex128: (1e-5, 1e-6),
}


class Kind(enum.Enum):
    """What two results differ in."""

    STRUCTURE = "structure"  # how many there are, types, dtypes, shapes
    VALUES = "values"
    STRIDES = "strides"


@dataclass(frozen=True)
class Problem:
    """One difference: what it is in, and the words for it."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.text}"


def difference(actual: Any, expected: Any, *, values: bool = True) -> Problem | None:
    """The worst difference between two results. values: whether numbers are to be compared, or only layouts."""
    ours, theirs = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return Problem(Kind.STRUCTURE, f"{len(ours)} values, expected {len(theirs)}")
    found = [_leaf(a, e, f"value {i}", values) for i, (a, e) in enumerate(zip(ours, theirs, strict=True))]
    order = list(Kind)
    return min((p for p in found if p), key=lambda problem: order.index(problem.kind), default=None)


def _leaf(actual: Any, expected: Any, where: str, values: bool) -> Problem | None:
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return _plain(actual, expected, where, values)
    for what in ("dtype", "shape", "layout", "device"):
        ours, theirs = getattr(actual, what), getattr(expected, what)
        if ours != theirs:
            return Problem(Kind.STRUCTURE, f"{where} has {what} {ours}, expected {theirs}")
    if values and (text := _values(actual, expected)):
        return Problem(Kind.VALUES, f"{where}: {text}")
    ours, theirs = _strides(actual), _strides(expected)
    if ours != theirs:
        return Problem(Kind.STRIDES, f"{where} has strides {actual.stride()}, expected {expected.stride()}")
    return None


def _plain(actual: Any, expected: Any, where: str, values: bool) -> Problem | None:
    if type(actual) is not type(expected):
        return Problem(Kind.STRUCTURE, f"{where} is a {type(actual).__name__}, expected {type(expected).__name__}")
    same = repr(actual) == repr(expected)  # nan is nan; objects made anew count as what they say they are
    if isinstance(actual, float) and not same:
        same = abs(actual - expected) <= 1e-4 + 1e-4 * abs(expected)
    return None if same or not values else Problem(Kind.VALUES, f"{where} is {actual!r}, expected {expected!r}")


def _values(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """What assert_close has to say; nothing if it agrees."""
    rtol, atol = _TOLERANCES.get(actual.dtype, (0.0, 0.0))
    if actual.layout != torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that matter for finding an element."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return ()
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
