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

SCHEMA = 1
HEADINGS = (f"{STOCK}, cold s", f"{OURS}, cold s", "cold", f"{STOCK}, warm s", f"{OURS}, warm s", "warm")


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


def compared(starts: Sequence[Start]) -> Iterable[tuple[Case, tuple[float, ...]]]:
    """Every case that both backends started in, and the figures of `HEADINGS`: medians, and ours over stock's."""
    for case in dict.fromkeys(start.case for start in starts):
        stock, mine = ([s for s in starts if s.case == case and s.backend == name] for name in (STOCK, OURS))
        if stock and mine:
            cold, warm = ([statistics.median(getattr(s, k) for s in of) for of in (stock, mine)] for k in KINDS)
            yield case, (*cold, cold[1] / cold[0], *warm, warm[1] / warm[0])


KINDS = ("cold", "warm")


def markdown(path: Path) -> str:
    """A row a case: seconds of both backends, caches empty and filled, and ours over stock's."""
    about, starts = load(path)
    cells = [(f"{model} {dtype}, batch {batch}", found) for (model, dtype, batch), found in compared(starts)]
    lines = [f"| model | {' | '.join(HEADINGS)} |", f"| --- |{' --- |' * len(HEADINGS)}"]
    lines += [f"| {name} | {' | '.join(shown(found))} |" for name, found in cells]
    if cells:
        cold, warm = (geometric_mean(found[place] for _, found in cells) for place in (2, 5))
        lines.append(f"| geometric mean of {len(cells)} | | | **{cold:.2f}x** | | | **{warm:.2f}x** |")
    counts = {sum(s.case == start.case and s.backend == start.backend for s in starts) for start in starts}
    origin = f"{about['device']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}"
    many = " to ".join(map(str, sorted({min(counts, default=0), max(counts, default=0)})))
    return "\n".join([*lines, "", f"Medians of {many}, {about['cores']} cores each. {origin}: `{about['command']}`"])


def shown(figures: Sequence[float]) -> list[str]:
    """The figures of `HEADINGS` as text."""
    return [f"{figure:.2f}{'x' if place in (2, 5) else ''}" for place, figure in enumerate(figures)]
