"""Depthwise convolutions as elementwise kernels: the same sizes, strides and values, and which they are."""

from __future__ import annotations

import copy
import math
from statistics import geometric_mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.documents import RESULTS
from bench.layers import load
from opara_backend import upstream
from opara_backend.lowering import depthwise
from opara_backend.report.record import collect
from tests.agreement import Agree, agreement

ON = {"fuse_depthwise": True}
Pair = tuple[int, int]


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as if Inductor laid out images channels last there, which it does where it has oneDNN's convolutions."""
    monkeypatch.setattr(depthwise, "DEVICES", ("cpu",))
    monkeypatch.setattr(upstream, "will_prefer_channels_last", lambda graph: True)
    monkeypatch.setattr(upstream, "prefers_channels_last", lambda: True)
    monkeypatch.setattr(depthwise, "SMALL", 0)


class Followed(nn.Module):
    """A convolution, and what reads its result: by strides, as a view, by many reads of each element, as a matrix."""

    def __init__(self, kind: type[nn.Module], **arguments: Any) -> None:
        super().__init__()
        self.layer = kind(**{"in_channels": 6, "out_channels": 6, "groups": 6, **arguments})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x * 2)
        rows = y.flatten(1)
        return y, y.flatten(2).mT.relu(), y.relu().mean(-1), rows @ rows.mT


FUSED: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "padded": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (2, 6, 9, 7)),
    "not padded": (nn.Conv2d, {"kernel_size": 3}, (2, 6, 9, 7)),
    "padded unevenly": (nn.Conv2d, {"kernel_size": (3, 5), "padding": (0, 2)}, (2, 6, 9, 7)),
    "no bias": (nn.Conv2d, {"kernel_size": 5, "padding": 2, "bias": False}, (2, 6, 9, 7)),
    "strided": (nn.Conv2d, {"kernel_size": 3, "stride": (2, 3), "padding": 1}, (2, 6, 9, 8)),
    "dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 1)}, (2, 6, 9, 7)),
    "one number for both axes": (nn.Conv2d, {"kernel_size": 3, "padding": (1,), "stride": (2,)}, (2, 6, 9, 7)),
    "padded widely": (nn.Conv2d, {"kernel_size": 2, "padding": 4}, (2, 6, 3, 3)),
    "seven by seven": (nn.Conv2d, {"kernel_size": 7, "padding": 3}, (2, 6, 14, 14)),
    "of a point": (nn.Conv2d, {"kernel_size": 1}, (2, 6, 5, 4)),
}
LEFT: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "wide groups": (nn.Conv2d, {"kernel_size": 3, "groups": 3}, (2, 6, 9, 7)),
    "one group": (nn.Conv2d, {"kernel_size": 3, "groups": 1}, (2, 6, 9, 7)),
    "one channel": (nn.Conv2d, {"kernel_size": 3, "in_channels": 1, "out_channels": 1, "groups": 1}, (2, 1, 9, 7)),
    "several filters a channel": (nn.Conv2d, {"kernel_size": 3, "out_channels": 12}, (2, 6, 9, 7)),
    "a large window": (nn.Conv2d, {"kernel_size": 8}, (1, 6, 9, 8)),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3}, (2, 6, 5, 5)),
    "one dimension": (nn.Conv1d, {"kernel_size": 4, "padding": 3}, (2, 6, 20)),
    "three dimensions": (nn.Conv3d, {"kernel_size": 2}, (2, 6, 4, 4, 4)),
    "double precision": (nn.Conv2d, {"kernel_size": 3, "dtype": torch.float64}, (2, 6, 9, 7)),
}


def libraries(records: list[Any]) -> int:
    (record,) = records
    return sum("convolution" in kernel.call and kernel.kind != "cpp" for kernel in record.graph.kernels)


