"""What the programs under test are called with: other values in every call, the same ones for the same number.

Numbers are drawn on the CPU and moved to the default device, so that every device sees the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]


def normal(call: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(call), device="cpu")
    return drawn.to(torch.get_default_device())


def integers(call: int, high: int, *shape: int) -> Tensor:
    """Numbers from 0 to `high - 1`."""
    drawn = torch.randint(high, shape, generator=torch.Generator("cpu").manual_seed(call), device="cpu")
    return drawn.to(torch.get_default_device())


def one(*shape: int) -> Callable[[int], Args]:
    """One normal tensor."""
    return lambda call: (normal(call, *shape),)


def two(*shape: int) -> Callable[[int], Args]:
    """Two normal tensors."""
    return lambda call: (normal(call, *shape), normal(call + 100, *shape))


def rows_of(*sizes: int) -> Callable[[int], Args]:
    """A matrix of so many rows, by turns, and a square one; 8 columns each."""
    return lambda call: (normal(call, sizes[call % len(sizes)], 8), normal(call, 8, 8))
