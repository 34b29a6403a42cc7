"""Who owns what a captured graph returns."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.report.record import collect

LENT = {"copy_outputs": False}


def several(x: Tensor, y: Tensor) -> Any:
    a = x @ y
    return x, x.view(4, 16), y[2:4], a, a.t(), a[1], a, (a + 1).relu(), (a * 2).half()


def arguments(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(n)
    x, y = (torch.randn(8, 8, device="cuda", generator=generator) for _ in range(2))
    return x, y


def test_aliases_are_eagers() -> None:
    """Written through one output, seen through every alias of it: other outputs, or arguments."""
    with torch.no_grad(), collect() as records:
        call = torch.compile(several, backend="opara")
        for n in range(4):
            ours, theirs = arguments(n), arguments(n)
            actual, expected = call(*ours), several(*theirs)
            for tensors in (actual, expected):
                for position, tensor in enumerate(tensors):
                    tensor.mul_(position + 2)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert actual[0] is ours[0]
    assert records[0].replays == 3


def test_outputs_outlive_later_calls_and_the_model() -> None:
    def held() -> list[tuple[Any, Any]]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).cuda().eval()
        call = torch.compile(model, backend="opara")
        return [(call(x), model(x)) for x in (arguments(n)[0] for n in range(6))]

    with torch.no_grad():
        pairs = held()
        torch._dynamo.reset()
        gc.collect()
        trash = [torch.full((8, 8), 7.0, device="cuda") for _ in range(1000)]
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        del trash


def test_lent_outputs_are_right_until_the_next_call() -> None:
    with torch.no_grad(), collect() as records:
        call = torch.compile(several, backend="opara", options=LENT)
        for n in range(4):
            x, y = arguments(n)
            torch.testing.assert_close(call(x, y), several(x, y), rtol=1e-3, atol=1e-3)
    assert records[0].replays == 3


def test_a_lent_output_read_too_late_is_an_error_not_other_numbers() -> None:
    with torch.no_grad():
        call = torch.compile(lambda x, y: (x @ y).relu(), backend="opara", options=LENT)
        call(*arguments(0))  # a plain run: this output is the caller's
        early = call(*arguments(1))
        kept = early.clone()
        part = early[2:4]
        late = call(*arguments(2))
        for stale in (early, part):
            with pytest.raises(RuntimeError, match=r"overwritten by a later call.*copy_outputs"):
                stale.sum()
        torch.testing.assert_close(kept, (arguments(1)[0] @ arguments(1)[1]).relu())
        torch.testing.assert_close(late, (arguments(2)[0] @ arguments(2)[1]).relu())


def test_a_lent_output_after_the_model_is_gone_is_an_error() -> None:
    with torch.no_grad():
        call = torch.compile(lambda x, y: (x @ y).relu(), backend="opara", options=LENT)
        call(*arguments(0))
        early = call(*arguments(1))
        torch.testing.assert_close(early, (arguments(1)[0] @ arguments(1)[1]).relu())
        del call
        torch._dynamo.reset()
        gc.collect()
        with pytest.raises(RuntimeError, match="overwritten"):
            early.sum()


def test_another_models_call_ends_no_loan() -> None:
    with torch.no_grad():
        one = torch.compile(lambda x, y: (x @ y).relu(), backend="opara", options=LENT)
        two = torch.compile(lambda x, y: (x @ y).tanh() + 1, backend="opara", options=LENT)
        for n in range(4):
            x, y = arguments(n)
            first, second = one(x, y), two(x, y)
            torch.testing.assert_close(first, (x @ y).relu())
            torch.testing.assert_close(second, (x @ y).tanh() + 1)


def test_what_is_lent_ends_when_another_shape_is_captured() -> None:
    """All shapes of a graph share an arena, and a search replays in it."""

    def function(x: Tensor) -> Tensor:
        return torch.cat([(x @ x.t()).relu(), (x + 1) @ x.t()], 1)

    with torch.no_grad():
        call = torch.compile(function, backend="opara", dynamic=True, options=LENT)
        for _ in range(3):
            lent = call(torch.ones(8, 16, device="cuda"))
        for _ in range(2):
            call(torch.ones(12, 16, device="cuda"))
        with pytest.raises(RuntimeError, match="overwritten by a later call"):
            lent.sum()
