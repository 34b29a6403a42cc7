"""The samples of PyTorch's operator database, in an order and with values that every process agrees on.

Takes: a device, and how many samples of each operator. Gives: `Case`s, which name samples, and `Sample`s, which can
be called. Must not change: the values of a sample from run to run; each operator's are drawn from a seed of its own.

This is the one place that imports the database, which is not public. Seen 2.11, 2.13, 2.15.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import sys
import types
import unittest
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from torch.utils import _pytree as pytree

from tests.sweep.records import Case

# float32, and int64 where it is not supported; the rest is for operators that have neither (complex, float8).
DTYPES = (torch.float32, torch.int64, torch.complex64, torch.bool, torch.float16, torch.bfloat16)

# What these give back was never written: only its layout can be compared.
UNINITIALISED = frozenset(
    (
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "resize_as_",
    )
)


@dataclass(frozen=True)
class Sample:
    """One sample: `call(*arguments)` runs it. changed: arguments that differ only in the values of their tensors."""

    case: Case
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    changed: tuple[Any, ...] | None = None
    initialised: bool = True
    dtype: str = "float32"


@functools.cache
def _database() -> dict[str, Any]:
    """Every OpInfo by its name."""
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        # It is named only as the base of test classes that nobody here runs.
        stand_in = types.ModuleType("expecttest")
        vars(stand_in)["TestCase"] = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    arguments, sys.argv = sys.argv, sys.argv[:1]  # some releases read options while being imported
    try:
        # It forbids the process to set `torch.backends.cudnn.enabled` and the like, for good.
        with mock.patch.object(torch.backends, "disable_global_flags"):
            from torch.testing._internal.common_methods_invocations import op_db
    finally:
        sys.argv = arguments
    for module in list(sys.modules.values()):  # it sets a seed around operators that draw, which nothing can compile
        if str(getattr(module, "__name__", "")).startswith("torch.testing._internal.") and hasattr(
            module, "wrapper_set_seed"
        ):
            vars(module)["wrapper_set_seed"] = lambda op, *args, **kwargs: op(*args, **kwargs)
    return {_name(op): op for op in op_db}


def _name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def operators() -> tuple[str, ...]:
    """Every operator of the database, sorted."""
    return tuple(sorted(_database()))


def dtype_of(operator: str, device: str) -> torch.dtype | None:
    """What the samples of `operator` are made of on `device`; None if it supports nothing we try."""
    supported = _database()[operator].supported_dtypes(device)
    return next((dtype for dtype in DTYPES if dtype in supported), None)


def stable_hash(text: str) -> int:
    """The same number in every process."""
    return zlib.crc32(text.encode())


def cases(operator: str, device: str, count: int | None) -> list[Case]:
    """The first `count` samples of `operator`; None: all."""
    return [Case(operator, index) for index in range(len(_draw(operator, device, count, salt="")))]


def load(wanted: Sequence[Case], device: str) -> list[Sample]:
    """The samples that `wanted` names, fresh."""
    found: dict[Case, Sample] = {}
    for operator, group in itertools.groupby(sorted(wanted), key=lambda case: case.operator):
        indices = [case.index for case in group]
        drawn = _draw(operator, device, max(indices) + 1, salt="")
        others = _draw(operator, device, max(indices) + 1, salt="changed")
        op = _database()[operator]
        for index in indices:
            case = Case(operator, index)
            changed = others[index] if index < len(others) and _alike(drawn[index], others[index]) else None
            dtype = str(dtype_of(operator, device)).removeprefix("torch.")
            initialised = op.name not in UNINITIALISED
            found[case] = Sample(case, _caller(op.get_op()), drawn[index], changed, initialised, dtype)
    return [found[case] for case in wanted]


def _draw(operator: str, device: str, count: int | None, *, salt: str) -> list[tuple[Any, ...]]:
    """The arguments of the first `count` samples, always drawn in one go from the operator's own seed."""
    dtype = dtype_of(operator, device)
    if dtype is None:
        return []
    seed = stable_hash(operator + salt)
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not `op.sample_inputs`, which sets one seed before every sample and looks through the caller's whole stack.
        op = _database()[operator]
        made = op.sample_inputs_func(op, device, dtype, False)
        return [(one.input, tuple(one.args), dict(one.kwargs)) for one in itertools.islice(made, count)]


def _caller(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called with arguments as samples hold them. Numbers among them are constants to the compiler."""

    def call(first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(first, *args, **kwargs)

    return call


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """True if the two differ only in the values of floating point tensors, so that the same code serves both.

    Integers are often indices or sizes, which decide what is computed.
    """
    (ours, spec), (theirs, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(map(_same_leaf, ours, theirs))


def _same_leaf(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and (one is other or repr(one) == repr(other))
    if one.layout != torch.strided or other.layout != torch.strided:
        return False
    if (one.shape, one.stride(), one.dtype, one.device) != (other.shape, other.stride(), other.dtype, other.device):
        return False
    return one.is_floating_point() or one.is_complex() or torch.equal(one, other)
