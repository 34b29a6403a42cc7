"""T5-small (Raffel et al. 2019), encoder and decoder in one forward: two stacks of small kernels, one after the other.

Takes encoder ids ``(batch, length)`` and decoder ids ``(batch, shorter length)``, returns the decoder's logits. As in
the original, projections have no biases, scores are not scaled, and positions enter as a bias on the scores, looked up
once per stack from the distance between tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.encoder import Attention
from bench.models.entry import BenchModel
from bench.models.seeding import build_seeded, integers

__all__ = ["MODELS", "T5"]


def distance_buckets(queries: int, keys: int, both_ways: bool, device: torch.device) -> Tensor:
    """T5's bucket of 32 for each query and key: exact for near keys, logarithmic up to 128 tokens apart."""
    distance = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]
    buckets = 16 if both_ways else 32
    offset = (distance > 0) * buckets if both_ways else torch.zeros_like(distance)
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=exact).float() / exact) / math.log(128 / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5Block(nn.Module):
    """Self-attention, attention over the encoder's output in decoders, a ReLU MLP; an RMS norm before each."""

    def __init__(self, width: int, heads: int, hidden: int, decoder: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, bias=False, scale=1.0)
        self.cross = Attention(width, heads, bias=False, scale=1.0) if decoder else None
        self.mlp = nn.Sequential(nn.Linear(width, hidden, False), nn.ReLU(), nn.Linear(hidden, width, False))
        self.norms = nn.ModuleList(nn.RMSNorm(width, 1e-6) for _ in range(3 if decoder else 2))

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None) -> Tensor:
        x = x + self.attention(self.norms[0](x), bias=bias)
        if self.cross is not None and memory is not None:
            x = x + self.cross(self.norms[1](x), memory)
        return x + self.mlp(self.norms[-1](x))


class T5Stack(nn.Module):
    """The encoder or the decoder; one table of relative position biases serves all its blocks."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.distances = nn.Embedding(32, heads)
        self.blocks = nn.ModuleList(T5Block(width, heads, hidden, decoder) for _ in range(layers))
        self.norm = nn.RMSNorm(width, 1e-6)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        buckets = distance_buckets(length, length, not self.decoder, x.device)
        bias = self.distances(buckets).permute(2, 0, 1).unsqueeze(0)
        if self.decoder:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, float("-inf"))
        for block in self.blocks:
            x = block(x, bias, memory)
        return self.norm(x)


class T5(nn.Module):
    """T5 with one embedding table for both inputs and, transposed, the output."""

    def __init__(
        self, layers: int = 6, width: int = 512, heads: int = 8, hidden: int = 2048, vocabulary: int = 32128
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.encoder = T5Stack(layers, width, heads, hidden, decoder=False)
        self.decoder = T5Stack(layers, width, heads, hidden, decoder=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):  # scores are not divided by the root of the head's width, so queries are
                nn.init.normal_(module.query.weight, std=(width * (width // heads)) ** -0.5)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory = self.encoder(self.tokens(input_ids))
        x = self.decoder(self.tokens(decoder_input_ids), memory)
        return F.linear(x * x.shape[-1] ** -0.5, self.tokens.weight)


def token_pair(batch: int, vocabulary: int, length: int, decoder_length: int) -> tuple[Tensor, ...]:
    return integers(vocabulary, batch, length), integers(vocabulary, batch, decoder_length, seed=1)


MODELS = (
    BenchModel(
        name="t5_small",
        build=lambda: build_seeded(T5),
        inputs=lambda batch: token_pair(batch, 32128, 128, 32),
        source="Raffel et al. 2019, Exploring the limits of transfer learning (T5-small, 128 + 32 tokens)",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: T5(layers=2, width=32, heads=4, hidden=64, vocabulary=100)),
        inputs_small=lambda batch: token_pair(batch, 100, 16, 8),
    ),
)
