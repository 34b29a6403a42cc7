"""A recommender in DLRM's shape: dozens of embedding lookups side by side, then small dense layers.

    python examples/recommender.py [--device cuda] [--small]

The kind of model that gains most: nothing in it is large, and most of it is independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shared import check, describe, parser, report, warm_up
from torch import Tensor, nn

from opara_backend.report.record import collect


class Recommender(nn.Module):
    """Scores a click from `fields` categorical features and 13 numbers."""

    def __init__(self, fields: int, rows: int, width: int, hidden: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(fields))
        self.numbers = nn.Sequential(nn.Linear(13, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.head = nn.Sequential(nn.Linear((fields + 1) ** 2 + width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        dense = self.numbers(numbers)
        vectors = [dense, *(table(column) for table, column in zip(self.tables, ids.unbind(1), strict=True))]
        stacked = torch.stack(vectors, 1)
        pairs = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)
        return self.head(torch.cat([dense, pairs], 1)).sigmoid().squeeze(1)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=16)
    chosen = arguments.parse_args(argv)
    fields, rows, width, hidden = (4, 100, 8, 16) if chosen.small else (26, 10_000, 16, 512)
    torch.manual_seed(0)
    model = Recommender(fields, rows, width, hidden).to(chosen.device).eval()
    ids = torch.randint(rows, (chosen.batch, fields), device=chosen.device)
    numbers = torch.randn(chosen.batch, 13, device=chosen.device)
    fast = torch.compile(model, backend="opara")
    with torch.inference_mode(), collect() as records:
        warm_up(lambda: fast(ids, numbers), chosen.device)
        scores = fast(ids, numbers)
        check(scores, model(ids, numbers), "scores")
        print("the three best of the batch:", scores.topk(3).indices.tolist())
        report({"eager": lambda: model(ids, numbers), "opara": lambda: fast(ids, numbers)}, chosen.calls, chosen.device)
    describe(records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
