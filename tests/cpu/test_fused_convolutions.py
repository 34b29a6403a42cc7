"""Convolutions with what follows them as one kernel: the same sizes, strides and values, and which they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.convolutions import load
from bench.documents import RESULTS
from opara_backend.execution.libraries import has_fused_convolutions
from opara_backend.lowering import fused_convolutions
from opara_backend.lowering.fused_convolutions import adds_fast
from opara_backend.report.record import GraphRecord, collect
from tests.agreement import Agree

ON = {"fuse_convolutions": True}


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of few channels, with a residual too."""
    monkeypatch.setattr(fused_convolutions, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused_convolutions, "LONG", 0)


def calls(records: list[GraphRecord]) -> list[str]:
    """What is left of every library's kernel: `fused` or `alone`."""
    (record,) = records
    named = [kernel.call for kernel in record.graph.kernels if "convolution" in kernel.call and kernel.kind != "cpp"]
    return ["fused" if "convolution_relu" in call else "alone" for call in named]


def settled(norm: nn.Module) -> nn.Module:
    """A batch norm that has seen batches, with a scale and shift of its own."""
    for value in (*norm.parameters(), *norm.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
    return norm


class Layer(nn.Module):
    """convolution -> `between` -> ReLU -> convolution."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], **arguments: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 3, padding=1, **arguments), nn.Conv2d(6, 4, 1)
        self.norm, self.other = settled(nn.BatchNorm2d(6)), settled(nn.BatchNorm2d(6))
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.between = between.__get__(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)).relu())


def _normed(self: Any, y: Tensor) -> Tensor:
    return self.norm(y)


def _normed_twice(self: Any, y: Tensor) -> Tensor:
    return self.other(self.norm(y))


def _scaled(self: Any, y: Tensor) -> Tensor:
    return self.scale * y


def _shifted(self: Any, y: Tensor) -> Tensor:
    return self.scale + y


def _as_it_is(self: Any, y: Tensor) -> Tensor:
    return y


def _reversed(self: Any, y: Tensor) -> Tensor:
    return self.scale - y


def _rolled(self: Any, y: Tensor) -> Tensor:
    return y * torch.linspace(0, 1, y.shape[-1])


def _read_twice(self: Any, y: Tensor) -> Tensor:
    return self.norm(y) * y.mean()


def _bounded(self: Any, y: Tensor) -> Tensor:
    return self.norm(y).tanh()


FUSED = {
    "batch norm": (_normed, {"bias": False}),
    "batch norm and bias": (_normed, {}),
    "two batch norms": (_normed_twice, {"bias": False}),
    "bias": (_as_it_is, {}),
    "scale": (_scaled, {"bias": False}),
    "scale and bias": (_scaled, {}),
    "shift": (_shifted, {"bias": False}),
    "stride": (_normed, {"stride": 2}),
    "dilation": (_normed, {"dilation": 2}),
}
LEFT = {
    "nothing to add": (_as_it_is, {"bias": False}),
    "taken from something": (_reversed, {}),
    "of a column": (_rolled, {}),
    "read twice": (_read_twice, {}),
    "another function": (_bounded, {}),
    "groups": (_normed, {"groups": 2}),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", FUSED)
def test_what_follows_is_fused(case: str, last: bool, agree: Agree) -> None:
    between, arguments = FUSED[case]
    model, images = Layer(between, **arguments).eval(), torch.randn(3, 2, 4, 9, 7)
    if last:
        model, images = model.to(memory_format=torch.channels_last), images.transpose(2, 4).contiguous().transpose(2, 4)
    assert calls(agree(model, lambda call: (images[call],), options=ON)) == ["fused", "alone"]


@pytest.mark.parametrize("case", LEFT)
def test_others_stay(case: str, agree: Agree) -> None:
    between, arguments = LEFT[case]
    images = torch.randn(3, 2, 4, 9, 7)
    found = agree(Layer(between, **arguments).eval(), lambda call: (images[call],), options=ON)
    assert calls(found) == ["alone", "alone"]


class Residual(nn.Module):
    """Two convolutions and a sum with what went into them, as in a ResNet."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(settled(nn.BatchNorm2d(6)) for _ in range(3))
        self.project = nn.Conv2d(6, 6, 1, bias=False) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
        return (y + (x if self.project is None else self.norms[2](self.project(x)))).relu()


@pytest.mark.parametrize("projected", [False, True])
def test_a_sum_with_another_image_is_fused(projected: bool, agree: Agree) -> None:
    model, images = Residual(projected).eval(), torch.randn(3, 2, 6, 9, 7)
    found = agree(model, lambda call: (images[call],), options=ON)
    assert sorted(calls(found)) == (["alone"] if projected else []) + ["fused", "fused"]


@pytest.mark.parametrize(("long", "large", "expected"), [(9 * 6, 1 << 40, 2), (9 * 6 + 1, 1 << 40, 1), (99, 2, 2)])
def test_a_sum_that_cudnn_is_slow_at_stays(
    long: int, large: int, expected: int, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    """Of few products for each element, and few elements."""
    monkeypatch.setattr(fused_convolutions, "LONG", long)
    monkeypatch.setattr(fused_convolutions, "LARGE", large)
    images = torch.randn(3, 2, 6, 9, 7 + long - expected)  # of sizes that no cache knows from another case
    found = agree(Residual(False).eval(), lambda call: (images[call],), options=ON)
    assert sorted(calls(found)) == ["alone"] * (2 - expected) + ["fused"] * expected


def test_sums_are_left_where_an_h200_is_slow_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was measured: nearly all that fusing could gain is gained, and hardly any of what it can lose lost."""
    monkeypatch.undo()
    kept: dict[bool, list[float]] = {True: [], False: []}
    for row in load(RESULTS / "convolutions.json"):
        products, elements = row.channels * row.window**2, row.batch * row.filters * row.extent**2
        kept[adds_fast(getattr(torch, row.dtype), products, elements)].append(row.gained)
    assert len(kept[True]) > 50
    assert len(kept[False]) > 10
    possible = sum(max(0.0, gained) for gained in (*kept[True], *kept[False]))
    assert sum(kept[True]) > 0.9 * possible
    assert sum(kept[False]) < -0.3 * possible
    assert sum(gained for gained in kept[True] if gained < 0) > -0.05 * possible


def test_a_sum_with_itself_and_with_a_row_is_no_residual(agree: Agree) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor, row: Tensor) -> Tensor:
            y = self.layers[0](x)
            y = (y + y).relu()
            return self.layers[2]((self.layers[1](y) + row).relu())

    images = torch.randn(3, 2, 4, 5, 5)
    found = agree(Odd(), lambda call: (images[call], images[call, 0, 0, 0]), options=ON)
    assert calls(found) == ["alone"] * 3


def test_parts_of_a_concatenation_are_written_where_they_belong(agree: Agree) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(self.inner(x).relu()).relu(), self.right(x).relu()], 1)

    images = torch.randn(3, 2, 4, 9, 7)
    assert calls(agree(Branches(), lambda call: (images[call],), options=ON)) == ["fused", "alone", "alone"]


def test_weights_that_change_are_seen() -> None:
    model, x = Layer(_normed).eval(), torch.randn(2, 4, 9, 7)
    compiled = torch.compile(model, backend="opara", fullgraph=True, options=ON)
    with torch.no_grad():
        for call in range(3):
            model.norm.running_mean.fill_(float(call))
            model.norm.weight.fill_(1.0 + call)
            model.first.weight.mul_(1.0 + call)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_that_of_the_type(dtype: torch.dtype) -> None:
    """Off by as much as eager from the same in double precision, or less than twice as much."""
    model, x = Layer(_normed).eval(), torch.randn(2, 4, 9, 7, dtype=dtype)
    model = model.to(dtype)
    with torch.no_grad(), collect() as records:
        result = torch.compile(model, backend="opara", fullgraph=True, options=ON)(x)
        eager, exact = model(x), model.double()(x.double())
    assert calls(records) == ["fused", "alone"]
    assert (result.double() - exact).abs().max() < 2 * (eager.double() - exact).abs().max() + torch.finfo(dtype).eps


def test_sums_that_the_input_decides_stay(agree: Agree) -> None:
    """Scaled weights would wait for it, which else are made beside other kernels."""

    class Gated(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) * self.first(x.flip(2)).mean((0, 2, 3), keepdim=True)).relu())

    images = torch.randn(3, 2, 4, 9, 7)
    found = agree(Gated(_as_it_is, bias=False), lambda call: (images[call],), options=ON)
    assert "fused" not in calls(found)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_strides_are_those_of_the_sum(last: bool) -> None:
    """A residual of another memory format, named first, decides them, and views count on it."""
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def function(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = (residual + first(x)).relu()
        return second(y), y.as_strided((2, 4, 8, 6), y.stride())

    x, residual = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        residual = residual.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = torch.compile(function, backend="opara", options=ON)(x, residual)
        torch.testing.assert_close(found, function(x, residual), check_stride=True)


def test_a_bias_is_no_part_of_what_says_how_the_result_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Inductor adds it in a kernel of its own, which has no layout yet."""
    import torch._inductor.kernel.conv as lowering_of_convolutions
    from torch._inductor import ir

    class OnAGpu:
        """Inductor's IR, which tells nobody but the lowering of convolutions that tensors are on a GPU."""

        def __getattr__(self, name: str) -> Any:
            return (lambda _: "cuda") if name == "get_device_type" else getattr(ir, name)

    monkeypatch.setattr(lowering_of_convolutions, "ir", OnAGpu())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # else all is channels last
    model, x = Layer(_as_it_is).eval(), torch.randn(2, 4, 9, 7)
    with torch.no_grad(), collect() as records:
        found = torch.compile(model, backend="opara", dynamic=True, options=ON)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
    assert "fused" in calls(records)


def test_sizes_that_data_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # stock Inductor fails with it
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def function(x: Tensor, chosen: Tensor) -> Tensor:
        y = x[chosen.nonzero().flatten()]
        return second((first(y) + y.mean((2, 3), keepdim=True)).relu())

    x, chosen = torch.randn(5, 4, 8, 6), torch.tensor([1, 0, 1, 1, 0])
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(function, backend="opara", options=ON)(x, chosen)
        torch.testing.assert_close(found, function(x, chosen), rtol=1e-4, atol=1e-4)


def test_one_number_stands_for_both_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's operators, unlike torch's, read as many as there are axes."""
    found = []
    computed = fused_convolutions.convolution_relu

    def noted(x: Tensor, weight: Tensor, bias: Tensor, residual: Any, *settings: Any) -> Tensor:
        found.append([list(setting) for setting in settings[:3]])
        return computed(x, weight, bias, residual, *settings)

    monkeypatch.setattr(fused_convolutions, "convolution_relu", noted)
    first, last = nn.Conv2d(4, 6, 3, stride=(2,), padding=(1,)), nn.Conv2d(6, 4, 1)
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad():
        result = torch.compile(lambda x: last(first(x).relu()), backend="opara", options=ON)(x)
        torch.testing.assert_close(result, last(first(x).relu()), rtol=1e-4, atol=1e-4)
    assert found == [[[2, 2], [1, 1], [1, 1]]]


def test_settings_of_cudnn_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_fused_convolutions()
    with torch.backends.cudnn.flags(enabled=False):
        assert not has_fused_convolutions()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not has_fused_convolutions()


def test_dynamic_sizes(agree: Agree) -> None:
    """Of batches and of images: one graph for all."""
    images, model = torch.randn(4, 5, 4, 9, 7), Layer(_normed).eval()
    sized = [images[n, : 2 + n, :, : 6 + n].contiguous() for n in range(3)]
    found = agree(model, lambda call: (sized[call % 3],), calls=6, options=ON, dynamic=True)
    assert calls(found) == ["fused", "alone"]


def test_operations_are_those_of_the_convolution() -> None:
    found = []
    for options in ({}, ON):
        torch._dynamo.reset()
        with torch.no_grad(), collect() as records:
            torch.compile(Layer(_normed).eval(), backend="opara", options=options)(torch.randn(2, 4, 9, 7))
        found += [kernel.flops for kernel in records[0].graph.kernels if kernel.kind == "extern"][:1]
    assert found == [pytest.approx(2 * 6 * 4 * 9 * (2 * 9 * 7), rel=0.01)] * 2


PROCESS = """
import json, sys, torch
from opara_backend.lowering import fused_convolutions
from opara_backend.report.record import collect
from torch._dynamo.utils import counters

fused_convolutions.DEVICES = ("cpu",)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 1))
x = torch.ones(1, 4, 8, 8)
with torch.no_grad(), collect() as records:
    compiled = torch.compile(model, backend="opara", options={"fuse_convolutions": True})
    right = torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-4)
calls = [kernel.call for kernel in records[0].graph.kernels if "convolution_relu" in kernel.call]
print(json.dumps([right, len(calls), counters["inductor"]["fxgraph_cache_hit"]]))
"""


def test_a_module_out_of_a_cache_finds_the_operator(run_python: Callable[..., Any], tmp_path: Path) -> None:
    assert [run_python(PROCESS, cache=tmp_path) for _ in range(2)] == [[True, 1, 0], [True, 1, 1]]
