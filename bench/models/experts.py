"""The feed-forward parts of language models: Llama's gated MLP and a mixture of such experts.

Both take and return ``(..., width)``. Which experts the router picks changes weights, never shapes or kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Experts", "SwiGLU"]


class SwiGLU(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.down = nn.Linear(hidden, width, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture of experts that computes every expert and weighs it, so that no shape depends on the router."""

    def __init__(self, width: int, hidden: int, experts: int, top: int = 2) -> None:
        super().__init__()
        self.top = top
        self.router = nn.Linear(width, experts, False)
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best, chosen = logits.topk(self.top, -1)
        weights = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(-1))
        total = self.experts[0](x) * weights[..., 0:1]
        for number, expert in enumerate(self.experts[1:], start=1):
            total = total + expert(x) * weights[..., number : number + 1]
        return total
