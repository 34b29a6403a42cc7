"""`python -m bench.depthwise`: depthwise layers by cuDNN's kernels and written out, where `fuse_depthwise` is worth it.

Takes: a GPU. Gives: GPU seconds of a layer with its batch norm and ReLU, of shapes that networks have, as Markdown, and
as JSON in --out. Must not change: anything else. Several processes compile at once; they time one after another.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench import documents
from bench.about import environment
from bench.layers import SCHEMA, Layer, Shape, markdown
from bench.timing import gpu_seconds
from opara_backend import upstream
from opara_backend.commands.console import positive
from opara_backend.lowering import depthwise

SHAPES = (
    *(Shape(32, 112, 3), Shape(144, 56, 3), Shape(480, 14, 3), Shape(960, 7, 3)),
    *(Shape(168, 42, 5), Shape(240, 28, 5), Shape(672, 14, 5), Shape(1152, 7, 5)),
    *(Shape(96, 56, 7), Shape(192, 28, 7), Shape(384, 14, 7), Shape(768, 7, 7)),
)
"""As in MobileNetV2 and V3, EfficientNet-B0, NASNet-A Large and ConvNeXt-Tiny."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}
BATCHES = (1, 8, 32)
LAYERS = 4  # of one shape in a row, so that a replay is long enough to time
ROUNDS = 7


def network(shape: Shape) -> nn.Sequential:
    """The layers, between two others as they are in a network, and so laid out channels last."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        depth, width = shape.channels, shape.window
        layers += [nn.Conv2d(depth, depth, width, padding=width // 2, groups=depth, bias=False), nn.BatchNorm2d(depth)]
        layers.append(nn.ReLU())
    return nn.Sequential(nn.Conv2d(8, shape.channels, 1), *layers, nn.Conv2d(shape.channels, 8, 1))


def measure(alone: AbstractContextManager[Any], shape: Shape, dtype: str, batch: int) -> Layer:
    """One layer both ways: what the whole takes beyond the two convolutions around it, over `LAYERS`.

    alone: held while it is timed.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = network(shape).to("cuda", DTYPES[dtype]).eval()
    around = nn.Sequential(model[0], model[-1])
    x = torch.randn(batch, 8, shape.extent, shape.extent, device="cuda", dtype=DTYPES[dtype])
    # Whatever the rewrite holds to be worth it; in no cache, whose keys do not know of that.
    everything = mock.patch.multiple(depthwise, LARGE=sys.maxsize, SMALL=0)
    calls = []
    with torch.no_grad(), everything, upstream.inductor_config.patch(force_disable_caches=True):
        for layers, on in ((model, False), (model, True), (around, False)):
            options: dict[str, Any] = {
                "policy": "sequential",
                "fallback": "error",
                "copy_outputs": False,
                "fuse_depthwise": on,
            }
            calls.append(torch.compile(layers, backend="opara", dynamic=False, options=options))
            for _ in range(3):
                calls[-1](x)
        queued = [functools.partial(call, x) for call in calls]
        with alone:
            turns = [[gpu_seconds(call) for call in queued] for _ in range(ROUNDS)]
    library, written, rest = map(statistics.median, zip(*turns, strict=True))
    return Layer(shape, dtype, batch, (library - rest) / LAYERS, (written - rest) / LAYERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.depthwise", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--workers", type=positive, default=4, metavar="N", help="compiling at once; default 4")
    parser.add_argument("--commit", help="where git cannot tell")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("bench.depthwise needs an NVIDIA GPU; torch finds none", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    cases = [*zip(*itertools.product(SHAPES, DTYPES, BATCHES), strict=True)]
    with context.Manager() as shared, ProcessPoolExecutor(chosen.workers, context) as pool:
        rows = [asdict(row) for row in pool.map(functools.partial(measure, shared.Lock()), *cases)]
    about = environment(chosen.commit, program="python -m bench.depthwise")
    documents.write(chosen.out, {"schema": SCHEMA, **about, "layers": rows})
    print(markdown(chosen.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
