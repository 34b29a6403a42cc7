"""Benchmarks of single layers: what they measure, and what they say where there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import convolutions, depthwise, documents, layers
from bench.convolutions import Timed
from bench.layers import Layer, Shape
from opara_backend import upstream
from opara_backend.lowering import depthwise as lowering
from opara_backend.report.record import collect


@pytest.mark.parametrize("module", [depthwise, convolutions])
def test_without_a_gpu_that_is_said(
    module: type, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main(["--out", str(tmp_path / "r.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_layer_is_timed_both_ways_and_without_what_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a shape that the rewrite leaves to cuDNN."""
    seconds = iter([7.0, 5.0, 1.0] * depthwise.ROUNDS)

    def timed(call: Callable[[], object]) -> float:
        call()
        return next(seconds)

    monkeypatch.setattr(lowering, "DEVICES", ("cpu",))
    monkeypatch.setattr(upstream, "will_prefer_channels_last", lambda graph: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where: module)
    monkeypatch.setattr(depthwise, "gpu_seconds", timed)
    made = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **where: made(*size))
    shape = Shape(16, 9, 7)
    assert not lowering.pays(torch.float32, 49, 16 * 81)
    with collect() as records:
        found = depthwise.measure(contextlib.nullcontext(), shape, "float32", 1)
    assert found == Layer(shape, "float32", 1, 6 / depthwise.LAYERS, 4 / depthwise.LAYERS)
    calls = [[k.call for k in r.graph.kernels if k.kind != "cpp" and "convolution" in k.call] for r in records]
    assert [len(of_graph) for of_graph in calls] == [depthwise.LAYERS + 2, 2, 2]


def test_the_table_says_both_times_and_what_they_are_of(tmp_path: Path) -> None:
    about = {"device": "D", "driver": "1", "torch": "2", "commit": "abc", "command": "python -m bench.depthwise"}
    shape = {"channels": 8, "extent": 4, "window": 3}
    rows = [
        {"shape": shape, "dtype": "float16", "batch": batch, "library": 4e-6, "written": 3e-6} for batch in (1, 8)
    ] + [{"shape": shape, "dtype": "float32", "batch": 1, "library": 2e-6, "written": 3e-6}]
    documents.write(tmp_path / "r.json", {"schema": 1, **about, "layers": rows})
    assert layers.markdown(tmp_path / "r.json").splitlines() == [
        "| depthwise layer | dtype | batch 1 | batch 8 |",
        "| --- | --- | --- | --- |",
        "| 3x3 of 8 channels, 4x4 | float16 | 4.0 / 3.0 (0.75x) | 4.0 / 3.0 (0.75x) |",
        "| 3x3 of 8 channels, 4x4 | float32 | 2.0 / 3.0 (1.50x) | - |",
        "",
        "Microseconds, cuDNN's and written out. D, driver 1, torch 2, commit abc: `python -m bench.depthwise`",
    ]


def test_what_adding_an_image_gains() -> None:
    """A kernel that takes 3 us less, 2 us that the convolution takes more."""
    row = Timed(64, 64, 1, 56, 1, "float32", alone=5e-6, relu=5.5e-6, added=7e-6, elementwise=3e-6)
    assert row.gained == pytest.approx(1e-6)
