"""What schedules are compared by is the GPU's time."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from opara_backend.execution.cuda_graph import CapturedGraph
from opara_backend.report.record import collect


def test_a_slow_host_changes_no_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small kernels take some 15 microseconds, and each launch of their graph is made to take 200."""
    branches = nn.ModuleList(nn.Linear(64, 64) for _ in range(4)).cuda().eval()
    x = torch.randn(8, 64, device="cuda")

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([branch(x).relu() for branch in branches]).sum(0)

    replay = CapturedGraph.replay

    def slow(self: CapturedGraph, stream: torch.cuda.Stream | None = None) -> None:
        until = time.perf_counter() + 200e-6
        while time.perf_counter() < until:
            pass
        replay(self, stream)

    monkeypatch.setattr(CapturedGraph, "replay", slow)
    with torch.no_grad(), collect() as records:
        torch.compile(model, backend="opara", options={"remember": False})(x)
    (record,) = records
    (tried,) = record.candidates.values()
    assert len(tried) > 1
    assert max(seconds for _, seconds in tried) < 150e-6
