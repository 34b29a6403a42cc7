"""Operators of ours: what a rewrite puts into a graph, and Inductor is told how to lower.

Takes: a schema, and functions that compute the operator, say the shape of its result and lower it. Gives: the operator,
registered with torch and Inductor when it is first asked for. Must not change: operators of others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from opara_backend import upstream

NAMESPACE = "opara_backend"


def convolution_flops(like: Any, x: Any, weight: Any, *others: Any, out_shape: Any = None) -> int:
    """Of an operator whose result is laid out like its first argument, a convolution of the next two; from shapes."""
    return conv_flop_count([*x], [*weight], [*out_shape])


class Operator:
    """One operator; calling it gives what torch calls one, and registers it the first time.

    schema: as torch writes it, without the namespace. lower: from Inductor's boxes of its arguments to that of its
    result. flops: of shapes, as `torch.utils.flop_counter` has formulas.
    """

    def __init__(
        self,
        schema: str,
        *,
        compute: Callable[..., Any],
        shape: Callable[..., Any],
        lower: Callable[..., Any],
        flops: Callable[..., int] | None = None,
    ) -> None:
        self._schema, self._compute, self._shape, self._lower, self._flops = schema, compute, shape, lower, flops
        self._name = schema.partition("(")[0]
        self._registering = threading.Lock()
        self._library: torch.library.Library | None = None  # the operator lives as long as it

    def __call__(self) -> torch._ops.OpOverload:
        with self._registering:
            packet = getattr(torch.ops, NAMESPACE)
            if self._library is None:
                self._library = library = torch.library.Library(NAMESPACE, "FRAGMENT")
                library.define(self._schema)
                library.impl(self._name, self._compute, "CompositeExplicitAutograd")
                torch.library.register_fake(f"{NAMESPACE}::{self._name}", self._shape, lib=library)
                upstream.lowerings()[getattr(packet, self._name).default] = self._lower
                if self._flops is not None:
                    register_flop_formula(getattr(packet, self._name))(self._flops)
            found: torch._ops.OpOverload = getattr(packet, self._name).default
            return found

    def names(self, target: Any) -> bool:
        """True if `target` is this operator, which is not registered for the question."""
        return isinstance(target, torch._ops.OpOverload) and target.name() == f"{NAMESPACE}::{self._name}"
