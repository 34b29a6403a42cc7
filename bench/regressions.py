"""What got worse since a baseline.

Takes: figures by key, then and now, each the lower the better, and how much worse is still no change. Gives: a
`Comparison`. Must not change: anything. Imports no torch. Deterministic; in the order of what was found now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Key = tuple[str, ...]
Figures = Mapping[Key, Mapping[str, float]]


@dataclass(frozen=True)
class Change:
    """One figure that moved."""

    key: Key
    figure: str
    before: float
    after: float

    def row(self) -> tuple[str, ...]:
        """As a row of a table: key, figure, before, after, change."""
        change = f"{self.after / self.before - 1:+.1%}" if self.before else "-"
        return (*self.key, self.figure, f"{self.before:,.10g}", f"{self.after:,.10g}", change)


@dataclass(frozen=True)
class Comparison:
    """worse, better: figures that moved by more than the limit. gone, new: keys that only one side has."""

    worse: tuple[Change, ...]
    better: tuple[Change, ...]
    gone: tuple[Key, ...]
    new: tuple[Key, ...]

    @property
    def accepted(self) -> bool:
        """True if nothing got worse and nothing that was looked at before is no longer."""
        return not (self.worse or self.gone)


def compare(before: Figures, after: Figures, *, limit: float) -> Comparison:
    """Compare every figure of every key. limit: 0.01 lets a figure grow by 1 per cent; nothing grows from zero."""
    both = [key for key in after if key in before]
    moved = [
        Change(key, figure, before[key][figure], value)
        for key in both
        for figure, value in after[key].items()
        if figure in before[key]
    ]
    return Comparison(
        worse=tuple(c for c in moved if c.after > c.before * (1 + limit)),
        better=tuple(c for c in moved if c.before > c.after * (1 + limit)),
        gone=tuple(key for key in before if key not in after),
        new=tuple(key for key in after if key not in before),
    )
