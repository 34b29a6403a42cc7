"""`python -m bench.calibration`: how well the simulator predicts what was measured on a GPU.

Takes: the recorded kernel graphs, each with schedules and the GPU seconds a replay of them took. Gives: a table and
bench/results/calibration.json; with --fit the constants of `CostModel` that rank schedules best, and how well those
fitted to the other models rank each model. Must not change: anything else. Imports no torch. Deterministic.

The simulator decides which schedules are worth measuring, so its ranking counts more than its seconds. Where all
schedules take the same time there is nothing to rank, and the correlation says little: `attainable` says how well one
measurement ranks another.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

from rich.table import Table

from bench import documents
from bench.recorded import Recording, load_all
from bench.tables import console, geometric_mean, table
from opara_backend.options import Options
from opara_backend.scheduling.costs import CostModel
from opara_backend.scheduling.search import candidates
from opara_backend.scheduling.simulator import simulate

SCHEMA = 1
RESULT = documents.RESULTS / "calibration.json"
# Only what cannot be measured by itself; scheduling/README.md says how the other constants were measured.
GRID: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "ramp": (1.4e-6, 2.1e-6, 2.8e-6, 3.5e-6),
        "interference": (0.0, 0.15, 0.25, 0.35, 0.5),
    }
)
NOISE = 0.003  # the same schedules measured in two sessions differed by this, median of ten graphs (0.0015 to 0.05)
REPEATS = 20
GOOD = 0.8
TRIED, WIDTH = Options.candidates, Options.streams  # the defaults


@dataclass(frozen=True)
class Calibration:
    """Prediction beside measurement on one graph.

    spearman: rank correlation of predicted and measured seconds. attainable: that of the measured seconds and the same
    with noise. error: mean of |predicted / measured - 1|. first_choice: measured seconds of the schedule predicted
    best, over those of the best measured; best_tried: of the best among one stream and those predicted best, `TRIED`
    in all; best_picked: of the best measured one among the `TRIED` that the search picks from its menu, None where none
    was. spread: slowest over fastest measured schedule, one stream left out.
    """

    graph: str
    schedules: int
    spearman: float
    attainable: float
    error: float
    first_choice: float
    best_tried: float
    best_picked: float | None
    spread: float


def calibrate(recording: Recording, costs: CostModel | None = None) -> Calibration:
    """ValueError if the recording has no GPU, or no two schedules to rank."""
    predicted, measured = predicted_and_measured(recording, costs)
    picked = seconds_picked(recording)
    ranked = sorted(range(len(measured)), key=lambda i: (recording.measured[i].schedule.streams > 1, predicted[i]))
    parallel = [item.seconds for item in recording.measured if item.schedule.streams > 1] or measured
    return Calibration(
        graph=recording.name,
        schedules=len(measured),
        spearman=round(spearman(predicted, measured), 4),
        attainable=round(attainable(measured), 2),
        error=round(statistics.fmean(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)), 4),
        first_choice=round(measured[predicted.index(min(predicted))] / min(measured), 4),
        best_tried=round(min(measured[i] for i in ranked[:TRIED]) / min(measured), 4),
        best_picked=round(min(picked) / min(measured), 4) if picked else None,
        spread=round(max(parallel) / min(parallel), 4),
    )


def predicted_and_measured(recording: Recording, costs: CostModel | None) -> tuple[list[float], list[float]]:
    """Seconds predicted and seconds measured, schedule by schedule; ValueError as in `calibrate`."""
    device = recording.profile.device
    if device is None or len(recording.measured) < 2:
        raise ValueError(f"{recording.name}: a GPU and two schedules are needed, it has {len(recording.measured)}")
    predicted = [
        # Equal but for rounding is equal: a picosecond.
        round(simulate(recording.graph, recording.profile, item.schedule, device, costs).makespan, 12)
        for item in recording.measured
    ]
    return predicted, [item.seconds for item in recording.measured]


def seconds_picked(recording: Recording) -> list[float]:
    """Measured seconds of what the search picks, one stream first; without those nobody measured."""
    measured = {item.schedule.launches: item.seconds for item in recording.measured}
    picked = candidates(recording.graph, recording.profile, count=TRIED, streams=WIDTH)
    return [measured[schedule.launches] for schedule in picked if schedule.launches in measured]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties averaged; 0 if one side is all ties and so ranks nothing."""
    if min(first) == max(first) or min(second) == max(second):
        return 0.0
    return statistics.correlation(ranks(first), ranks(second))


