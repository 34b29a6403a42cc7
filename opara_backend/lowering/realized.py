"""A value that a kernel of its own computes once, where Inductor would compute it in every kernel that reads it.

Takes: a value of a graph. Gives: the same value, as an `operator` that Inductor lowers to a buffer. Must not change:
anything else; kernels over as many elements still join the one that writes the buffer.

Inductor computes what is cheap where it is read, for each element that is read by: the square root and the quotient of
a batch norm for every weight of a channel, not once a channel.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from opara_backend import upstream

_REGISTERING = threading.Lock()


def operator() -> torch._ops.OpOverload:
    """The identity, as an operator that Inductor lowers to a buffer; registered when first asked for."""
    with _REGISTERING:
        return _registered()[0]


def _lower(value: Any) -> Any:
    value.realize()
    return value


@functools.cache
def _registered() -> tuple[torch._ops.OpOverload, torch.library.Library]:
    library = torch.library.Library("opara_backend", "FRAGMENT")  # the operator lives as long as it
    library.define("realized(Tensor value) -> Tensor")
    library.impl("realized", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("opara_backend::realized", torch.empty_like, lib=library)
    registered: torch._ops.OpOverload = torch.ops.opara_backend.realized.default
    upstream.lowerings()[registered] = _lower
    return registered, library
