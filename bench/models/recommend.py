"""Recommenders: many embedding lookups side by side, then small dense layers. Nothing in them is large.

Ids are int64, one column per field; scores are logits of shape ``(batch,)``. Each field has an embedding table and a
lookup of its own, as the classical formulations have it, so the graphs open with dozens of independent kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.seeding import build_seeded, integers, normal, preserve_variance

__all__ = ["DLRM", "MODELS", "DeepFM", "TwoTower"]

SPARSE, DENSE, VOCABULARY = 26, 13, 10_000  # the fields of the Criteo data set; a table size common after hashing


def embedding(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=width**-0.5)
    return table


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with a ReLU after each but the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    result = nn.Sequential(*layers[:-1])
    preserve_variance(result)
    return result


class DeepFM(nn.Module):
    """A linear term, pairwise interactions and an MLP over the same embeddings, summed."""

    def __init__(self, sparse: int = SPARSE, vocabulary: int = VOCABULARY, width: int = 16, hidden: int = 400) -> None:
        super().__init__()
        self.first_order = nn.ModuleList(embedding(vocabulary, 1) for _ in range(sparse))
        self.embeddings = nn.ModuleList(embedding(vocabulary, width) for _ in range(sparse))
        self.linear = nn.Linear(DENSE, 1)
        self.deep = mlp((sparse * width + DENSE, hidden, hidden, hidden, 1))

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        columns = sparse.unbind(1)
        linear = torch.cat([table(ids) for table, ids in zip(self.first_order, columns, strict=True)], 1)
        vectors = [table(ids) for table, ids in zip(self.embeddings, columns, strict=True)]
        stacked = torch.stack(vectors, 1)
        pairs = 0.5 * (stacked.sum(1).square() - stacked.square().sum(1)).sum(1)
        deep = self.deep(torch.cat([*vectors, dense], 1)).squeeze(1)
        return linear.sum(1) + self.linear(dense).squeeze(1) + pairs + deep


class DLRM(nn.Module):
    """A bottom MLP for the dense features, dot products of all pairs of vectors, a top MLP over those."""

    pairs: Tensor

    def __init__(self, sparse: int = SPARSE, vocabulary: int = VOCABULARY, width: int = 16, hidden: int = 512) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(embedding(vocabulary, width) for _ in range(sparse))
        self.bottom = mlp((DENSE, hidden, hidden // 2, hidden // 8, width))
        vectors = sparse + 1
        self.register_buffer("pairs", torch.tensor([i * vectors + j for i in range(vectors) for j in range(i)]))
        self.top = mlp((width + vectors * (vectors - 1) // 2, hidden, hidden // 2, 1))

    def forward(self, sparse: Tensor, dense: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        looked_up = [table(ids) for table, ids in zip(self.embeddings, sparse.unbind(1), strict=True)]
        stacked = torch.stack([bottom, *looked_up], 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([bottom, products], 1)).squeeze(1)


class Tower(nn.Module):
    """Embeddings of some fields and a few dense features, through an MLP to a vector of length one."""

    def __init__(self, fields: int, dense: int, vocabulary: int, width: int, hidden: int, history: bool) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(embedding(vocabulary, width) for _ in range(fields))
        self.history = embedding(vocabulary, width) if history else None
        self.layers = mlp(((fields + history) * width + dense, hidden, hidden // 2, hidden // 4))

    def forward(self, ids: Tensor, dense: Tensor, visited: Tensor | None = None) -> Tensor:
        parts = [table(column) for table, column in zip(self.embeddings, ids.unbind(1), strict=True)]
        if self.history is not None and visited is not None:
            parts.append(self.history(visited).mean(1))
        return nn.functional.normalize(self.layers(torch.cat([*parts, dense], 1)), dim=1)


class TwoTower(nn.Module):
    """A user tower, which also averages the items visited before, and an item tower; their dot product."""

    USER, ITEM, DENSE, HISTORY = 8, 6, 16, 50

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 32, hidden: int = 512) -> None:
        super().__init__()
        self.user = Tower(self.USER, self.DENSE, vocabulary, width, hidden, history=True)
        self.item = Tower(self.ITEM, self.DENSE, vocabulary, width, hidden, history=False)

    def forward(self, user: Tensor, user_dense: Tensor, visited: Tensor, item: Tensor, item_dense: Tensor) -> Tensor:
        return (self.user(user, user_dense, visited) * self.item(item, item_dense)).sum(1)


def criteo(batch: int, sparse: int = SPARSE, vocabulary: int = VOCABULARY) -> tuple[Tensor, ...]:
    return integers(vocabulary, batch, sparse), normal(batch, DENSE, seed=1)


def visits(batch: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, ...]:
    return (
        integers(vocabulary, batch, TwoTower.USER, seed=0),
        normal(batch, TwoTower.DENSE, seed=1),
        integers(vocabulary, batch, TwoTower.HISTORY, seed=2),
        integers(vocabulary, batch, TwoTower.ITEM, seed=3),
        normal(batch, TwoTower.DENSE, seed=4),
    )


MODELS = (
    BenchModel(
        name="deepfm",
        build=lambda: build_seeded(DeepFM),
        inputs=criteo,
        source="Guo et al. 2017, DeepFM: a factorization-machine based neural network for CTR prediction",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: DeepFM(sparse=6, vocabulary=100, width=4, hidden=16)),
        inputs_small=lambda batch: criteo(batch, sparse=6, vocabulary=100),
    ),
    BenchModel(
        name="dlrm",
        build=lambda: build_seeded(DLRM),
        inputs=criteo,
        source="Naumov et al. 2019, Deep learning recommendation model (Criteo Kaggle sizes, hashed tables)",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: DLRM(sparse=6, vocabulary=100, width=4, hidden=32)),
        inputs_small=lambda batch: criteo(batch, sparse=6, vocabulary=100),
    ),
    BenchModel(
        name="two_tower",
        build=lambda: build_seeded(TwoTower),
        inputs=visits,
        source="Yi et al. 2019, Sampling-bias-corrected neural modeling for large corpus item recommendations",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: TwoTower(vocabulary=100, width=4, hidden=32)),
        inputs_small=lambda batch: visits(batch, vocabulary=100),
    ),
)
