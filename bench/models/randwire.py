"""RandWire (Xie et al. 2019, "Exploring randomly wired neural networks"), the small computation regime.

Three stages, each a random Watts-Strogatz graph WS(4, 0.75) of 32 nodes turned into a DAG by its node order. A node
sums its inputs with learned weights, applies ReLU, a 3x3 separable convolution and batch norm; a stage's first nodes
halve the image, its last ones are averaged. The graphs depend on a seed only.

Takes images ``(batch, 3, 224, 224)``, returns logits ``(batch, classes)``.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.entry import BenchModel
from bench.models.seeding import build_seeded, preserve_variance
from bench.models.vision import images

__all__ = ["MODELS", "RandWire", "watts_strogatz"]


def watts_strogatz(nodes: int, neighbours: int, rewire: float, seed: int) -> tuple[tuple[int, ...], ...]:
    """Each node's predecessors, in order, in a WS(``neighbours``, ``rewire``) graph whose edges point upwards.

    Every node of a ring starts with an edge to the next ``neighbours / 2`` ones; each edge's far end then moves, with
    probability ``rewire``, to a node drawn uniformly among those not yet joined. Only ``Random.random`` is used, whose
    values Python keeps the same between versions.
    """
    draw = random.Random(seed).random
    joined: list[set[int]] = [set() for _ in range(nodes)]
    for step in range(1, neighbours // 2 + 1):
        for node in range(nodes):
            joined[node].add((node + step) % nodes)
            joined[(node + step) % nodes].add(node)
    for step in range(1, neighbours // 2 + 1):
        for node in range(nodes):
            if draw() >= rewire:
                continue
            free = [other for other in range(nodes) if other != node and other not in joined[node]]
            if not free:
                continue
            old, new = (node + step) % nodes, free[int(draw() * len(free))]
            joined[node].remove(old)
            joined[old].remove(node)
            joined[node].add(new)
            joined[new].add(node)
    return tuple(tuple(sorted(other for other in joined[node] if other < node)) for node in range(nodes))


class Separable(nn.Sequential):
    """Depthwise 3x3, 1x1, norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )


class Stage(nn.Module):
    """One random graph: ``inputs`` channels to ``outputs`` channels at half the image size."""

    def __init__(self, graph: tuple[tuple[int, ...], ...], inputs: int, outputs: int) -> None:
        super().__init__()
        self.graph = graph
        read = {source for sources in graph for source in sources}
        self.last = tuple(node for node in range(len(graph)) if node not in read)
        self.nodes = nn.ModuleList(
            Separable(outputs, outputs, 1) if sources else Separable(inputs, outputs, 2) for sources in graph
        )
        self.weights = nn.ParameterList(torch.randn(max(len(sources), 1)) for sources in graph)

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = []
        for sources, node, weights in zip(self.graph, self.nodes, self.weights, strict=True):
            if not sources:
                values.append(node(F.relu(x)))
                continue
            share = torch.sigmoid(weights)
            total = values[sources[0]] * share[0]
            for position, source in enumerate(sources[1:], start=1):
                total = total + values[source] * share[position]
            values.append(node(F.relu(total)))
        total = values[self.last[0]]
        for node_index in self.last[1:]:
            total = total + values[node_index]
        return total / len(self.last)


class RandWire(nn.Module):
    """Two plain convolutions, three random stages, classifier. Stage ``i`` is ``width * 2**i`` channels wide."""

    def __init__(self, classes: int = 1000, nodes: int = 32, width: int = 78, head: int = 1280, seed: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        graphs = [watts_strogatz(nodes, 4, 0.75, 3 * seed + stage) for stage in range(3)]
        widths = (width, width, 2 * width, 4 * width)
        self.stages = nn.Sequential(*(Stage(graph, widths[i], widths[i + 1]) for i, graph in enumerate(graphs)))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(4 * width, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU())
        self.classifier = nn.Linear(head, classes)
        preserve_variance(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.stages(self.stem(x))).mean((2, 3)))


MODELS = (
    BenchModel(
        name="randwire",
        build=lambda: build_seeded(RandWire),
        inputs=images(224),
        source="Xie et al. 2019, Exploring randomly wired neural networks, WS(4, 0.75), N = 32, C = 78",
        batches=(1, 8, 32),
        build_small=lambda: build_seeded(lambda: RandWire(10, nodes=10, width=8, head=32)),
        inputs_small=images(64),
    ),
)
