"""`python -m bench.schedule_quality`: how good the schedules of each policy are on the recorded graphs, without a GPU.

Takes: the recorded kernel graphs, and what an earlier version made of them (the baseline). Gives: a table; with --json
the figures; exit code 1 if a schedule got worse by more than `LIMIT` or one of the baseline is gone, 2 if there is no
baseline to compare with. Must not change: anything, but the baseline with --update. Imports no torch. Deterministic but
for the times, which are shown and neither written nor compared.

Three figures are compared, for every graph and policy, each the lower the better: the simulated makespan over the
bound that no schedule can beat, the waits, and the bytes of the arena.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import documents
from bench.recorded import Recording, load_all
from bench.regressions import Comparison, Figures, compare
from bench.scheduling_time import timed
from bench.tables import console, geometric_mean, table
from opara_backend.memory import plan_memory
from opara_backend.scheduling import bounds
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.simulator import simulate

SCHEMA = 1
BASELINE = documents.RESULTS / "schedule_quality.json"
LIMIT = 0.01
COMPARED = ("makespan_over_bound", "waits", "arena_bytes")
COMBINATIONS = (  # policy, launch order, streams
    ("opara", "opara", 8),
    ("opara", "critical_path", 8),
    ("opara", "program", 8),
    ("nimble", "opara", 8),
    ("nimble", "critical_path", 8),
    ("wavefront", "program", 8),
    ("list_k", "critical_path", 4),
    ("list_k", "critical_path", 8),
    ("list_k", "opara", 8),
    ("just_in_time", "critical_path", 4),
    ("sequential", "program", 1),
)


@dataclass(frozen=True)
class Quality:
    """One policy on one graph. unshared_bytes: what the arena would take if no two buffers shared bytes."""

    graph: str
    policy: str
    streams: int
    waits: int
    arena_bytes: int
    unshared_bytes: int
    makespan_over_bound: float
    scheduling_ms: float


def measure(recording: Recording) -> Iterator[Quality]:
    """The quality of every combination on one graph; ValueError if it was recorded without a GPU."""
    graph, profile, device = recording.graph, recording.profile, recording.profile.device
    if device is None:
        raise ValueError(f"{recording.name} was recorded without a GPU, so nothing can be simulated")
    for policy, order, width in COMBINATIONS:
        schedule, milliseconds = timed(partial(build, graph, profile, policy=policy, launch_order=order, streams=width))
        plan = plan_memory(graph, schedule)
        makespan = simulate(graph, profile, schedule, device).makespan
        yield Quality(
            graph=recording.name,
            policy=f"{schedule.policy} on {width}",
            streams=schedule.streams,
            waits=schedule.wait_count,
            arena_bytes=plan.arena_bytes,
            unshared_bytes=plan.requested_bytes,
            makespan_over_bound=round(1 + bounds.gap(makespan, graph, profile), 6),
            scheduling_ms=milliseconds,
        )


def document(qualities: Sequence[Quality]) -> dict[str, Any]:
    """What is written: all but the times, so that two runs write the same bytes."""
    rows = [{name: value for name, value in asdict(q).items() if name != "scheduling_ms"} for q in qualities]
    return {"schema": SCHEMA, "rows": rows}


def figures(rows: Iterable[Mapping[str, Any]]) -> Figures:
    """What is compared, of the rows of a document."""
    return {(row["graph"], row["policy"]): {name: row[name] for name in COMPARED} for row in rows}


def summary(qualities: Sequence[Quality]) -> Table:
    """One line a policy: means and sums over all graphs, and the graph it is worst on."""
    lines = []
    for policy in dict.fromkeys(q.policy for q in qualities):
        own = [q for q in qualities if q.policy == policy]
        worst = max(own, key=lambda q: q.makespan_over_bound)
        over_bound = geometric_mean(q.makespan_over_bound for q in own)
        shared = geometric_mean(q.arena_bytes / q.unshared_bytes for q in own if q.arena_bytes)
        lines.append(
            (
                policy,
                str(max(q.streams for q in own)),
                str(sum(q.waits for q in own)),
                f"{shared:.1%}",
                f"{over_bound:.3f}",
                f"{over_bound - 1:.1%}",
                f"{worst.makespan_over_bound:.3f} {worst.graph}",
                f"{sum(q.scheduling_ms for q in own):.1f}",
            )
        )
    title = f"{len({q.graph for q in qualities})} recorded graphs: geometric means; sums of waits and times"
    headings = ("policy on streams", "used", "waits", "arena / unshared", "makespan / bound", "predicted gap")
    return table(title, (*headings, "worst makespan / bound", "scheduling ms"), lines)


def report(comparison: Comparison) -> Iterator[Table | str]:
    """What a person has to know of it."""
    headings = ("graph", "policy on streams", "figure", "baseline", "now", "change")
    if comparison.better:
        yield table("Better than the baseline", headings, [change.row() for change in comparison.better])
    if comparison.worse:
        yield table("WORSE than the baseline", headings, [change.row() for change in comparison.worse])
    for word, keys in (("new", comparison.new), ("gone", comparison.gone)):
        yield from (f"{word}: {graph}, {policy}" for graph, policy in keys)
    yield "as good as the baseline" if comparison.accepted else "if this is meant, write a new baseline with --update"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.schedule_quality", description=__doc__)
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help=f"default: {BASELINE.name}")
    parser.add_argument("--update", action="store_true", help="write the baseline, whatever got worse")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    chosen = parser.parse_args(argv)
    output = console()
    qualities = [quality for recording in load_all() for quality in measure(recording)]
    output.print(summary(qualities))
    found = document(qualities)
    if chosen.json:
        documents.write(chosen.json, found)
    accepted = True
    if chosen.baseline.exists() or not chosen.update:
        try:
            before = documents.read(chosen.baseline, SCHEMA)
        except (OSError, ValueError) as error:
            output.print(f"no baseline to compare with: {error}\nwrite one with --update")
            return 2
        comparison = compare(figures(before["rows"]), figures(found["rows"]), limit=LIMIT)
        accepted = comparison.accepted
        for part in report(comparison):
            output.print(part)
    if chosen.update:
        documents.write(chosen.baseline, found)
    return 0 if accepted or chosen.update else 1


if __name__ == "__main__":
    raise SystemExit(main())
