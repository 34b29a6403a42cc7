"""Inductor's `triton.enable_pdl`: kernels that start before those ahead of them have ended, on several streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opara_backend.report.record import collect
from opara_backend.scheduling.policies import policy_names

BRANCHES, STEPS = 6, 5


def model(x: Tensor) -> Tensor:
    """Branches of reductions, each of which needs all of the one before; kernels of many lengths."""
    found = []
    for branch in range(BRANCHES):
        y = x + branch
        for step in range(STEPS):
            y = (y * 1.01).softmax(-1) + y.mean(0, keepdim=True) * (1 + step)
        found.append(y[:, : 64 * (branch + 1)])
    return torch.cat(found, 1).sort(1).values


@pytest.mark.parametrize("policy", ["auto", *policy_names()])
def test_as_without(policy: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch came with Hopper")
    x = torch.randn(512, 512, device="cuda")
    with torch.inference_mode(), collect() as records:
        calls = [
            torch.compile(
                model, backend="opara", options={"policy": policy, "remember": False, "triton.enable_pdl": enabled}
            )
            for enabled in (False, True)
        ]
        expected = calls[0](x)
        calls[1](x)
        for step in range(50):
            torch.testing.assert_close(calls[1](x), expected, rtol=0, atol=0, msg=f"replay {step}")
    assert [record.replays for record in records] == [0, 50]
