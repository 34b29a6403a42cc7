"""Depthwise convolutions as elementwise kernels on a GPU, in blocks of networks that are made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu6

from tests.gpu_rewrites import at_sizes, replayed
from tests.rewrites import only

OPTIONS = only("fuse_depthwise", remember=False)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 5e-3}  # float32 in tf32, as in eager


class Block(nn.Module):
    """Wide, depthwise, narrow, and a sum with what went in, as in MobileNetV2; the first convolution is dense."""

    def __init__(self, channels: int, window: int, stride: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.widen, self.narrow = nn.Conv2d(channels, wide, 1, bias=False), nn.Conv2d(wide, channels, 1, bias=False)
        self.depthwise = nn.Conv2d(wide, wide, window, stride, window // 2, groups=wide, bias=False)
        self.skip = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in (wide, wide, channels))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = relu6(self.norms[1](self.depthwise(relu6(self.norms[0](self.widen(x))))))
        return self.skip(x) + self.norms[2](self.narrow(y))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("channels", "window", "stride", "images"), [(24, 3, 1, 1), (16, 5, 2, 3), (7, 7, 1, 9)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_block(dtype: torch.dtype, channels: int, window: int, stride: int, images: int, last: bool) -> None:
    torch.manual_seed(0)
    model = Block(channels, window, stride).to("cuda", dtype).eval()
    x = torch.randn(images, 3, 32, 48, device="cuda", dtype=dtype)
    result, exact, record = replayed(model, x, last=last, options=OPTIONS)
    assert sum("convolution" in kernel.call and kernel.kind == "extern" for kernel in record.graph.kernels) == 3
    torch.testing.assert_close(result, exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_dynamic_sizes_are_left_to_cudnn() -> None:
    """Inductor does not lay out images channels last there, and then cuDNN is faster."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1)).cuda().eval()
    record = at_sizes(model, OPTIONS, TOLERANCE[torch.float32])
    assert sum("convolution" in kernel.call and kernel.kind == "extern" for kernel in record.graph.kernels) == 2
