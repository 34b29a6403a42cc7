"""A fake implementation that is wrong about strides is an error, as under stock Inductor, and no wrong number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opara_backend.report.record import collect
from tests.arguments import normal


@torch.library.custom_op("opara_tests::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.t().clone(memory_format=torch.preserve_format)


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1])  # contiguous, it says


@torch.library.custom_op("opara_tests::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :2].clone(), x[:, 2:].t().clone(memory_format=torch.preserve_format).t().t()


@halves.register_fake
def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], 2), x.new_empty(x.shape[1] - 2, x.shape[0])


@torch.library.custom_op("opara_tests::right", mutates_args=())
def right(x: Tensor) -> Tensor:
    return x.t().contiguous()


@right.register_fake
def _right(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1])


PROGRAMS: dict[str, Any] = {
    "one result": lambda x: turned(x) + torch.arange(4.0 * x.shape[0]).view(4, -1).sin(),
    "several results": lambda x: halves(x)[1] + 1,
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["inductor", "opara"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_strides_are_an_error(name: str, backend: str, dynamic: bool | None) -> None:
    with torch.no_grad(), pytest.raises(AssertionError, match="stride"):
        torch.compile(PROGRAMS[name], backend=backend, dynamic=dynamic)(normal(0, 3, 4))


@pytest.mark.parametrize("asserts", [True, False])
def test_what_is_right_is_checked_and_scheduled(asserts: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cat([right(x) @ x, right(x + 1) @ x], 1).softmax(1)

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", options={"size_asserts": asserts})
        for n in range(3):
            x = normal(n, 3, 4)
            torch.testing.assert_close(call(x), function(x), rtol=1e-4, atol=1e-4)
    (record,) = records
    assert (record.graph.segments, record.fallbacks) == ((0,), [])


def test_a_user_may_switch_it_off() -> None:
    with torch.no_grad():
        torch.compile(PROGRAMS["one result"], backend="opara", options={"size_asserts": False})(normal(0, 3, 4))
