"""Convolutions with what follows them as one kernel of cuDNN's, on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from opara_backend.execution.libraries import convolution_relu
from tests.gpu_rewrites import at_sizes, replayed
from tests.rewrites import only

OPTIONS = only("fuse_convolutions", remember=False)
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 5e-3}  # float32 in tf32, as in eager


class Block(nn.Module):
    """A bottleneck of a ResNet, its first convolution of an image of three channels, as every network's first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in (1, 3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(4))
        self.last = nn.Conv2d(channels, 8, 1)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = y = torch.nn.functional.max_pool2d(self.norms[3](self.stem(x)).relu(), 3, 2, 1)
        for layer, norm in zip(self.layers[:2], self.norms[:2], strict=True):
            y = norm(layer(y)).relu()
        return self.last((self.norms[2](self.layers[2](y)) + x).relu())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("channels", "images"), [(64, 1), (64, 5), (17, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bottleneck(dtype: torch.dtype, channels: int, images: int, last: bool) -> None:
    torch.manual_seed(0)
    model, x = Block(channels).to("cuda", dtype).eval(), torch.randn(images, 3, 64, 96, device="cuda", dtype=dtype)
    result, exact, record = replayed(model, x, last=last, options=OPTIONS)
    fused = 3 if dtype is torch.float32 else 4  # few products are summed, to which cuDNN is slow at adding an image
    assert sum("convolution_relu" in k.call and k.kind == "extern" for k in record.graph.kernels) == fused
    torch.testing.assert_close(result, exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_bias_and_dynamic_sizes() -> None:
    """Inductor then neither lays all out channels last nor leaves the bias to cuDNN."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).cuda().eval()
    record = at_sizes(model, OPTIONS, TOLERANCE[torch.float32])
    assert sum("convolution_relu" in kernel.call for kernel in record.graph.kernels) == 1


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cudnn_has_a_kernel_for_the_shapes_of_networks(
    dtype: torch.dtype, summed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing in the memory it writes to, not even what is no number, finds its way into the result."""
    for channels, filters, window, extent in ((192, 96, 1, 28), (96, 208, 3, 14), (64, 64, 3, 56), (3, 64, 7, 224)):
        x, weight, bias, residual = (
            torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=form)
            for shape, form in (
                ((1, channels, extent, extent), torch.channels_last),
                ((filters, channels, window, window), torch.channels_last),
                ((filters,), torch.contiguous_format),
                ((1, filters, extent, extent), torch.channels_last),
            )
        )
        settings = ([1, 1], [window // 2] * 2, [1, 1], 1)
        freed = torch.full_like(residual, torch.nan)
        del freed  # the allocator hands this memory out next
        with caplog.at_level(logging.WARNING):
            found = convolution_relu(x, weight, bias, residual if summed else None, *settings)
        exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=window // 2)
        exact = (exact + residual.double()).relu() if summed else exact.relu()
        scale = (channels * window * window) ** 0.5
        torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=TOLERANCE[dtype] * scale)
    assert caplog.records == []


def test_without_cudnn_it_is_computed_in_parts() -> None:
    x, weight, bias = (torch.randn(n, device="cuda") for n in ((1, 4, 8, 8), (6, 4, 3, 3), (6,)))
    with torch.backends.cudnn.flags(enabled=False):
        found = convolution_relu(x, weight, bias, None, [1, 1], [1, 1], [1, 1], 1)
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
