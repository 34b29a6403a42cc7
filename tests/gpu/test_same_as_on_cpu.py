"""The programs of tests/cpu, on the GPU: the same agreement with eager, call after call, with every graph captured.

Where a program makes the host wait for the GPU in its middle, no graph can hold it, and the next rung of the ladder has
to give eager's result: those programs are listed with the step they take.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from opara_backend.fallback import FallbackReason
from opara_backend.report.record import collect
from tests.agreement import Agree, agreement
from tests.cpu.test_calling import (  # noqa: F401
    test_grad_mode_back_and_forth,
    test_grad_mode_with_nothing_to_differentiate,
    test_gradients_flow_to_an_input,
    test_inference_mode,
    test_training_goes_to_stock_inductor_and_is_counted,
)
from tests.cpu.test_interplay import *  # noqa: F403
from tests.cpu.test_parameters import *  # noqa: F403
from tests.cpu.test_programs import *  # noqa: F403
from tests.cpu.test_side_effects import *  # noqa: F403

del test_numbers_among_the_arguments_become_symbols  # noqa: F821  no number comes twice: nothing to capture
del test_order_of_random_draws_is_eagers  # noqa: F821  a GPU's are Inductor's: see below
del test_uninitialised_memory_is_filled_in_place  # noqa: F821  likewise
del test_second_size_makes_shapes_dynamic  # noqa: F821  on a GPU Inductor guards on more of a size; see test_shapes

STEPS_DOWN = {
    "test_pure_function[linear_algebra]": FallbackReason.CAPTURE_FAILED,  # LAPACK's verdict is read by the host
    "test_pure_function[reductions]": FallbackReason.CAPTURE_FAILED,  # histc looks for the range on the host
    "test_sizes_only_the_data_knows": FallbackReason.HOST_DECISION,
    "test_cond": FallbackReason.HOST_DECISION,
    "test_while_loop": FallbackReason.HOST_DECISION,
    "test_item": FallbackReason.HOST_DECISION,
    "test_item_as_a_size": FallbackReason.HOST_DECISION,
}


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    """Tensors are made on the GPU unless they say otherwise, and numbers are not rounded more than on the CPU."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Agree:
    """As in tests/cpu, but every planned graph must have been captured."""
    step = STEPS_DOWN.get(request.node.name)
    return agreement(captured=True, allowed=() if step is None else (step,))


def test_with_fallback_random_numbers_are_those_of_stock_inductor() -> None:
    """Call after call, also by replay: the same operators draw the same numbers from one generator in one order."""

    def draw(x: Tensor) -> tuple[Tensor, ...]:
        a = torch.rand_like(x) @ x
        b = torch.randn(8, 8, device=x.device) + x
        c = torch.bernoulli(x.sigmoid()) @ b
        filled = torch.empty(4, device=x.device).exponential_()
        return a, b, c, filled, x.softmax(1).multinomial(2), torch.randperm(6, device=x.device)

    def drawn(backend: str) -> list[tuple[Tensor, ...]]:
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(fallback_random=True):
            call = torch.compile(draw, backend=backend)
            call(x)
            torch.manual_seed(3)
            return [call(x) for _ in range(4)]

    x = torch.randn(8, 8, device="cuda")
    with collect() as records:
        ours = drawn("opara")
    assert records[0].replays == 4
    torch.testing.assert_close(ours, drawn("inductor"), rtol=1e-4, atol=1e-4)
