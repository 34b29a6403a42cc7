"""`python -m bench compare BEFORE AFTER`: which figures moved, beyond a threshold and beyond the noise.

Takes: two results files. Gives: a table of ratios with confidence intervals; exit code 1 if a variant got slower, or
can no longer be reported, or is gone; 2 if nothing could be compared. Must not change: anything. Imports no torch.

Slower: the ratio is beyond the threshold, beyond what chance makes of the noise between processes in any of the ratios,
*and* its whole interval lies above 1. The table says from where on a ratio counts. Variants that replay a CUDA Graph
and those that do not, which wait for the host, are not equally noisy: neither is judged by the other's noise. With
--base every time is taken relative to that backend's in the same round, so that two machines, or one that drifts, can
be compared.

Every backend with `FEWEST` cases is judged over all of them, too, as what slows each a little is lost in the noise of
each: by the geometric mean of its ratios, where the noisy ones weigh less, and none more than one of the usual noise.
That takes cases to be independent: what shifts a whole run (another host, a warmer GPU) counts as well, unless there is
a base. Single ratios and those over all cases are two families: in each, chance passes none with the confidence asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bench.samples import Case, Results, Row, loaded
from bench.stats import (
    Groups,
    Ratio,
    Sides,
    Weighted,
    beyond,
    mean_beyond,
    mean_ratio,
    process_noise,
    ratio,
    relative,
    usual_noise,
)
from bench.tables import console, table

THRESHOLD, CONFIDENCE = 0.03, 0.99
FEWEST = 3  # cases of a backend that are judged together
SLOWER, FASTER, SAME, GONE, BROKEN = "SLOWER", "faster", "", "GONE", "NOT REPORTED"
COUNTED = ((SLOWER, "slower"), (BROKEN, "no longer reported"), (GONE, "only in the first file"))


@dataclass(frozen=True)
class Moved:
    """One variant of one case, or, where `case` is None, one backend over as many `cases` as it has.

    ratio: times as long as before, over several cases a mean; None where one side has no figure. limit: the ratio from
    which on it would count as slower. processes: of the side that has fewest.
    """

    case: Case | None
    backend: str
    ratio: Ratio | None
    verdict: str
    limit: float | None = None
    processes: int = 0
    cases: int = 1

    @property
    def accepted(self) -> bool:
        """False if this must not pass."""
        return self.verdict not in (SLOWER, GONE, BROKEN)


@dataclass(frozen=True)
class _Pair:
    """The samples of one variant of one case, before and after; a side that has none is empty."""

    case: Case
    backend: str
    sides: Sides
    replays: bool


def compare(
    before: Results,
    after: Results,
    *,
    threshold: float = THRESHOLD,
    confidence: float = CONFIDENCE,
    base: str | None = None,
    clock: str = "best_clock",
) -> Iterator[Moved]:
    """Every variant that was reported before, and after them every backend with `FEWEST` cases on both sides.

    base: the backend that times are relative to, left out itself.
    """
    pairs = [
        _Pair(
            case,
            backend,
            (groups(before, case, backend, base, clock), groups(after, case, backend, base, clock)),
            any(row.replays for row in before.of(case, backend)),
        )
        for case in before.cases()
        for backend in dict.fromkeys(row.backend for row in before.rows if row.case == case)
        if backend != base
    ]
    usual = {
        replays: usual_noise(side for pair in pairs if pair.replays is replays for side in pair.sides if side)
        for replays in (True, False)
    }
    judged: dict[str, list[Weighted]] = {}
    for pair in pairs:
        old, new = pair.sides
        if old and new:
            found = ratio(old, new, confidence=confidence)
            noise = max(usual[pair.replays], process_noise(pair.sides))
            judged.setdefault(pair.backend, []).append((pair.sides, noise))
            limit = max(1 + threshold, beyond(noise, old, new, confidence=confidence, comparisons=len(pairs)))
            yield Moved(pair.case, pair.backend, found, verdict(found, limit - 1), limit, min(len(old), len(new)))
        elif old:
            failed = any(r.case == pair.case and r.backend == pair.backend for r in after.rows)
            yield Moved(pair.case, pair.backend, None, BROKEN if failed else GONE)
    many = {backend: cases for backend, cases in judged.items() if len(cases) >= FEWEST}
    for backend, cases in many.items():
        found = mean_ratio(cases, confidence=confidence)
        limit = max(1 + threshold, mean_beyond(cases, confidence=confidence, comparisons=len(many)))
        processes = min(len(side) for sides, _ in cases for side in sides)
        yield Moved(None, backend, found, verdict(found, limit - 1), limit, processes, len(cases))


def verdict(found: Ratio, threshold: float) -> str:
    """What a ratio means."""
    if found.value > 1 + threshold and found.low > 1:
        return SLOWER
    return FASTER if found.value < 1 / (1 + threshold) and found.high < 1 else SAME


def groups(results: Results, case: Case, backend: str, base: str | None, clock: str) -> Groups:
    """Per process the samples of one variant, in seconds or relative to `base`; none on a clock that it has not.

    Dynamo alone leaves the GPU idle: beside `base` the best clock that both have is the wall's.
    """
    own, others = results.of(case, backend), results.of(case, base) if base is not None else ()
    if clock == "best_clock" and any(row.samples is not None and row.samples.gpu is None for row in (*own, *others)):
        clock = "wall"
    rows = _by_process(own, clock)
    if base is None:
        return list(rows.values())
    beside = _by_process(others, clock)
    both = [process for process in rows if process in beside]
    return relative([rows[p] for p in both], [beside[p] for p in both])


def _by_process(rows: Iterable[Row], clock: str) -> dict[int, list[float]]:
    found = {row.process: getattr(row.samples, clock) for row in sorted(rows, key=lambda row: row.process)}
    return {process: list(samples) for process, samples in found.items() if samples is not None}


def report(moved: Sequence[Moved], before: Results, after: Results) -> Iterator[Table | str]:
    """What a person has to know of it."""
    headings = ("case", "backend", "after / before", "interval", "counts from", "verdict")
    lines = [
        (
            " ".join(map(str, m.case)) if m.case else f"all {m.cases} cases",
            m.backend,
            f"{m.ratio.value:.3f}" if m.ratio else "-",
            f"{m.ratio.low:.3f} to {m.ratio.high:.3f}" if m.ratio else "-",
            f"{m.limit:.3f}" if m.limit else "-",
            m.verdict,
        )
        for m in moved
    ]
    yield table(f"commit {after.about['commit']} against {before.about['commit']}", headings, lines)
    different = [n for n in ("device", "driver", "torch", "cuda") if before.about[n] != after.about[n]]
    for name in different:
        yield f"not the same {name}: {before.about[name]} before, {after.about[name]} after"
    single = [m for m in moved if m.case]
    alone = sum(m.processes == 1 for m in single)
    if alone:
        unknown = "what differs between processes is not part of their intervals; use --processes 3"
        yield f"one process on a side in {alone} of {len(single)}: {unknown}"
    counts = [(sum(m.verdict == verdict for m in moved), text) for verdict, text in COUNTED]
    said = [f"{count} {text}" for count, text in counts if count]
    yield ", ".join(said) if said else "no regression"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `compare`."""
    parser = commands.add_parser(
        "compare", help="which figures moved between two results files; 1 if one got slower or is gone"
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help=f"how much slower is no regression whatever the noise; default {THRESHOLD}, 3 per cent",
    )
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help=f"of the intervals; default {CONFIDENCE}")
    parser.add_argument("--base", metavar="BACKEND", help="compare times relative to this backend's")
    parser.add_argument("--allow-missing", action="store_true", help="what only the first file holds is no regression")
    parser.add_argument("--clock", choices=("best_clock", "gpu", "wall", "wall_p90"), default="best_clock")
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `compare`."""
    output = console()
    results = loaded((chosen.before, chosen.after), output.print)
    if results is None:
        return 2
    before, after = results
    options = {"threshold": chosen.threshold, "confidence": chosen.confidence, "base": chosen.base}
    moved = list(compare(before, after, clock=chosen.clock, **options))
    if not moved:
        output.print("nothing to compare: no variant of the first file was reported")
        return 2
    for part in report(moved, before, after):
        output.print(part)
    allowed = (GONE,) if chosen.allow_missing else ()
    return 0 if all(m.accepted or m.verdict in allowed for m in moved) else 1
