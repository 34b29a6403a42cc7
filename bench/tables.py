"""What the benchmarks show people: tables of text and the means in them.

Takes: headings and rows of strings; numbers. Gives: a rich table; a mean. Must not change: anything. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 160


def console() -> Console:
    """Standard output, equally wide everywhere; text in brackets is text."""
    return Console(width=WIDTH, markup=False, highlight=False)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column stands left and the others right; short rows are filled up."""
    made = Table(title=title)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        made.add_row(*row)
    return made


def geometric_mean(ratios: Iterable[float]) -> float:
    """The mean that treats twice as fast and twice as slow alike."""
    return math.exp(statistics.fmean(map(math.log, ratios)))
