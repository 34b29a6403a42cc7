"""Small kernels joined into one launch: fewer launches, the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bench import models
from opara_backend.report.record import collect
from tests.rewrites import only

OPTIONS = only("join_small", remember=False)


class Lookups(nn.Module):
    """A row of each table, and what is made of it."""

    def __init__(self, tables: int, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, width + number % 3) for number in range(tables))

    def forward(self, ids: Tensor) -> Tensor:
        rows = [table(ids[:, number]) for number, table in enumerate(self.tables)]
        return torch.cat([row * (number + 1) for number, row in enumerate(rows)], 1)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("tables", [12, 26, 130])  # Inductor itself makes one kernel of few
def test_lookups_are_one_launch_or_few(tables: int, rows: int) -> None:
    model = Lookups(tables, 16).cuda()
    ids = torch.randint(50, (rows, tables), device="cuda")
    counts = {}
    for joined in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), collect() as records:
            call = torch.compile(model, backend="opara", fullgraph=True, options={**OPTIONS, "join_small": joined})
            for _ in range(3):
                assert torch.equal(call(ids), model(ids))
        (record,) = records
        assert (record.replays, record.fallbacks) == (2, [])
        counts[joined] = len(record.graph)
    assert counts[False] >= tables
    assert counts[True] <= 1 + tables // 50, "a kernel takes 250 arguments"


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["deepfm", "dlrm", "two_tower", "googlenet", "bilstm_tagger"])
def test_models(name: str, dtype: torch.dtype, batch: int) -> None:
    entry = models.get(name).reduced()
    model = entry.build().to("cuda", dtype).eval()
    inputs = tuple(x.to("cuda", dtype) if x.is_floating_point() else x.cuda() for x in entry.inputs(batch))
    twin = copy.deepcopy(model)
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options={**OPTIONS, "fuse_gemv": True})
        for _ in range(3):
            torch.testing.assert_close(call(*inputs), twin(*inputs), rtol=1e-2, atol=1e-2)
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])
