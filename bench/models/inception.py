"""Inception-v3 (Szegedy et al. 2015, "Rethinking the Inception architecture"), in torchvision's layout, no aux head.

Takes images ``(batch, 3, 299, 299)`` (75 pixels is the least it can halve so often), returns logits
``(batch, classes)``. Weights are drawn from the current generator: build it through ``build_seeded``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.seeding import preserve_variance

__all__ = ["Conv", "Inception3"]


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. ``kernel`` is (height, width) or the side of a square."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Branches(nn.Module):
    """Modules over one input, concatenated along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def average_then_conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), Conv(inputs, outputs, 1))


def inception_a(n: int, pool: int) -> nn.Module:
    """1x1, 5x5 and two 3x3 convolutions side by side, at 35x35."""
    return Branches(
        Conv(n, 64, 1),
        nn.Sequential(Conv(n, 48, 1), Conv(48, 64, 5)),
        nn.Sequential(Conv(n, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)),
        average_then_conv(n, pool),
    )


def inception_b(n: int) -> nn.Module:
    """From 35x35 to 17x17."""
    return Branches(
        Conv(n, 384, 3, 2, same=False),
        nn.Sequential(Conv(n, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, 2, same=False)),
        nn.MaxPool2d(3, stride=2),
    )


def inception_c(n: int, c: int) -> nn.Module:
    """7x7 convolutions split into rows and columns, at 17x17."""
    twice = nn.Sequential(
        Conv(n, c, 1), Conv(c, c, (7, 1)), Conv(c, c, (1, 7)), Conv(c, c, (7, 1)), Conv(c, 192, (1, 7))
    )
    once = nn.Sequential(Conv(n, c, 1), Conv(c, c, (1, 7)), Conv(c, 192, (7, 1)))
    return Branches(Conv(n, 192, 1), once, twice, average_then_conv(n, 192))


def inception_d(n: int) -> nn.Module:
    """From 17x17 to 8x8."""
    seven = nn.Sequential(Conv(n, 192, 1), Conv(192, 192, (1, 7)), Conv(192, 192, (7, 1)))
    return Branches(
        nn.Sequential(Conv(n, 192, 1), Conv(192, 320, 3, 2, same=False)),
        nn.Sequential(seven, Conv(192, 192, 3, 2, same=False)),
        nn.MaxPool2d(3, stride=2),
    )


def inception_e(n: int) -> nn.Module:
    """Branches that branch again, at 8x8."""

    def split() -> nn.Module:
        return Branches(Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1)))

    return Branches(
        Conv(n, 320, 1),
        nn.Sequential(Conv(n, 384, 1), split()),
        nn.Sequential(Conv(n, 448, 1), Conv(448, 384, 3), split()),
        average_then_conv(n, 192),
    )


class Inception3(nn.Module):
    """Inception-v3. ``pools`` and ``sevens`` hold one number per A and C block, ``tails`` counts the E blocks."""

    def __init__(
        self,
        classes: int = 1000,
        pools: tuple[int, ...] = (32, 64, 64),
        sevens: tuple[int, ...] = (128, 160, 160, 192),
        tails: int = 2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            Conv(3, 32, 3, 2, same=False), Conv(32, 32, 3, same=False), Conv(32, 64, 3), nn.MaxPool2d(3, 2),
            Conv(64, 80, 1), Conv(80, 192, 3, same=False), nn.MaxPool2d(3, 2),
        ]  # fmt: skip
        channels = 192
        for pool in pools:
            layers.append(inception_a(channels, pool))
            channels = 224 + pool
        layers.append(inception_b(channels))
        channels += 480
        layers += [inception_c(channels if i == 0 else 768, seven) for i, seven in enumerate(sevens)]
        layers.append(inception_d(768))
        layers += [inception_e(1280 if i == 0 else 2048) for i in range(tails)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, classes)
        preserve_variance(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
