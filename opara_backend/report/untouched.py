"""A model and its inputs as they were, whatever calls in between have written.

Takes: a module, if there is one, and arguments. Gives: a context behind which buffers, and tensors among the arguments,
hold what they held. Must not change: anything else. Parameters are left, which inference does not write and which would
take as much memory again, and so are other attributes of Python objects. Tensors that are not plain (sparse, on the
meta device) are left as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from opara_backend.upstream import tree_map


@contextlib.contextmanager
def untouched(owner: torch.nn.Module | None, given: Any) -> Iterator[None]:
    """Put back, behind the block, the buffers of `owner` and the tensors in `given`, nested as they may be.

    Takes as many bytes as these have while the block runs.
    """
    places = [
        (module, name, buffer)
        for module in (owner.modules() if owner is not None else ())
        for name, buffer in module.named_buffers(recurse=False)
    ]
    found: dict[int, torch.Tensor] = {id(buffer): buffer for _, _, buffer in places}
    tree_map(lambda value: found.setdefault(id(value), value) if isinstance(value, torch.Tensor) else None, given)
    kept = [(t, t.detach().clone()) for t in found.values() if t.layout is torch.strided and not t.is_meta]
    try:
        yield
    finally:
        for module, name, buffer in places:
            if getattr(module, name, None) is not buffer:  # a call put another there
                setattr(module, name, buffer)
        with torch.inference_mode():  # where tensors made in that mode may be written, and others too
            for tensor, before in kept:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)
