"""NASNet-A Large (Zoph et al. 2017, "Learning transferable architectures"): the model with the most branches here.

A cell reads the outputs of the two cells before it, combines them by up to ten branches of separable convolutions and
pools, and concatenates. Normal cells keep the image size, reduction cells halve it; the first normal cell after a
reduction halves its older input to match. The layout is that of TensorFlow's slim ``nasnet_large``, without the aux
head and drop path. One deviation: strided layers pad both sides alike where TensorFlow pads even sizes on one side
only; shapes, kernels and parameters are the same.

Takes images ``(batch, 3, 331, 331)``, returns logits ``(batch, classes)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.seeding import build_seeded, preserve_variance
from bench.models.vision import images

__all__ = ["MODELS", "NASNet"]


def norm(channels: int, gain: float = 1.0) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=0.001)
    nn.init.constant_(layer.weight, gain)
    return layer


class Fit(nn.Sequential):
    """ReLU, 1x1 convolution, norm: an older output brought to a cell's width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), norm(outputs))


class FitHalved(nn.Module):
    """Like ``Fit`` at half the image size: one path takes the even pixels, one the odd ones."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.norm = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        even = self.even(F.avg_pool2d(x, 1, stride=2))
        odd = self.odd(F.avg_pool2d(F.pad(x, (-1, 1, -1, 1)), 1, stride=2))
        return self.norm(torch.cat([even, odd], 1))


class Separable(nn.Sequential):
    """ReLU, depthwise, 1x1, norm, twice; the stride is in the first depthwise convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, middle: int | None = None) -> None:
        middle = inputs if middle is None else middle
        pad = kernel // 2
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(inputs, inputs, kernel, stride, pad, groups=inputs, bias=False),
            nn.Conv2d(inputs, middle, 1, bias=False),
            norm(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, kernel, 1, pad, groups=middle, bias=False),
            nn.Conv2d(middle, outputs, 1, bias=False),
            norm(outputs),
        )


def average(stride: int = 1) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


def largest() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, padding=1)


class NormalCell(nn.Module):
    """Five sums of branches at ``width`` channels; gives ``6 * width``."""

    def __init__(self, older: int, newer: int, width: int, halve_older: bool) -> None:
        super().__init__()
        self.fit_older = FitHalved(older, width) if halve_older else Fit(older, width)
        self.fit_newer = Fit(newer, width)
        self.five_newer, self.three_older = Separable(width, width, 5), Separable(width, width, 3)
        self.five_older, self.three_older_too = Separable(width, width, 5), Separable(width, width, 3)
        self.three_newer = Separable(width, width, 3)
        self.pool = average()

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        p, h = self.fit_older(older), self.fit_newer(newer)
        sums = [
            self.five_newer(h) + self.three_older(p),
            self.five_older(p) + self.three_older_too(p),
            self.pool(h) + p,
            self.pool(p) + self.pool(p),
            self.three_newer(h) + h,
        ]
        return torch.cat([p, *sums], 1)


class ReductionCell(nn.Module):
    """Five sums of branches that halve the image; gives ``4 * width``.

    ``fit_older`` brings the older input to ``width`` channels at the newer one's size. The first stem cell has one
    input only and no such module: its branches take the raw input, ``older`` channels wide.
    """

    def __init__(self, older: int, newer: int, width: int, fit: Callable[[int, int], nn.Module] | None) -> None:
        super().__init__()
        self.fit_older = nn.Identity() if fit is None else fit(older, width)
        self.fit_newer = Fit(newer, width)
        wide = older if fit is None else width
        self.five_newer = Separable(width, width, 5, 2)
        self.seven_older, self.seven_older_too = (Separable(wide, width, 7, 2, middle=width) for _ in range(2))
        self.five_older = Separable(wide, width, 5, 2, middle=width)
        self.three_sum = Separable(width, width, 3)
        self.largest, self.average_halved, self.average = largest(), average(2), average()

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        p, h = self.fit_older(older), self.fit_newer(newer)
        first = self.five_newer(h) + self.seven_older(p)
        second = self.largest(h) + self.seven_older_too(p)
        third = self.average_halved(h) + self.five_older(p)
        fourth = self.average(first) + second
        fifth = self.three_sum(first) + self.largest(h)
        return torch.cat([second, third, fourth, fifth], 1)


class NASNet(nn.Module):
    """NASNet-A: ``repeats`` normal cells per stage; ``width`` channels in the first, twice as many in each next one."""

    def __init__(
        self, classes: int = 1000, repeats: int = 6, width: int = 168, stem: int = 96, stages: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, stride=2, bias=False), norm(stem))
        self.stem_cells = nn.ModuleList(
            [ReductionCell(stem, stem, width // 4, None), ReductionCell(stem, width, width // 2, FitHalved)]
        )
        self.cells = nn.ModuleList()
        older, newer = width, 2 * width  # channels of the two latest outputs
        for stage in range(stages):
            wide = width << stage
            if stage:
                self.cells.append(ReductionCell(older, newer, wide, Fit))
                newer = 4 * wide
            for cell in range(repeats):
                self.cells.append(NormalCell(older, newer, wide, halve_older=cell == 0))
                older, newer = newer, 6 * wide
        self.classifier = nn.Linear(newer, classes)
        preserve_variance(self, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        older = self.stem_cells[0](x, x)
        newer = self.stem_cells[1](x, older)
        for cell in self.cells:
            result = cell(older, newer)
            # A reduction stands in for the newer input alone: the normal cell after it still reads the older one.
            older, newer = (older if isinstance(cell, ReductionCell) else newer), result
        return self.classifier(F.relu(newer).mean((2, 3)))


MODELS = (
    BenchModel(
        name="nasnet_large",
        build=lambda: build_seeded(NASNet),
        inputs=images(331),
        source="Zoph et al. 2017, Learning transferable architectures for scalable image recognition (6 @ 4032)",
        batches=(1, 8),
        build_small=lambda: build_seeded(lambda: NASNet(10, repeats=2, width=8, stem=8, stages=2)),
        inputs_small=images(63),
    ),
)
