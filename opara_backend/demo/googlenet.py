"""GoogLeNet in plain torch: the model to try the backend on without installing anything else.

Inception v1 (Szegedy et al. 2014, "Going deeper with convolutions", Table 1) with batch normalisation after every
convolution and without the two auxiliary heads. Each inception block runs four independent branches, which is what a
multi-stream schedule feeds on. As in torchvision, whose parameter count this matches, the "5x5" branch uses 3x3
kernels.

Takes images of shape ``(batch, 3, 224, 224)``, returns logits of shape ``(batch, num_classes)``.
Building a model must not change the global random state: weights come from a fork of it, seeded by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PLAN", "GoogLeNet", "Widths", "example", "googlenet"]


class Widths(NamedTuple):
    """Output channels inside one inception block, in the order of the paper's table."""

    one: int
    reduce3: int
    three: int
    reduce5: int
    five: int
    pool: int

    @property
    def total(self) -> int:
        """Channels of the concatenated result."""
        return self.one + self.three + self.five + self.pool


PLAN: tuple[tuple[Widths, ...], ...] = (
    (Widths(64, 96, 128, 16, 32, 32), Widths(128, 128, 192, 32, 96, 64)),
    (
        Widths(192, 96, 208, 16, 48, 64),
        Widths(160, 112, 224, 24, 64, 64),
        Widths(128, 128, 256, 24, 64, 64),
        Widths(112, 144, 288, 32, 64, 64),
        Widths(256, 160, 320, 32, 128, 128),
    ),
    (Widths(256, 160, 320, 32, 128, 128), Widths(384, 192, 384, 48, 128, 128)),
)
"""The paper's blocks 3a-3b, 4a-4e and 5a-5b; a max pool follows each stage but the last."""


class ConvNorm(nn.Module):
    """Convolution that keeps the image size (divided by the stride), batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Inception(nn.Module):
    """Four branches over one input, concatenated along the channels."""

    def __init__(self, inputs: int, widths: Widths) -> None:
        super().__init__()
        self.one = ConvNorm(inputs, widths.one, 1)
        self.three = nn.Sequential(ConvNorm(inputs, widths.reduce3, 1), ConvNorm(widths.reduce3, widths.three, 3))
        self.five = nn.Sequential(ConvNorm(inputs, widths.reduce5, 1), ConvNorm(widths.reduce5, widths.five, 3))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvNorm(inputs, widths.pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """Stem, stages of inception blocks, classifier. ``plan`` lists the blocks of each stage."""

    def __init__(self, num_classes: int = 1000, plan: tuple[tuple[Widths, ...], ...] = PLAN) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            ConvNorm(3, 64, 7, stride=2),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            ConvNorm(64, 64, 1),
            ConvNorm(64, 192, 3),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
        ]
        channels = 192
        for number, stage in enumerate(plan):
            if number:
                layers.append(nn.MaxPool2d(3 if number == 1 else 2, stride=2, ceil_mode=True))
            for widths in stage:
                layers.append(Inception(channels, widths))
                channels = widths.total
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def initialize(model: nn.Module) -> None:
    """Draw weights from the current generator so that signals keep their size from layer to layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


def googlenet(num_classes: int = 1000, seed: int = 0) -> nn.Module:
    """GoogLeNet in eval mode with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        model = GoogLeNet(num_classes)
        initialize(model)
    return model.eval()


def example() -> tuple[nn.Module, tuple[Tensor]]:
    """GoogLeNet and one image, for `python -m opara_backend explain opara_backend.demo.googlenet:example`."""
    return googlenet(), (torch.zeros(1, 3, 224, 224),)
