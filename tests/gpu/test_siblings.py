"""Products and convolutions of one input as one, on a GPU: fewer calls, the same results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.models.encoder import Block
from bench.models.inception import Branches, Conv
from opara_backend.report.record import GraphRecord
from tests.gpu_rewrites import replayed
from tests.rewrites import only

OPTIONS = only("merge_convolutions", "merge_products", remember=False)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 5e-3}  # float32 in tf32, as in eager


def calls(record: GraphRecord, *names: str) -> int:
    """Kernels that call one of the library functions named."""
    return sum(kernel.call.rpartition(".")[2] in names for kernel in record.graph.kernels)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["bert", "vit"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_query_key_and_value(dtype: torch.dtype, pre_norm: bool) -> None:
    model = Block(256, 4, pre_norm=pre_norm, eps=1e-6).to("cuda", dtype).eval()
    x = torch.randn(1, 128, 256, device="cuda", dtype=dtype)
    result, exact, record = replayed(model, x, last=False, options=OPTIONS)
    assert calls(record, "mm", "addmm") == 4, [kernel.call for kernel in record.graph.kernels]
    torch.testing.assert_close(result, exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_branches(dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(0)
    branches = Branches(Conv(32, 16, 1), nn.Sequential(Conv(32, 24, 1), Conv(24, 32, 3)), nn.Sequential(Conv(32, 8, 1)))
    model = nn.Sequential(Conv(3, 32, 3), branches, nn.Conv2d(56, 8, 1)).to("cuda", dtype).eval()
    x = torch.randn(2, 3, 40, 40, device="cuda", dtype=dtype)
    result, exact, record = replayed(model, x, last=last, options=OPTIONS)
    convolutions = sum("convolution" in kernel.call and kernel.kind != "triton" for kernel in record.graph.kernels)
    assert convolutions == 4, [kernel.call for kernel in record.graph.kernels]
    torch.testing.assert_close(result, exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
