"""`annotate=True` on a GPU: stages of the first call and replays carry names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opara_backend.report.record import collect


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x).relu() for branch in self.branches], 1)


def counted(options: dict[str, Any]) -> tuple[dict[str, int], str]:
    """How often scopes named after the graph were entered in four calls, and its name."""
    model, x = Branches().cuda().eval(), torch.randn(8, 64, device="cuda")
    compiled = torch.compile(model, backend="opara", options=options)
    with torch.inference_mode(), collect() as records, torch.profiler.profile() as profile:
        for _ in range(4):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
    (record,) = records
    assert [captured for _, captured in record.plans.values()] == [True]
    name = f"opara graph {record.compile_id}"
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
    return {n: events.count(n) for n in dict.fromkeys(events) if n.startswith(name)}, name


def test_stages_and_replays_are_named() -> None:
    found, name = counted({"annotate": True})
    assert found == {
        name: 4,
        f"{name}: first call": 1,
        f"{name}: profile": 1,
        f"{name}: capture": 1,
        f"{name}: replay": 3,
    }


def test_nothing_is_named_without() -> None:
    assert counted({})[0] == {}
