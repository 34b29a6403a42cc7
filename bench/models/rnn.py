"""A bidirectional LSTM tagger, unrolled in Python: two long chains of small kernels that do not meet until the end.

Takes token ids ``(batch, length)``, returns tag logits ``(batch, length, tags)``. The length is part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.seeding import build_seeded, integers

__all__ = ["MODELS", "Tagger"]

VOCABULARY, LENGTH = 10_000, 32
SMALL_VOCABULARY, SMALL_LENGTH = 100, 6


class Tagger(nn.Module):
    """Embedding, one LSTM chain per direction, one linear layer over both."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 256, hidden: int = 256, tags: int = 48) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocabulary, width)
        self.forwards = nn.LSTMCell(width, hidden)
        self.backwards = nn.LSTMCell(width, hidden)
        self.classifier = nn.Linear(2 * hidden, tags)

    def chain(self, cell: nn.LSTMCell, words: Sequence[Tensor]) -> list[Tensor]:
        """The hidden state after each of ``words``."""
        hidden = words[0].new_zeros(words[0].shape[0], self.hidden)
        memory = hidden
        states: list[Tensor] = []
        for word in words:
            hidden, memory = cell(word, (hidden, memory))
            states.append(hidden)
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embedding(tokens).unbind(1)
        ahead = self.chain(self.forwards, words)
        back = self.chain(self.backwards, words[::-1])[::-1]
        return self.classifier(torch.cat([torch.stack(ahead, 1), torch.stack(back, 1)], 2))


MODELS = (
    BenchModel(
        name="bilstm_tagger",
        build=lambda: build_seeded(Tagger),
        inputs=lambda batch: (integers(VOCABULARY, batch, LENGTH),),
        source="Huang et al. 2015, Bidirectional LSTM-CRF models for sequence tagging (without the CRF)",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: Tagger(SMALL_VOCABULARY, width=16, hidden=16, tags=8)),
        inputs_small=lambda batch: (integers(SMALL_VOCABULARY, batch, SMALL_LENGTH),),
    ),
)
