"""First calls as measured, and the table of them that docs show.

Takes: a file of `bench.first_calls`. Gives: its rows, and Markdown. Must not change: anything. Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import documents
from bench.samples import OURS, STOCK, Case
from bench.tables import geometric_mean

SCHEMA = "first calls, 1"
KINDS = ("cold", "warm")


@dataclass(frozen=True)
class Start:
    """Seconds that the first call takes in a fresh process: cold, with empty caches; warm, in the next one."""

    model: str
    dtype: str
    batch: int
    backend: str
    process: int
    cold: float
    warm: float

    @property
    def case(self) -> Case:
        """Model, dtype and batch."""
        return (self.model, self.dtype, self.batch)


def save(path: Path, about: Mapping[str, Any], starts: Iterable[Start]) -> None:
    """Write what `load` reads."""
    documents.write(path, {"schema": SCHEMA, **about, "starts": [asdict(start) for start in starts]})


def load(path: Path) -> tuple[dict[str, Any], tuple[Start, ...]]:
    """What the figures at `path` were measured with and on, and the figures; ValueError if it holds none."""
    found = documents.read(path, SCHEMA)
    return found, tuple(Start(**start) for start in found.pop("starts"))


def compared(starts: Sequence[Start], base: str, other: str) -> Iterable[tuple[Case, tuple[float, ...]]]:
    """Every case that both backends started in: seconds of both and their ratio, cold and then warm; medians."""
    for case in dict.fromkeys(start.case for start in starts):
        both = [[s for s in starts if s.case == case and s.backend == name] for name in (base, other)]
        if all(both):
            cold, warm = ([statistics.median(getattr(s, kind) for s in of) for of in both] for kind in KINDS)
            yield case, (*cold, cold[1] / cold[0], *warm, warm[1] / warm[0])


def rows(starts: Sequence[Start], base: str, other: str) -> Iterable[tuple[str, ...]]:
    """What `headings` head: a row a case, and the geometric means of the ratios."""
    found = [*compared(starts, base, other)]
    for (model, dtype, batch), figures in found:
        cells = (f"{figure:.2f}{'x' if place in RATIOS else ''}" for place, figure in enumerate(figures))
        yield f"{model} {dtype}, batch {batch}", *cells
    if found:
        cold, warm = (f"{geometric_mean(figures[place] for _, figures in found):.2f}x" for place in RATIOS)
        yield f"geometric mean of {len(found)}", "", "", cold, "", "", warm


RATIOS = (2, 5)


def headings(base: str, other: str) -> tuple[str, ...]:
    """Of the columns of `rows`."""
    return "model", *(text for kind in KINDS for text in (f"{base}, {kind} s", f"{other}, {kind} s", kind))


def markdown(path: Path) -> str:
    """A row a case: seconds of stock and of ours, caches empty and filled, and ours over stock's."""
    about, starts = load(path)
    head = headings(STOCK, OURS)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows(starts, STOCK, OURS))]
    counts = {sum(s.case == start.case and s.backend == start.backend for s in starts) for start in starts}
    origin = f"{about['device']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}"
    many = " to ".join(map(str, sorted({min(counts, default=0), max(counts, default=0)})))
    return "\n".join([*lines, "", f"Medians of {many}, {about['cores']} cores each. {origin}: `{about['command']}`"])
