"""One decoding step of two language models with a static key-value cache: a dense one and a mixture of experts.

Both take token ids ``(batch, 1)`` and a position ``(1,)`` on the model's device and return logits
``(batch, vocabulary)``. A step writes its keys and values into the cache, module buffers, in place at the position and
attends to the cache up to it; the rest of the cache holds seeded noise in place of a prompt. The same arguments
overwrite the same slots, so a step can be repeated and gives the same logits each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.experts import Experts, SwiGLU
from bench.models.seeding import build_seeded, integers

__all__ = ["MODELS", "Decoder"]

MAX_BATCH = 32
"""How many sequences the cache holds; smaller batches use the first ones."""


class Rotary(nn.Module):
    """Tables of the rotary embedding; a step picks its row."""

    cos: Tensor
    sin: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        frequencies = 10_000.0 ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos.index_select(0, position), self.sin.index_select(0, position)


class Step(NamedTuple):
    """What all layers of one decoding step share."""

    cos: Tensor
    sin: Tensor
    slots: Tensor
    """The row of the cache that each sequence writes."""
    seen: Tensor
    """Which positions of the cache attention may read."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class CachedAttention(nn.Module):
    """Grouped-query attention of one new token per sequence over the cache.

    A row of the cache is a slot: sequence ``i`` at position ``p`` owns row ``i * length + p``. Writing rows of the
    whole buffer lets Inductor write in place; given writes to a slice it would copy the slice.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, width: int, heads: int, kv_heads: int, length: int) -> None:
        super().__init__()
        self.kv_heads, self.head_width, self.length = kv_heads, width // heads, length
        self.query, self.out = nn.Linear(width, width, False), nn.Linear(width, width, False)
        self.key = nn.Linear(width, kv_heads * self.head_width, False)
        self.value = nn.Linear(width, kv_heads * self.head_width, False)
        cache = (MAX_BATCH * length, kv_heads, self.head_width)
        self.register_buffer("keys", torch.randn(cache))
        self.register_buffer("values", torch.randn(cache))

    def cached(self, cache: Tensor, batch: int) -> Tensor:
        """The slots of the first ``batch`` sequences as ``(batch, kv_heads, length, head_width)``."""
        return cache[: batch * self.length].unflatten(0, (batch, self.length)).transpose(1, 2)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        batch = x.shape[0]
        q = rotate(self.query(x).view(batch, self.kv_heads, -1, self.head_width), step.cos, step.sin)
        k = rotate(self.key(x).view(batch, self.kv_heads, self.head_width), step.cos, step.sin)
        self.keys.index_copy_(0, step.slots, k)
        self.values.index_copy_(0, step.slots, self.value(x).view(batch, self.kv_heads, self.head_width))
        keys, values = self.cached(self.keys, batch), self.cached(self.values, batch)
        # The query heads of one group stand where a longer step's tokens would: they share keys, values and mask.
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=step.seen)
        return self.out(mixed.reshape(batch, 1, -1))


class Layer(nn.Module):
    """Attention and a dense MLP or experts, each after an RMS norm and beside a shortcut."""

    def __init__(self, attention: CachedAttention, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.attention(self.norm1(x), step)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A decoder-only language model; ``experts`` of 0 gives dense layers."""

    def __init__(
        self, layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, length: int,
        experts: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length = length
        self.tokens = nn.Embedding(vocabulary, width)
        self.rotary = Rotary(length, width // heads)
        self.layers = nn.ModuleList(
            Layer(
                CachedAttention(width, heads, kv_heads, length),
                Experts(width, hidden, experts) if experts else SwiGLU(width, hidden),
                width,
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, 1e-5)
        self.head = nn.Linear(width, vocabulary, False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.tokens(ids)
        cos, sin = self.rotary(position)
        slots = torch.arange(ids.shape[0], device=ids.device) * self.length + position
        seen = (torch.arange(self.length, device=ids.device) <= position).view(1, 1, 1, -1)
        step = Step(cos, sin, slots, seen)
        for layer in self.layers:
            x = layer(x, step)
        return self.head(self.norm(x))[:, 0]


def arguments(batch: int, vocabulary: int, position: int) -> tuple[Tensor, ...]:
    if batch > MAX_BATCH:
        raise ValueError(f"batch {batch} does not fit the static cache, which holds {MAX_BATCH} sequences")
    return integers(vocabulary, batch, 1), torch.tensor([position], device="cpu")


def llama() -> Decoder:
    return Decoder(layers=8, width=2048, heads=32, kv_heads=4, hidden=5632, vocabulary=32000, length=512)


def mixture() -> Decoder:
    return Decoder(layers=4, width=1024, heads=16, kv_heads=4, hidden=1792, vocabulary=32000, length=512, experts=8)


def small(experts: int) -> Decoder:
    return Decoder(layers=2, width=32, heads=4, kv_heads=2, hidden=64, vocabulary=100, length=16, experts=experts)


MODELS = (
    BenchModel(
        name="llama_decode",
        build=lambda: build_seeded(llama),
        inputs=lambda batch: arguments(batch, 32000, 384),
        source="Touvron et al. 2023, Llama 2, in the widths of TinyLlama 1.1B (Zhang et al. 2024), 8 of its layers",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: small(experts=0)),
        inputs_small=lambda batch: arguments(batch, 100, 9),
    ),
    BenchModel(
        name="moe_decode",
        build=lambda: build_seeded(mixture),
        inputs=lambda batch: arguments(batch, 32000, 384),
        source="Jiang et al. 2024, Mixtral of experts, a quarter of its width, 4 layers, every expert computed",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: small(experts=4)),
        inputs_small=lambda batch: arguments(batch, 100, 9),
    ),
)
