"""compute-sanitizer finds nothing in a small model's captured graph: kernels of Triton, cuBLAS and cuDNN."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torch import nn
from opara_backend.report.record import collect

torch.manual_seed(0)
convolutions = nn.ModuleList(nn.Conv2d(8, 8, size, padding="same") for size in (1, 3, 5)).cuda()
rows = nn.Linear(64, 64).cuda()

def model(x):
    return torch.cat([rows(c(x)).relu() for c in convolutions], 1).softmax(1)

x = torch.randn(2, 8, 16, 64, device="cuda")
with torch.inference_mode(), collect() as records:
    call = torch.compile(model, backend="opara", options={"policy": "opara", "remember": False})
    for _ in range(3):
        assert torch.allclose(call(x), model(x), rtol=1e-2, atol=1e-3)
(record,) = records
((plan, captured),) = record.plans.values()
assert captured and plan.schedule.streams > 1 and record.replays == 2, record
print("done")
"""


# A call that fails and is dealt with is no error: cuda-bindings, at its first use, asks for functions of later drivers.
OPTIONS = {"memcheck": ("--report-api-errors", "no")}


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it is part of the CUDA toolkit")
    done = subprocess.run(
        [sanitizer, "--tool", tool, *OPTIONS.get(tool, ()), "--error-exitcode", "7", sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "done" in done.stdout
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-2000:]
