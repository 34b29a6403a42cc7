"""Functions of the generated module that Inductor calls like operators are one kernel each, and are captured.

With max_autotune_gemm it may split a matrix product along k that way; regions are the user's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opara_backend.report.record import collect

OPTIONS = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON", "remember": False}


@torch.compiler.nested_compile_region
def layer(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).relu() + x.sum(0)


def test_regions_are_captured() -> None:
    x, w = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda") / 8

    def model(x: Tensor) -> Tensor:
        return torch.cat([layer(layer(x + i, w), w) for i in range(3)], 1)

    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara", options={"remember": False})
        for step in range(4):
            given = x + step
            torch.testing.assert_close(call(given), model(given), rtol=1e-2, atol=1e-2)
    (record,) = records
    assert (record.replays, record.fallbacks) == (3, [])
    assert sum("subgraph" in kernel.call for kernel in record.graph.kernels) == 6


def test_a_product_along_a_long_k_is_captured() -> None:
    a, b, c = (torch.randn(*size, device="cuda", dtype=torch.half) / 64 for size in ((8, 8192), (8192, 8), (8192, 8)))

    def model(x: Tensor) -> Tensor:
        return torch.cat([(x @ b).relu(), (x @ c).tanh()], 1).softmax(1)

    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara", options=OPTIONS)
        for _ in range(3):
            torch.testing.assert_close(call(a), model(a), rtol=1e-2, atol=1e-3)
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])
    if not any(kernel.call.startswith("decompose_k") for kernel in record.graph.kernels):
        pytest.skip("Inductor found another kernel faster here")
