"""`python -m bench.convolutions`: cuDNN's convolutions alone, with bias and ReLU, and with another image added as well.

Takes: a GPU. Gives: GPU seconds of each, and of an elementwise kernel over the result, of shapes that networks have, as
JSON: what `fuse_convolutions` goes by where it adds a residual. Must not change: anything else. Takes half a minute.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import documents
from bench.about import environment
from bench.timing import gpu_seconds

SCHEMA = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
BATCHES = (1, 8, 32)
TURNS = 3
SHAPES = (
    *((64, 64, 1, 56), (64, 64, 3, 56), (64, 256, 1, 56), (256, 64, 1, 56), (256, 128, 1, 56), (128, 128, 3, 28)),
    *((128, 512, 1, 28), (512, 128, 1, 28), (512, 256, 1, 28), (256, 256, 3, 14), (256, 1024, 1, 14)),
    *((1024, 256, 1, 14), (1024, 512, 1, 14), (512, 512, 3, 7), (512, 2048, 1, 7), (2048, 512, 1, 7)),
    *((192, 96, 1, 28), (96, 128, 3, 28), (480, 192, 1, 14), (768, 192, 1, 17), (1280, 448, 1, 8)),
)
"""Channels, filters, window, extent of the image: ResNet-50's, some of GoogLeNet's and Inception-v3's."""


@dataclass(frozen=True)
class Timed:
    """Seconds of a convolution alone, with bias and ReLU, with another image too, and of an elementwise kernel."""

    channels: int
    filters: int
    window: int
    extent: int
    batch: int
    dtype: str
    alone: float
    relu: float
    added: float
    elementwise: float

    @property
    def gained(self) -> float:
        """Seconds that adding the image there saves: an elementwise kernel, less what it adds to the convolution."""
        return self.elementwise - (self.added - self.alone)


def measure(shape: tuple[int, int, int, int], dtype: str, batch: int) -> Timed:
    """One shape, channels last, at cuDNN's own choice of kernels."""
    channels, filters, window, extent = shape
    sizes = ((batch, channels, extent, extent), (filters, channels, window, window), (batch, filters, extent, extent))
    x, weight, image = (
        torch.randn(size, device="cuda", dtype=DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
        for size in sizes
    )
    bias, around = torch.randn(filters, device="cuda", dtype=DTYPES[dtype]), [window // 2] * 2
    calls: tuple[Callable[[], object], ...] = (
        lambda: torch.convolution(x, weight, None, [1, 1], around, [1, 1], False, [0, 0], 1),
        lambda: torch.cudnn_convolution_relu(x, weight, bias, [1, 1], around, [1, 1], 1),
        lambda: torch.cudnn_convolution_add_relu(x, weight, image, 1.0, bias, [1, 1], around, [1, 1], 1),
        lambda: torch.relu_(image),
    )
    return Timed(*shape, batch, dtype, *(min(gpu_seconds(call) for _ in range(TURNS)) for call in calls))


def load(path: Path) -> tuple[Timed, ...]:
    """What was written to `path`; ValueError if it is something else."""
    return tuple(Timed(**row) for row in documents.read(path, SCHEMA)["convolutions"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.convolutions", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--commit", help="where git cannot tell")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("bench.convolutions needs an NVIDIA GPU; torch finds none", file=sys.stderr)
        return 2
    rows = [asdict(measure(*case)) for case in itertools.product(SHAPES, DTYPES, BATCHES)]
    about = environment(chosen.commit, program="python -m bench.convolutions")
    documents.write(chosen.out, {"schema": SCHEMA, **about, "convolutions": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