def images(shape: tuple[int, ...], last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Three inputs of one shape."""
    made = torch.randn(3, *shape, dtype=dtype)
    return made.transpose(2, -1).contiguous().transpose(2, -1) if last else made


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", FUSED)
def test_sums_are_written_out(case: str, last: bool, agree: Agree) -> None:
    kind, arguments, shape = FUSED[case]
    inputs = images(shape, last)
    assert libraries(agree(Followed(kind, **arguments), lambda call: (inputs[call],), options=ON)) == 0


@pytest.mark.parametrize("case", LEFT)
def test_others_stay(case: str, agree: Agree) -> None:
    kind, arguments, shape = LEFT[case]
    inputs = images(shape, False, arguments.get("dtype", torch.float32))
    assert libraries(agree(Followed(kind, **arguments), lambda call: (inputs[call],), options=ON)) == 1


def test_images_of_dynamic_sizes_are_left(agree: Agree) -> None:
    """Inductor does not lay them out channels last."""
    layers = [nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)]
    model = nn.Sequential(*layers)
    inputs = [torch.randn(n, 6, 9 + n, 12) for n in (2, 3, 4)]
    assert libraries(agree(model, lambda call: (inputs[call % 3],), calls=6, options=ON, dynamic=True)) == 3


def test_filters_may_change() -> None:
    """They are laid out anew at every call."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(6, 6, 3, groups=6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).relu()

    model, x = Moving(), torch.randn(1, 6, 5, 5)
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", options=ON)
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x))
            model.layer.weight.mul_(-2)
    assert libraries(records) == 0


@given(
    extents=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_any_window(extents: Pair, window: Pair, stride: Pair, padding: Pair, dilation: Pair, bias: bool) -> None:
    reach = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
    height, width = (max(p, (r - e + 1) // 2) for p, r, e in zip(padding, reach, extents, strict=True))
    kept = {"stride": stride, "padding": (height, width), "dilation": dilation, "bias": bias}
    inputs = images((2, 6, *extents), False)
    model, agree = Followed(nn.Conv2d, kernel_size=window, **kept), agreement(captured=False)
    torch._dynamo.reset()
    assert libraries(agree(model, lambda call: (inputs[call],), options=ON)) == 0


def test_images_that_are_not_laid_out_channels_last_are_left(monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    monkeypatch.setattr(upstream, "will_prefer_channels_last", lambda graph: False)
    inputs = images((2, 6, 11, 5), False)  # of sizes that no cache knows from another test
    found = agree(Followed(nn.Conv2d, kernel_size=3, padding=1), lambda call: (inputs[call],), options=ON)
    assert libraries(found) == 1
    assert found[0].rewrites == ()


def test_convolutions_stay_where_images_come_to_lie_otherwise(monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    """Than they would have by the graph that was rewritten: a pass of the user's may come in between."""
    monkeypatch.setattr(upstream, "prefers_channels_last", lambda: False)
    model, inputs = Followed(nn.Conv2d, kernel_size=3, padding=1), images((2, 6, 11, 6), False)
    assert libraries(agree(model, lambda call: (inputs[call],), options=ON)) == 1


def test_cudnn_keeps_what_an_h200_is_faster_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was measured: nearly all that writing out could gain is gained, and far less lost."""
    monkeypatch.undo()
    _, rows = load(RESULTS / "depthwise.json")
    gained: dict[bool, list[float]] = {True: [], False: []}
    ratios = []
    for row in rows:
        elements = row.batch * row.shape.channels * row.shape.extent**2
        written = depthwise.pays(getattr(torch, row.dtype), row.shape.window**2, elements)
        gained[written].append(math.log(row.library / row.written))
        ratios.append((row.dtype, row.batch, row.ratio if written else 1.0))
    assert len(gained[True]) > 50
    assert len(gained[False]) > 5
    possible = sum(max(0.0, gain) for gains in gained.values() for gain in gains)
    assert sum(gained[True]) > 0.9 * possible
    assert sum(gain for gain in gained[True] if gain < 0) > -0.05 * possible
    assert sum(gained[False]) < 0
    for dtype in ("float16", "float32"):
        for batch in (1, 8, 32):
            of_batch = [ratio for kind, count, ratio in ratios if (kind, count) == (dtype, batch)]
            assert geometric_mean(of_batch) < (0.5 if batch == 1 and dtype == "float16" else 0.92)


def test_sums_are_rounded_once() -> None:
    """To a type of few digits, between two layers in one kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Conv2d(8, 8, 3, groups=8)).to(torch.bfloat16)
    x = torch.randn(2, 8, 12, 12, dtype=torch.bfloat16)
    between = copy.deepcopy(model[0]).double()(x.double()).bfloat16()
    with torch.no_grad(), collect() as records:
        found = torch.compile(model, backend="opara", options=ON)(x)
        expected = copy.deepcopy(model[1]).double()(between.double()).bfloat16()
    assert libraries(records) == 0
    off_by_one = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, expected, rtol=off_by_one, atol=off_by_one)
