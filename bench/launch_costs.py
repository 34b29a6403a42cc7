"""`python -m bench.launch_costs`: what launching, waiting and a further stream cost in the replay of a CUDA Graph.

Takes: a GPU, or whatever else plays a `shapes.Shape`. Gives: seconds beside the constants of the simulator's
`CostModel`, as a table and with --out as JSON. Must not change: anything else. Needs triton. Takes about ten seconds.

Kernels that do nothing but spin are captured in small shapes (`shapes`), replayed, and say themselves when they begin
and end. With --recorded the schedules in bench/kernel_graphs are replayed so, too, each kernel spinning for its
recorded duration, and the simulator's prediction is compared: what it says of launching alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import documents, shapes
from bench.calibration import Calibration, calibrate, summary
from bench.recorded import Measured, Recording, load_all
from bench.shapes import Played, Points, Shape
from bench.tables import console, table
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.costs import CostModel

SCHEMA = 1
STREAMS = 8
WIDTHS = (1, 2, 4, STREAMS)
CHAIN = 24
ROUNDS = 40  # of kernels that join: until all streams are in step, and some more
AGES = tuple(1e-6 * age for age in range(20, 160, 10))

Play = Callable[[Shape], Played]


@dataclass(frozen=True)
class Cost:
    """One cost of launching. name: the constant of `CostModel`, or a name of its own. points: what it was read off."""

    name: str
    meaning: str
    seconds: float | None
    points: Points = ()


def measure(play: Play) -> list[Cost]:
    """All costs, by shapes that `play` plays."""
    follows, hands_over = in_a_row(play)
    met = shapes.strangers()
    sync = shapes.delay(met, play(met), [len(met.seconds) - 1]) - follows
    late = follows + sync / 2
    fan = play(shapes.fan(STREAMS))
    interval = shapes.apart(fan, range(1, STREAMS + 1)) / (STREAMS - 1)
    branches, replays = side_by_side(play)
    waits, settling, ages = further_waits(play), settled(play, late), wait_ages(play)
    return [
        Cost("next", "a kernel begins after the one before it on its stream", follows),
        Cost("handed over", "or after one on another stream, if the two are in step", hands_over),
        Cost("further wait", "each wait of a kernel beyond the first adds", shapes.slope(waits), waits),
        Cost("launch_interval", "of kernels that wait for one, each begins after another", interval),
        Cost("branch_latency", "each stream of a replay begins after another", shapes.slope(branches), branches),
        Cost("sync_latency", "a kernel that joins streams not in step begins late by", sync),
        Cost("settling", "each further stream is in step after", shapes.slope(settling), settling),
        Cost("step_memory", "streams stay in step after a wait for", shapes.step(ages, late), ages),
        Cost("stream_latency", "each further stream lengthens a replay by", shapes.slope(replays), replays),
    ]


def in_a_row(play: Play) -> tuple[float, float]:
    """Seconds between two kernels of one chain: on one stream, and on two by turns once these are in step."""
    alone, turns = shapes.chains(1, CHAIN), shapes.handed_over(CHAIN).shape()
    return (
        shapes.delay(alone, play(alone), range(1, CHAIN)),
        shapes.delay(turns, play(turns), range(shapes.SETTLED, CHAIN)),
    )


def side_by_side(play: Play) -> tuple[Points, Points]:
    """By streams beyond the first: seconds until all have begun, and those of a replay in which no kernel runs."""
    begun, idle = [], []
    for width in WIDTHS:
        played = play(shapes.chains(width, shapes.SETTLED))
        begun.append((float(width - 1), shapes.apart(played, range(width))))
        busy = shapes.middle([max(end for _, end in trace) for trace in played.traces])
        idle.append((float(width - 1), played.seconds - busy))
    return tuple(begun), tuple(idle)


def further_waits(play: Play) -> Points:
    """By waits of a kernel beyond the first: seconds from the last end to its begin, once all streams are in step."""
    points = []
    for waits in (1, 2, 4, STREAMS - 1):
        shape, joins = shapes.joined(waits + 1, waits, ROUNDS)
        points.append((float(waits - 1), shapes.delay(shape, play(shape), joins[3 * ROUNDS // 4 :])))
    return tuple(points)


def settled(play: Play, late: float) -> Points:
    """By streams beyond the first: when, in a replay, the last kernel began more than `late` after those it joins."""
    points = []
    for width in WIDTHS[1:]:
        shape, joins = shapes.joined(width, 1, ROUNDS)
        played = play(shape)
        delays = [shapes.delays(shape, played, kernel) for kernel in joins]
        last = [
            max(
                (trace[kernel][0] for kernel, own in zip(joins, delays, strict=True) if own[replay] > late), default=0.0
            )
            for replay, trace in enumerate(played.traces)
        ]
        points.append((float(width - 1), shapes.middle(last)))
    return tuple(points)


def wait_ages(play: Play) -> Points:
    """By how long before the awaited kernel ended: seconds from the end of the other one to the begin."""
    points = []
    for age in AGES:
        shape = shapes.stale(age + shapes.SPIN)
        played = play(shape)
        awaited, before, last = range(len(shape.seconds) - 3, len(shape.seconds))
        passed = shapes.middle([trace[before][1] - trace[awaited][1] for trace in played.traces])
        points.append((passed, shapes.delay(shape, played, [last])))
    return tuple(points)


def replayed(recording: Recording, play: Play, follows: float) -> Calibration:
    """Prediction beside measurement for kernels that spin as long as the recorded ones take, one block each.

    follows: the part of a kernel's duration that is not its own but goes by until it begins.
    """
    durations = recording.profile.durations()
    spins = tuple(max(0.0, seconds - follows) for seconds in durations)
    measured = tuple(Measured(m.schedule, play(Shape(m.schedule, spins)).seconds) for m in recording.measured)
    kernels = tuple(KernelProfile(seconds, 0.0, memory_bound=False) for seconds in durations)
    return calibrate(replace(recording, profile=Profile(kernels, recording.profile.device), measured=measured))


def shown(costs: Sequence[Cost], model: CostModel) -> Table:
    """Microseconds, beside those of `model` where it has them."""
    rows = []
    for cost in costs:
        known = getattr(model, cost.name, None)
        rows.append((cost.meaning, _micro(cost.seconds), cost.name if known is not None else "", _micro(known)))
    return table("Costs of launching in a CUDA Graph, in microseconds", ("", "measured", "constant", "model"), rows)


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.launch_costs", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--recorded", action="store_true", help="also replay the recorded schedules; takes longer")
    chosen = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("bench.launch_costs needs an NVIDIA GPU; torch finds none", file=sys.stderr)
        return 2
    try:
        from bench.spinning import play
    except ImportError as error:
        print(f"bench.launch_costs needs triton: {error}", file=sys.stderr)
        return 2

    output = console()
    costs = measure(play)
    output.print(shown(costs, CostModel()))
    tick = shapes.tick(play(shapes.chains(1, CHAIN)))
    output.print(f"The GPU's clock ticks every {1e9 * tick:.0f} ns.")
    rows: list[Calibration] = []
    if chosen.recorded:
        follows = costs[0].seconds or 0.0
        rows = [replayed(r, lambda shape: play(shape, replays=1, bursts=1), follows) for r in load_all()]
        output.print(summary(rows))
    if chosen.out is not None:
        documents.write(chosen.out, document(costs, rows, tick, chosen.commit))
    return 0


def document(costs: Sequence[Cost], rows: Sequence[Calibration], tick: float, commit: str | None) -> dict[str, Any]:
    """What is written with --out."""
    from bench.about import environment

    about = environment(commit, program="python -m bench.launch_costs")
    found = {"costs": [asdict(cost) for cost in costs], "tick": tick, "recorded": [asdict(row) for row in rows]}
    return {"schema": SCHEMA, **about, **found}


if __name__ == "__main__":
    raise SystemExit(main())
