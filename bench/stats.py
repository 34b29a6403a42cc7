"""How sure a ratio of two times is.

Takes: samples of two sides, grouped by process. Gives: a ratio with a confidence interval. Imports no torch.
Must not change: anything. Deterministic: the bootstrap is seeded.

Samples of one process are alike and processes differ, so the bootstrap draws processes first, then rounds in each. It
knows little of three processes, and of a hundred ratios one is far off by chance: `beyond` is the second guard, with
the noise that is usual (`usual_noise`) or, where that is more, a case's own (`process_noise`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

Groups = Sequence[Sequence[float]]  # per process, its samples

RESAMPLES = 500


@dataclass(frozen=True)
class Ratio:
    """`value`, and the interval that holds it with the confidence asked for."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def center(groups: Groups) -> float:
    """Median over processes of each one's median."""
    return _median([_median(group) for group in groups])


def ratio(before: Groups, after: Groups, *, confidence: float = 0.99, seed: int = 0) -> Ratio:
    """How many times as long `after` takes, by a bootstrap over processes and rounds. Every sample above zero."""
    random = Random(seed)
    value = center(after) / center(before)
    drawn = sorted(center(_drawn(after, random)) / center(_drawn(before, random)) for _ in range(RESAMPLES))
    outside = math.floor((1 - confidence) / 2 * RESAMPLES)
    return Ratio(value, min(value, drawn[outside]), max(value, drawn[-1 - outside]))


def relative(groups: Groups, base: Groups) -> list[list[float]]:
    """Per process and round, the time over that of `base` in the same round: what drifts for both cancels."""
    return [[a / b for a, b in zip(own, other, strict=False)] for own, other in zip(groups, base, strict=False)]


def process_noise(sides: Iterable[Groups]) -> float:
    """Standard deviation of a process's median, as a fraction, pooled over `sides`; 0 if none has two processes."""
    squares, freedom = 0.0, 0
    for groups in sides:
        logs = _logs(groups)
        middle = statistics.fmean(logs)
        squares += sum((value - middle) ** 2 for value in logs)
        freedom += len(logs) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def usual_noise(sides: Iterable[Groups]) -> float:
    """The same, of the case in the middle: from the median difference of two processes of one side.

    One case has too few processes to tell its noise; all cases of a run together have enough. A few that are far
    noisier, in which a library chose another kernel, say, leave it as it is, and the others' verdicts with it.
    """
    apart = [abs(one - other) for groups in sides for one, other in itertools.combinations(_logs(groups), 2)]
    # Half of the differences of two normal values lie within 0.6745 * sqrt(2) standard deviations.
    return statistics.median(apart) / (0.6745 * math.sqrt(2)) if apart else 0.0


def _logs(groups: Groups) -> list[float]:
    return [math.log(_median(group)) for group in groups]


def beyond(noise: float, before: Groups, after: Groups, *, confidence: float, comparisons: int) -> float:
    """The ratio that chance alone passes in none of `comparisons`, with this confidence, by processes' `noise`."""
    error = noise * math.hypot(_error_of_median(len(before)), _error_of_median(len(after)))
    return math.exp(error * statistics.NormalDist().inv_cdf(1 - (1 - confidence) / 2 / comparisons))


def _error_of_median(count: int) -> float:
    """Standard error of the median of so many values of standard deviation 1 (of a mean, if there are one or two)."""
    return (1.2533 if count > 2 else 1.0) / math.sqrt(count)


def _median(values: Sequence[float]) -> float:
    """As `statistics.median`, without its checks: it is asked half a million times."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _drawn(groups: Groups, random: Random) -> list[list[float]]:
    return [random.choices(group, k=len(group)) for group in random.choices(groups, k=len(groups))]
