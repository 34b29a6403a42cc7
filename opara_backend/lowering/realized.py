"""A value that a kernel of its own computes once, where Inductor would compute it in every kernel that reads it.

Takes: a value of a graph. Gives: the same value, as an `operator` that Inductor lowers to a buffer, contiguous. Must
not change: anything else; kernels over as many elements still join the one that writes the buffer.

Inductor computes what is cheap where it is read, for each element that is read by: the square root and the quotient of
a batch norm for every weight of a channel, not once a channel.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from opara_backend import upstream

_REGISTERING = threading.Lock()


def operator() -> torch._ops.OpOverload:
    """The identity, as an operator that Inductor lowers to a contiguous buffer; registered when first asked for."""
    with _REGISTERING:
        return _registered()[0]


def _copied(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


@functools.cache
def _registered() -> tuple[torch._ops.OpOverload, torch.library.Library]:
    library = torch.library.Library("opara_backend", "FRAGMENT")  # the operator lives as long as it
    library.define("realized(Tensor value) -> Tensor")
    library.impl("realized", _copied, "CompositeExplicitAutograd")
    torch.library.register_fake("opara_backend::realized", _copied, lib=library)
    registered: torch._ops.OpOverload = torch.ops.opara_backend.realized.default
    upstream.lowerings()[registered] = upstream.contiguous
    return registered, library
