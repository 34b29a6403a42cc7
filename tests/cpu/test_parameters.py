"""Parameters change between calls: the next call uses the new values, captured again where an address changed.

Everything is made on the default device, so that tests/gpu can run the same on the GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from opara_backend.report.record import collect


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.register_buffer("scale", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.up(self.down(x))) * self.scale


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in Adapted().state_dict().items()}


def load(model: nn.Module, seed: int) -> None:
    model.load_state_dict(state(seed))


def assign(model: nn.Module, seed: int) -> None:
    model.load_state_dict(state(seed), assign=True)


def replace_data(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = state(seed)[name]


def swap_adapter(model: nn.Module, seed: int) -> None:
    """As adapters are swapped while serving: other tensors behind the same parameters, by turns."""
    model.up.weight.data = model.pool[seed % 2]  # type: ignore[index]


def new_parameter(model: nn.Module, seed: int) -> None:
    model.up.weight = nn.Parameter(state(seed)["up.weight"])


def in_place(model: nn.Module, seed: int) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.01).add_(seed * 0.01)


@pytest.mark.parametrize("change", [load, assign, replace_data, swap_adapter, new_parameter, in_place])
def test_the_next_call_uses_the_new_values(change: Callable[[nn.Module, int], None]) -> None:
    ours = Adapted().eval()
    ours.pool = [torch.randn(32, 4) for _ in range(2)]  # type: ignore[assignment]
    twin = copy.deepcopy(ours)
    x = torch.randn(4, 32)
    with torch.no_grad(), collect() as records:
        call = torch.compile(ours, backend="opara")
        for seed in range(6):
            change(ours, seed)
            change(twin, seed)
            for _ in range(2):
                torch.testing.assert_close(call(x), twin(x), rtol=1e-3, atol=1e-3)
    assert all(r.plans and not r.fallbacks for r in records)


@pytest.mark.parametrize("dtype", [torch.half, torch.double], ids=str)
def test_the_whole_model_changes_its_type(dtype: torch.dtype) -> None:
    model = Adapted().eval()
    x = torch.randn(4, 32)
    with torch.no_grad():
        call = torch.compile(model, backend="opara")
        for given in (x, x, x.to(dtype), x.to(dtype)):
            model.to(given.dtype)
            torch.testing.assert_close(call(given), model(given), rtol=1e-2, atol=1e-2)


def test_parameters_given_with_the_call() -> None:
    model = Adapted().eval()
    x = torch.randn(4, 32)

    def function(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,))

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara")
        for seed in range(4):
            given = state(seed)
            torch.testing.assert_close(call(given, x), function(given, x), rtol=1e-3, atol=1e-3)
    assert len(records) == 1
    assert records[0].plans
