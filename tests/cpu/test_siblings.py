"""Products and convolutions of one input as one: which they are, and that values and gradients of nothing change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opara_backend.lowering import siblings
from opara_backend.report.record import collect

ON = {"merge_products": True, "merge_convolutions": True}
MANY = siblings.ROWS


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "DEVICES", ("cpu",))


def calls(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> int:
    """Calls of libraries in the only graph, whose results are checked, twice."""
    torch._dynamo.reset()
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, dynamic=dynamic, options=ON)
        for _ in range(2):
            torch.testing.assert_close(call(*inputs), model(*inputs), rtol=1e-4, atol=1e-4, check_stride=True)
    (record,) = records
    return sum(kernel.kind != "cpp" for kernel in record.graph.kernels)


class Layers(nn.Module):
    """What `combine` makes of several layers of one input."""

    def __init__(self, layers: Sequence[nn.Module], combine: Callable[..., Any] = torch.cat, **more: Any) -> None:
        super().__init__()
        self.layers, self.combine, self.more = nn.ModuleList(layers), combine, more

    def forward(self, x: Tensor) -> Any:
        return self.combine([layer(x) for layer in self.layers], **self.more)


def used(results: list[Tensor]) -> Tensor:
    """Everything, each in a way of its own."""
    found = torch.zeros(())
    for number, result in enumerate(results):
        found = found + (result * (number + 1)).cos().sum() + result[:1].exp().mean()
    return found


class Attention(nn.Module):
    """Query, key and value, of which the last is narrower and without a bias; views as models write them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.heads, self.out = heads, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(found.transpose(1, 2).reshape(n, length, width))


def test_query_key_and_value() -> None:
    with_sdpa = calls(Attention(32, 4), torch.randn(2, MANY, 32))
    assert with_sdpa == 3, "a product, attention, a product"


def test_gate_and_up() -> None:
    layers = Layers([nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)], lambda r: r[0].sigmoid() * r[1])
    assert calls(layers, torch.randn(MANY, 16)) == 1


def test_branches_of_an_image() -> None:
    branches = [nn.Conv2d(8, width, 1) for width in (4, 6, 3)]
    layers = Layers([nn.Sequential(b, nn.BatchNorm2d(b.out_channels), nn.ReLU()) for b in branches], dim=1).eval()
    image = torch.randn(1, 8, 9, 9)
    assert calls(layers, image) == 1
    assert calls(layers, image.contiguous(memory_format=torch.channels_last)) == 1


def test_only_those_with_the_same_window_and_steps() -> None:
    kinds = [(1, 1, 0), (1, 1, 0), (3, 1, 1), (3, 1, 1), (3, 2, 1), (5, 1, 2)]
    layers = [nn.Conv2d(4, 4, window, stride, padding) for window, stride, padding in kinds]
    assert calls(Layers(layers, used), torch.randn(1, 4, 20, 20)) == 4


@pytest.mark.parametrize("rows", [2, MANY - 1, MANY])
def test_few_rows_are_left_alone(rows: int) -> None:
    layers = Layers([nn.Linear(16, 8) for _ in range(3)], used)
    assert calls(layers, torch.randn(rows, 16)) == (1 if rows == MANY else 3)


def test_large_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers([nn.Linear(16, 7) for _ in range(3)], used)  # nobody else's, or Inductor's cache has it merged
    monkeypatch.setattr(siblings, "LARGEST", 3 * 16 * 7 * 4 - 1)
    assert calls(layers, torch.randn(MANY, 16)) == 3


def test_other_inputs_and_dynamic_rows_are_left_alone() -> None:
    layers = [nn.Linear(16, 8) for _ in range(2)]

    def function(x: Tensor) -> Tensor:
        return layers[0](x) + layers[1](x.cos())

    assert calls(function, torch.randn(MANY, 16)) == 2
    assert calls(Layers(layers, used), torch.randn(MANY, 16), dynamic=True) == 2


def test_weights_that_are_computed_from_inputs_are_left_alone() -> None:
    def function(x: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return used([x @ one, x @ other])

    assert calls(function, torch.randn(MANY, 16), torch.randn(16, 8), torch.randn(16, 8)) == 2


def test_what_is_an_output_or_read_by_a_convolution_is_left_alone() -> None:
    """It must lie in one piece."""
    assert calls(Layers([nn.Linear(16, 8) for _ in range(2)], list), torch.randn(MANY, 16)) == 2
    chains = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)]
    assert calls(Layers(chains, used), torch.randn(1, 4, 9, 9)) == 4


def test_new_weights_are_seen() -> None:
    layers = Layers([nn.Linear(16, 8) for _ in range(3)], used)
    x = torch.randn(MANY, 16)
    with torch.no_grad():
        call = torch.compile(layers, backend="opara", fullgraph=True, options=ON)
        for _ in range(3):
            torch.testing.assert_close(call(x), layers(x), rtol=1e-4, atol=1e-3)
            for layer in layers.layers:
                layer.weight.add_(1)  # type: ignore[operator, union-attr]
                layer.bias.mul_(2)  # type: ignore[operator, union-attr]


def test_weights_may_be_computed_from_parameters_late() -> None:
    """What a later sibling needs comes before the first one then."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16))
            self.scale = nn.Parameter(torch.rand(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            first = (x @ self.one).cos()
            return first * (x @ (self.two * self.scale.exp()).t()).sin()

    assert calls(Late(), torch.randn(MANY, 16)) == 1


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=2, max_size=4), st.data())
def test_any_family(members: list[tuple[int, bool, bool]], data: st.DataObject) -> None:
    """Of any widths, with and without biases, weights laid out either way."""

    class Family(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(
                torch.randn(12, n) if flat else torch.randn(n, 12) for n, _, flat in members
            )
            self.biases = nn.ParameterList(torch.randn(n) for n, _, _ in members)

        def forward(self, x: Tensor) -> Tensor:
            results = []
            for (_, biased, flat), weight, bias in zip(members, self.weights, self.biases, strict=True):
                matrix = weight if flat else weight.t()
                results.append(torch.addmm(bias, x, matrix) if biased else x @ matrix)
            return used(results)

    rows = data.draw(st.integers(MANY, 2 * MANY))
    assert calls(Family(), torch.randn(rows, 12)) == 1
