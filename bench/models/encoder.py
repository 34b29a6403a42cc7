"""Transformer encoders: BERT-base and ViT-B/16. Separate query, key and value projections are what runs side by side.

BERT takes token ids ``(batch, length)`` and returns hidden states and the pooled vector; ViT takes images
``(batch, 3, size, size)`` and returns logits. ``Attention`` serves T5 as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.seeding import build_seeded, integers
from bench.models.vision import images

__all__ = ["BERT", "MODELS", "Attention", "ViT"]


class Attention(nn.Module):
    """Multi-head attention of ``x`` over ``memory`` (itself unless given), with an optional additive bias."""

    def __init__(self, width: int, heads: int, bias: bool = True, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.query, self.key = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.value, self.out = nn.Linear(width, width, bias), nn.Linear(width, width, bias)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.split(self.query(x)), self.split(self.key(memory)), self.split(self.value(memory))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a GELU MLP; norms before each (ViT) or after each (BERT)."""

    def __init__(self, width: int, heads: int, pre_norm: bool, eps: float) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class BERT(nn.Module):
    """BERT without a task head: token, position and segment embeddings, encoder, pooler."""

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 30522, positions: int = 512
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, 1e-12)
        self.layers = nn.Sequential(*(Block(width, heads, pre_norm=False, eps=1e-12) for _ in range(layers)))
        self.pooler = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places) + self.segments(torch.zeros_like(ids))
        x = self.layers(self.norm(x))
        return x, torch.tanh(self.pooler(x[:, 0]))


class ViT(nn.Module):
    """Vision transformer: patches, a class token, learned positions, encoder, classifier."""

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, size: int = 224, patch: int = 16, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(Block(width, heads, pre_norm=True, eps=1e-6) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])


MODELS = (
    BenchModel(
        name="bert_base",
        build=lambda: build_seeded(BERT),
        inputs=lambda batch: (integers(30522, batch, 128),),
        source="Devlin et al. 2018, BERT: pre-training of deep bidirectional transformers (base, 128 tokens)",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: BERT(layers=2, width=32, heads=4, vocabulary=100, positions=16)),
        inputs_small=lambda batch: (integers(100, batch, 16),),
    ),
    BenchModel(
        name="vit_b16",
        build=lambda: build_seeded(ViT),
        inputs=images(224),
        source="Dosovitskiy et al. 2020, An image is worth 16x16 words (ViT-B/16)",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: ViT(layers=2, width=32, heads=4, size=32, patch=8, classes=10)),
        inputs_small=images(32),
    ),
)
