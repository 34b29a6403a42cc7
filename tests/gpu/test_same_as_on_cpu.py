"""The programs of tests/cpu, on the GPU: the same agreement with eager, call after call, with every graph captured.

Where a program makes the host wait for the GPU in its middle, no graph can hold it, and the next rung of the ladder has
to give eager's result: those programs are listed with the step they take.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opara_backend.fallback import FallbackReason
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

STEPS_DOWN = {
    "test_pure_function[linear_algebra]": FallbackReason.CAPTURE_FAILED,  # LAPACK's verdict is read by the host
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
    torch._dynamo.utils.counters.clear()
    with torch.device("cuda"):
        yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Agree:
    """As in tests/cpu, but every planned graph must have been captured."""
    step = STEPS_DOWN.get(request.node.name)
    return agreement(captured=True, allowed=() if step is None else (step,))
