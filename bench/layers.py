"""Depthwise layers as measured, and the table of them that docs show.

Takes: a file that `bench.depthwise` wrote. Gives: its rows, and Markdown. Imports no torch. Must not change: anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import documents

SCHEMA = 1


@dataclass(frozen=True)
class Shape:
    """A square image, `channels` deep, and a square window of as many groups; `window // 2` pixels are added around."""

    channels: int
    extent: int
    window: int

    def __str__(self) -> str:
        return f"{self.window}x{self.window} of {self.channels} channels, {self.extent}x{self.extent}"


@dataclass(frozen=True)
class Layer:
    """What a layer takes, with batch norm and ReLU behind it: GPU seconds by cuDNN's kernel and by one written out."""

    shape: Shape
    dtype: str
    batch: int
    library: float
    written: float

    @property
    def ratio(self) -> float:
        """Below 1 where the written one is faster."""
        return self.written / self.library


def load(path: Path) -> tuple[dict[str, Any], tuple[Layer, ...]]:
    """What the figures at `path` were measured with and on, and the figures; ValueError if it holds none."""
    found = documents.read(path, SCHEMA)
    rows = tuple(Layer(**{**row, "shape": Shape(**row["shape"])}) for row in found.pop("layers"))
    return found, rows


def markdown(path: Path) -> str:
    """A row a shape and type: microseconds by cuDNN and written out, for each batch."""
    about, rows = load(path)
    batches = sorted({row.batch for row in rows})
    cells = {(row.shape, row.dtype, row.batch): row for row in rows}
    lines = [
        f"| depthwise layer | dtype | {' | '.join(f'batch {batch}' for batch in batches)} |",
        f"| --- | --- |{' --- |' * len(batches)}",
    ]
    for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in rows):
        found = [cells.get((shape, dtype, batch)) for batch in batches]
        shown = ["-" if cell is None else _cell(cell) for cell in found]
        lines.append(f"| {shape} | {dtype} | {' | '.join(shown)} |")
    origin = f"{about['device']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}"
    return "\n".join([*lines, "", f"Microseconds, cuDNN's and written out. {origin}: `{about['command']}`"])


def _cell(row: Layer) -> str:
    return f"{1e6 * row.library:.1f} / {1e6 * row.written:.1f} ({row.ratio:.2f}x)"
