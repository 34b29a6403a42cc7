"""Lowerings of one graph timed against each other on a GPU: the same results, side effects once, the fastest kept."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import models
from opara_backend.report.record import GraphRecord, collect

OPTIONS = {"try_rewrites": True, "remember": False}


class Counting(nn.Module):
    """A convolution with batch norm and ReLU, a row's product, a counter, and an argument that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3))
        self.head = nn.Linear(8, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, sums: Tensor) -> Tensor:
        self.calls.add_(1)
        result: Tensor = self.head(self.layers(x).mean((2, 3))) + self.calls
        sums.add_(result.mean())
        return result


def check_kept(record: GraphRecord, among: int) -> None:
    """So many lowerings were timed, and the one kept is no slower than the first."""
    ((key, timed),) = record.lowerings.items()
    assert len(timed) == among
    assert timed[0].rewrites == ()
    kept = next(one for one in timed if one.rewrites == record.rewritten[key])
    assert kept.seconds <= timed[0].seconds


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_whatever_is_kept_does_the_same_and_side_effects_happen_once(dtype: torch.dtype) -> None:
    model, x = Counting().to("cuda", dtype).eval(), torch.randn(1, 8, 20, 20, device="cuda", dtype=dtype)
    twin, sums, expected_sums = copy.deepcopy(model), *torch.zeros(2, 3, device="cuda", dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options=OPTIONS)
        for _ in range(4):
            torch.testing.assert_close(call(x, sums), twin(x, expected_sums), **tolerance)
    torch.testing.assert_close(sums, expected_sums, **tolerance)
    assert model.calls == twin.calls == 4
    (record,) = records
    assert (record.replays, record.fallbacks) == (3, [])
    check_kept(record, among=5)  # with none, all three that find something, and each of these left out


def test_one_whose_weights_overflow_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)).cuda()
    model.half().eval()
    model[1].running_var.fill_(1e-4)
    model[1].weight.data.fill_(1e4)
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    x = torch.randn(1, 8, 20, 20, device="cuda", dtype=torch.float16) * 1e-5
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options=OPTIONS)
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=2e-2, atol=0.5)  # of about 80
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])
    assert "its results differ" in caplog.text
    assert "fuse_convolutions" not in record.rewritten[()]


@pytest.mark.parametrize("name", ["googlenet", "deepfm", "moe_decode"])
def test_models(name: str) -> None:
    entry = models.get(name).reduced()
    model = entry.build().to("cuda", torch.float16).eval()
    inputs = tuple(x.to("cuda", torch.float16) if x.is_floating_point() else x.cuda() for x in entry.inputs(1))
    twin = copy.deepcopy(model)
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options=OPTIONS)
        for _ in range(3):
            torch.testing.assert_close(call(*inputs), twin(*inputs), rtol=2e-2, atol=2e-2)
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])
    assert record.lowerings


def test_dynamic_shapes_choose_for_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).cuda().eval()
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", dynamic=True, fullgraph=True, options=OPTIONS)
        for images in (2, 3, 2, 3, 2, 3):
            x = torch.randn(images, 8, 20, 12, device="cuda")
            torch.testing.assert_close(call(x), model(x), rtol=5e-3, atol=5e-3)
    (record,) = records
    assert record.fallbacks == []
    assert len(record.lowerings) == 2


SCRIPT = """
import json
import torch
from torch import nn
from opara_backend.report.record import collect

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)).cuda().eval()
x = torch.randn(1, 8, 20, 20, device="cuda")
with torch.inference_mode(), collect() as records:
    call = torch.compile(model, backend="opara", options={"try_rewrites": True})
    agree = all(torch.allclose(call(x), model(x), rtol=5e-3, atol=5e-3) for _ in range(3))
(record,) = records
print(json.dumps({
    "agree": agree, "timed": [[t.rewrites, t.seconds] for t in record.lowerings[()]], "search": record.stages.search,
    "kept": record.rewritten[()], "remembered": len(record.remembered), "replays": record.replays,
}))
"""


def test_the_next_process_knows_which(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first["agree"]
    assert second["agree"]
    assert (first["replays"], second["replays"]) == (2, 2)
    assert (first["kept"], first["timed"]) == (second["kept"], second["timed"])
    assert (first["remembered"], second["remembered"]) == (0, 1)
    assert second["search"] == 0
