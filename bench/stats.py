"""How sure a ratio of two times is.

Takes: samples of two sides, grouped by process. Gives: a ratio with a confidence interval. Imports no torch.
Must not change: anything. Deterministic: the bootstrap is seeded.

Samples of one process are alike and processes differ, so the bootstrap draws processes first, then rounds in each. It
knows little of three processes, and of a hundred ratios one is far off by chance: `beyond` is the second guard, with
the noise that is usual (`usual_noise`) or, where that is more, a case's own (`process_noise`).

Several cases together tell more than each: the noise of their mean falls with the root of their number, as long as they
are independent. What shifts all of a run (another host, a warmer GPU) is not noise to `mean_beyond`: times relative to
another variant's in the same round are free of it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

Groups = Sequence[Sequence[float]]  # per process, its samples
Sides = tuple[Groups, Groups]  # before and after
Weighted = tuple[Sides, float]  # one of several cases, with the noise of its processes

RESAMPLES = 500
LEAST_NOISE = 1e-6  # a case without any must not weigh all


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


def mean_ratio(cases: Sequence[Weighted], *, confidence: float = 0.99, seed: int = 0) -> Ratio:
    """Geometric mean over cases of how many times as long `after` takes, by a bootstrap over cases.

    Each weighs as much as it is sure. Of each by means over processes, not medians: a median of three leaves a quarter
    of what they tell unused, and its error, unlike a mean's, depends on how processes differ. The interval says whether
    it is most cases that moved; of three it takes all.
    """
    random = Random(seed)
    logs = [statistics.fmean(_logs(after)) - statistics.fmean(_logs(before)) for (before, after), _ in cases]
    weighted = sorted(zip(logs, map(_weight, cases), strict=True))  # sorted: the order of cases must not matter
    value = _weighted_mean(weighted)
    drawn = sorted(_weighted_mean(random.choices(weighted, k=len(weighted))) for _ in range(RESAMPLES))
    outside = math.floor((1 - confidence) / 2 * RESAMPLES)
    return Ratio(math.exp(value), math.exp(min(value, drawn[outside])), math.exp(max(value, drawn[-1 - outside])))


def _weighted_mean(weighted: Sequence[tuple[float, float]]) -> float:
    return math.fsum(value * weight for value, weight in weighted) / math.fsum(weight for _, weight in weighted)


def _weight(case: Weighted) -> float:
    """One over the square of the error of a ratio of means over processes."""
    (before, after), noise = case
    return 1 / (max(noise, LEAST_NOISE) ** 2 * (1 / len(before) + 1 / len(after)))


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
    return _passed_by_chance(error, confidence, comparisons)


def mean_beyond(cases: Iterable[Weighted], *, confidence: float, comparisons: int) -> float:
    """The same for `mean_ratio`, of cases whose ratios are independent."""
    return _passed_by_chance(1 / math.sqrt(sum(map(_weight, cases))), confidence, comparisons)


def _passed_by_chance(error: float, confidence: float, comparisons: int) -> float:
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