def attainable(measured: Sequence[float]) -> float:
    """Rank correlation to expect of two measurements, each `NOISE` off: nobody can predict the second better."""
    generator = random.Random(0)
    off = NOISE * 2**0.5
    again = ([seconds * (1 + generator.gauss(0, off)) for seconds in measured] for _ in range(REPEATS))
    return statistics.fmean(spearman(measured, seconds) for seconds in again)


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; equal values share the mean of their ranks."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), start=1):
        places.setdefault(value, []).append(place)
    return [statistics.fmean(places[value]) for value in values]


def fit(recordings: Sequence[Recording], start: CostModel) -> tuple[CostModel, float]:
    """The constants on `GRID` with the best mean correlation, and that mean.

    One constant at a time, in turns, until a round changes none; a constant moves only if that is better.
    """

    def score(costs: CostModel) -> float:
        return statistics.fmean(_ranked(recording, costs) for recording in recordings)

    best, best_score, before = start, score(start), None
    while best != before:
        before = best
        for name, values in GRID.items():
            for value in values:
                if value != getattr(best, name) and (found := score(replace(best, **{name: value}))) > best_score:
                    best, best_score = replace(best, **{name: value}), found
    return best, best_score


def cross_validate(recordings: Sequence[Recording], start: CostModel) -> list[float]:
    """The correlation on each recording with constants fitted to the recordings of the other models."""
    found = []
    for recording in recordings:
        others = [other for other in recordings if other.about["model"] != recording.about["model"]]
        found.append(_ranked(recording, fit(others, start)[0] if others else start))
    return found


_SEEN: dict[tuple[int, CostModel], tuple[Recording, float]] = {}


def _ranked(recording: Recording, costs: CostModel) -> float:
    key = (id(recording), costs)  # the recording is kept, so that no other gets its id
    if key not in _SEEN:
        _SEEN[key] = (recording, round(spearman(*predicted_and_measured(recording, costs)), 4))
    return _SEEN[key][1]


def summary(rows: Sequence[Calibration]) -> Table:
    """One line a graph, and the means."""
    lines: list[tuple[str, ...]] = []
    for r in rows:
        found = (r.first_choice, r.best_tried, r.best_picked, r.spread)
        ratios = tuple("-" if ratio is None else f"{ratio:.3f}" for ratio in found)
        lines.append((r.graph, str(r.schedules), f"{r.spearman:.3f}", f"{r.attainable:.2f}", f"{r.error:.1%}", *ratios))
    picked = [r.best_picked for r in rows if r.best_picked is not None]
    means = (
        f"{statistics.fmean(r.spearman for r in rows):.3f}",
        f"{statistics.fmean(r.attainable for r in rows):.2f}",
        f"{statistics.fmean(r.error for r in rows):.1%}",
        f"{geometric_mean(r.first_choice for r in rows):.3f}",
        f"{geometric_mean(r.best_tried for r in rows):.3f}",
        f"{geometric_mean(picked):.3f}" if picked else "-",
        f"{geometric_mean(r.spread for r in rows):.3f}",
    )
    lines.append(("mean", "", *means))
    ranked = ("Spearman", "attainable", "error")
    chosen = ("first choice / best", f"best of {TRIED} / best", "best picked / best", "slowest / fastest")
    title = "The simulator's prediction beside the measured GPU time"
    return table(title, ("graph", "schedules", *ranked, *chosen), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibration", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help=f"default: {RESULT.name}")
    parser.add_argument("--fit", action="store_true", help="look for better constants; takes minutes")
    chosen = parser.parse_args(argv)
    output = console()
    recordings = load_all()
    rows = [calibrate(recording) for recording in recordings]
    output.print(summary(rows))
    documents.write(chosen.json, {"schema": SCHEMA, "costs": asdict(CostModel()), "rows": [asdict(r) for r in rows]})
    if chosen.fit:
        costs, score = fit(recordings, CostModel())
        output.print(f"best constants: {costs}, mean Spearman {score:.4f}")
        left_out = cross_validate(recordings, CostModel())
        good = sum(found >= GOOD for found in left_out)
        mean = statistics.fmean(left_out)
        output.print(f"fitted to the other models: mean Spearman {mean:.4f}, {good} of {len(left_out)} at least {GOOD}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
