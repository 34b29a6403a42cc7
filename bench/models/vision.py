"""Image classifiers: GoogLeNet, Inception-v3 and SqueezeNet branch; ResNet-50 hardly does and serves as a control.

Every model takes images ``(batch, 3, size, size)`` and returns logits ``(batch, classes)``. Layer sizes are the
published ones, checked by parameter count in the tests; auxiliary heads and dropout, unused at inference, are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.inception import Conv, Inception3
from bench.models.seeding import build_seeded, normal, preserve_variance
from opara_backend.demo.googlenet import PLAN, GoogLeNet, googlenet

__all__ = ["MODELS", "ResNet", "SqueezeNet", "images"]


def images(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    """The inputs of an image classifier: ``batch`` square images of ``size`` pixels."""
    return lambda batch: (normal(batch, 3, size, size),)


class Fire(nn.Module):
    """SqueezeNet's block: squeeze to few channels, expand through 1x1 and 3x3 convolutions side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1. ``stages`` lists (squeeze, expand) of the fire blocks between max pools."""

    FULL = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))

    def __init__(self, classes: int = 1000, stages: tuple[tuple[tuple[int, int], ...], ...] = FULL) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()]
        channels = 64
        for stage in stages:
            layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            for squeeze, expand in stage:
                layers.append(Fire(channels, squeeze, expand))
                channels = 2 * expand
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(channels, classes, 1)
        preserve_variance(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.classifier(self.features(x))).mean((2, 3))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce, self.spatial = Conv(inputs, width, 1), Conv(width, width, 3, stride)
        self.expand, self.norm = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        nn.init.constant_(self.norm.weight, 0.25)  # or sixteen residual additions would blow the signal up
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.expand(self.spatial(self.reduce(x)))) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with bottleneck blocks, the stride on the 3x3 convolution."""

    def __init__(self, classes: int = 1000, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv(3, width, 7, 2), nn.MaxPool2d(3, stride=2, padding=1)]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
                channels = 4 * width << stage
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        preserve_variance(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def googlenet_small() -> nn.Module:
    """The first block of each of GoogLeNet's stages."""
    model = GoogLeNet(10, plan=tuple(stage[:1] for stage in PLAN))
    preserve_variance(model)
    return model


def resnet_small() -> nn.Module:
    return ResNet(10, blocks=(1, 1, 1, 1), width=16)


MODELS = (
    BenchModel(
        name="googlenet",
        build=googlenet,
        inputs=images(224),
        source="Szegedy et al. 2014, Going deeper with convolutions (with batch norm)",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(googlenet_small),
        inputs_small=images(64),
    ),
    BenchModel(
        name="inception_v3",
        build=lambda: build_seeded(Inception3),
        inputs=images(299),
        source="Szegedy et al. 2015, Rethinking the Inception architecture for computer vision",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: Inception3(10, pools=(64,), sevens=(128,), tails=1)),
        inputs_small=images(75),
    ),
    BenchModel(
        name="squeezenet",
        build=lambda: build_seeded(SqueezeNet),
        inputs=images(224),
        source="Iandola et al. 2016, SqueezeNet, version 1.1",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: SqueezeNet(10, stages=(((16, 64),), ((32, 128),), ((48, 192),)))),
        inputs_small=images(64),
    ),
    BenchModel(
        name="resnet50",
        build=lambda: build_seeded(ResNet),
        inputs=images(224),
        source="He et al. 2015, Deep residual learning, with the stride on the 3x3 convolution",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(resnet_small),
        inputs_small=images(64),
    ),
)
