"""Convolutions of patches as products on a GPU, in models that begin with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.gpu_rewrites import replayed
from tests.rewrites import only

OPTIONS = only("unfold_patches", remember=False)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sequence_of_patches(dtype: torch.dtype, images: int, last: bool) -> None:
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 96, 16, 16), nn.LayerNorm(96)
    model = nn.Sequential(layer, nn.Flatten(2), _Transposed(), norm).to("cuda", dtype).eval()
    x = torch.randn(images, 3, 64, 96, device="cuda", dtype=dtype)
    result, exact, record = replayed(model, x, last=last, options=OPTIONS)
    assert not any("convolution" in kernel.call and "extern" in kernel.call for kernel in record.graph.kernels)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance)


class _Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mT
