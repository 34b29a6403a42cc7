"""State that a program writes, kept while it is run and replayed to find out how fast it is.

Takes: the tensors it writes in place. Gives: a block behind which they, and random numbers, are what they were.
Must not change: anything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from opara_backend.kernel_graph import RANDOM_STATE, KernelGraph

STATE_ON_DEVICE = 16 << 20  # bytes of state kept on the device while it is searched; more goes to the host


@contextlib.contextmanager
def state_kept(tensors: Sequence[torch.Tensor], graph: KernelGraph) -> Iterator[None]:
    """Put back what the block writes: `tensors`, and the generator if the graph draws random numbers.

    A cache of keys and values may be most of what the device holds: large state is kept on the host meanwhile.
    """
    device = torch.device(graph.device)
    large = sum(t.numel() * t.itemsize for t in tensors) > STATE_ON_DEVICE
    copies = [t.to("cpu", copy=True) if large else t.clone() for t in tensors]
    state = torch.cuda.get_rng_state(device) if any(RANDOM_STATE in k.writes for k in graph.kernels) else None
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
        if state is not None:
            torch.cuda.set_rng_state(state, device)
