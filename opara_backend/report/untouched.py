"""A model and its inputs as they were, whatever calls in between have written.

Takes: a module, if there is one, and arguments. Gives: a context behind which buffers, and tensors among the arguments,
hold what they held, to the bit. Must not change: anything else; what no call wrote is not written. Parameters are left,
which inference does not write and which would take as much memory again, and so are other attributes of Python objects.
Tensors that are not plain (sparse, nested, on the meta device) or empty are left as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from opara_backend.execution.arguments import flat_view
from opara_backend.upstream import tree_map


@contextlib.contextmanager
def untouched(owner: torch.nn.Module | None, given: Any) -> Iterator[None]:
    """Put back, behind the block, the buffers of `owner` and the tensors in `given`, nested as they may be.

    Takes as many bytes as these have while the block runs; of elements that overlap, as many as there are in memory.
    """
    places = [
        (module, name, buffer)
        for module in (owner.modules() if owner is not None else ())
        for name, buffer in module.named_buffers(recurse=False)
    ]
    found: dict[int, torch.Tensor] = {id(buffer): buffer for _, _, buffer in places}
    tree_map(lambda value: found.setdefault(id(value), value) if isinstance(value, torch.Tensor) else None, given)
    kept = [(tensor, _content(tensor).detach().clone()) for tensor in found.values() if _is_plain(tensor)]
    try:
        yield
    finally:
        for module, name, buffer in places:
            if getattr(module, name, None) is not buffer:  # a call put another there
                setattr(module, name, buffer)
        with torch.inference_mode():  # where tensors made in that mode may be written, and others too
            for tensor, before in kept:
                now = _content(tensor)
                if not torch.equal(now, before):
                    now.copy_(before)


def _is_plain(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return False
    return tensor.numel() > 0  # what holds nothing cannot always be compared either


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _content(tensor: torch.Tensor) -> torch.Tensor:
    """What `tensor` holds, each element once, as integers over the same memory.

    Floating-point numbers cannot be compared, as NaN is not itself and -0.0 is 0.0; some types know no comparison; and
    elements that share memory cannot be copied to. A class that holds its content elsewhere has to do all this itself.
    """
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return tensor
    bits = _BITS[min(tensor.itemsize, 8)]
    units = tensor.itemsize // bits.itemsize
    size = [1 if step == 0 else length for length, step in zip(tensor.shape, tensor.stride(), strict=True)]
    stride = [step * units for step in tensor.stride()]
    over = torch.empty(0, dtype=bits, device=tensor.device)
    over.set_(tensor.untyped_storage(), tensor.storage_offset() * units, (*size, units), (*stride, 1))
    return flat_view(over)
