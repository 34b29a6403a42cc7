"""Seeded weights and inputs that leave torch's global random state as they found it.

``build_seeded`` runs a constructor under a fork of the CPU generator; ``normal`` and ``integers`` draw inputs from
generators of their own. Inputs are CPU tensors; weights land on the default device, so that constructing under
``torch.device("meta")`` counts parameters without paying for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["build_seeded", "integers", "normal", "preserve_variance"]

M = TypeVar("M", bound=nn.Module)


def build_seeded(make: Callable[[], M], seed: int = 0) -> M:
    """``make()`` in eval mode, its weights drawn from ``seed`` and the global random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        return make().eval()


def preserve_variance(model: nn.Module, gain: float = 2.0**0.5) -> None:
    """Redraw convolutions and linear layers so that a layer's output varies ``gain**2 / 2`` as much as its input.

    Half of the variance is what ReLU drops, hence the default gain. Biases become zero; norms keep their ones.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain * fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal fp32 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 numbers from 0 to ``high - 1``."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
