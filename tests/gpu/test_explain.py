"""`opara_backend.explain` on a GPU: what was captured, what was measured, and that nothing is left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import opara_backend
from opara_backend.__main__ import main
from opara_backend.demo.googlenet import googlenet
from opara_backend.report.matching import HANDOVER
from opara_backend.report.model import Report


@pytest.fixture(scope="module")
def report() -> Report:
    model = googlenet().cuda().half()
    return opara_backend.explain(model, torch.randn(1, 3, 224, 224, device="cuda", dtype=torch.float16))


def test_everything_is_measured(report: Report) -> None:
    (graph,) = report.graphs
    (shape,) = graph.shapes
    assert (shape.state, shape.estimated) == ("captured", False)
    assert graph.replays >= 1
    assert graph.hit_rate > 0.5
    assert graph.fallbacks == report.fallbacks == ()
    assert shape.bound is not None
    assert shape.bound.measured is not None
    assert len(shape.candidates) > 1
    assert sum(row.chosen for row in shape.candidates) == 1
    assert all(kernel.launches for kernel in shape.kernels)
    assert sum(kernel.module.startswith("features.") for kernel in shape.kernels) > len(shape.kernels) // 2
    stages = graph.stages
    assert min(stages.compile, stages.first_run, stages.profile, stages.capture, stages.search) > 0


def test_the_measured_timeline_keeps_the_order_of_the_schedule(report: Report) -> None:
    (shape,) = report.shapes()
    line = shape.timeline("measured")
    assert line is not None, shape.notes + report.notes
    assert len(line.spans) == len(shape.kernels)
    span = {s.kernel: s for s in line.spans}
    for wait in shape.waits:
        assert span[wait.awaited].end <= span[wait.kernel].start + HANDOVER
    assert len(line.ambiguous) < len(shape.kernels) // 4


def test_explaining_leaves_no_memory_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).cuda()
    x = torch.randn(8, 64, device="cuda")
    taken = []
    for _ in range(4):
        opara_backend.explain(model, x)
        gc.collect()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert taken[-1] <= taken[1]


def test_the_command_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    arguments = ["opara_backend.demo.googlenet:example", "--dtype", "float16", "--html", str(page)]
    assert main(["explain", *arguments]) == 0
    assert "measured" in capsys.readouterr().out
    assert "under the profiler" in page.read_text(encoding="utf-8")
