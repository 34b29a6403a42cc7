"""Convolutions of cuDNN fill buffers of the plan, whatever their arguments; the results are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.report.record import collect
from tests.rewrites import only

CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "strided and padded": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "uneven": (nn.Conv2d, {"kernel_size": (1, 7), "padding": (0, 3), "stride": (2, 1)}),
    "padding same": (nn.Conv2d, {"kernel_size": 4, "padding": "same"}),
    "reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": 2}),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 4}),
    "by channel": (nn.Conv2d, {"kernel_size": 3, "groups": 16, "padding": 1}),
    "no bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}),
    "one dimension": (nn.Conv1d, {"kernel_size": 3}),
    "three dimensions": (nn.Conv3d, {"kernel_size": 3, "padding": 1}),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2}),
}
SIZES = {nn.Conv1d: (64,), nn.Conv2d: (12, 12), nn.ConvTranspose2d: (12, 12), nn.Conv3d: (6, 6, 6)}


class Branches(nn.Module):
    """Two convolutions of one input, joined."""

    def __init__(self, kind: type[nn.Module], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.left, self.right = (kind(16, 16, **arguments) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x).relu(), self.right(x).tanh()], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.preserve_format], ids=["contiguous", "channels last"]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_arguments(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    kind, arguments = CONVOLUTIONS[name]
    model = Branches(kind, arguments).to("cuda", dtype).eval()
    given = [torch.randn(2, 16, *SIZES[kind], device="cuda", dtype=dtype) for _ in range(3)]
    if layout is torch.preserve_format and len(SIZES[kind]) == 2:
        model = model.to(memory_format=torch.channels_last)
        given = [x.to(memory_format=torch.channels_last) for x in given]
    tolerance = {torch.float16: 5e-3, torch.float32: 2e-3, torch.float64: 1e-9}[dtype]
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options={"remember": False})
        for x in given:
            torch.testing.assert_close(call(x), model(x), rtol=tolerance, atol=tolerance)
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])


def test_outputs_are_planned_and_written_over() -> None:
    """Nothing is left for a convolution to allocate, so a chain of them needs memory for a few outputs, not for all.

    On one stream: with several, weights are laid out for cuDNN side by side, before they are needed.
    """
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.ReLU()) for _ in range(12)))
    model = model.to("cuda", torch.float16).eval()
    x = torch.randn(1, 64, 32, 32, device="cuda", dtype=torch.float16)
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options=only(policy="sequential", remember=False))
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=5e-3, atol=5e-3)
    (record,) = records
    ((plan, captured),) = record.plans.values()
    assert captured
    kernels = [k for k in record.graph.kernels if "convolution" in k.call and k.kind != "triton"]
    written = {n for k in kernels for n in k.writes}
    assert len(written) == 12
    assert written <= {buffer.name for buffer in record.graph.buffers if buffer.planned}
    assert plan.memory.requested_bytes > 4 * plan.memory.arena_bytes


@pytest.mark.parametrize("setting", ["benchmark", "deterministic"])
def test_cudnns_settings(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, setting, True)
    model = Branches(*CONVOLUTIONS["strided and padded"]).cuda().eval()
    x = torch.randn(2, 16, 12, 12, device="cuda")
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options={"remember": False})
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=2e-3, atol=2e-3)
    assert records[0].replays == 2


def test_tf32_as_eager_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Conv2d(256, 64, 3, bias=False).cuda().eval()
    x = torch.randn(1, 256, 16, 16, device="cuda")
    with torch.no_grad():
        for allowed in (False, True):
            torch._dynamo.reset()
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
            call = torch.compile(model, backend="opara", fullgraph=True, options={"remember": False})
            exact = nn.functional.conv2d(x.double(), model.weight.double())
            errors = [float((call(x) - exact).norm() / exact.norm()) for _ in range(3)]
            assert all((error > 5e-5) == allowed for error in errors), errors
