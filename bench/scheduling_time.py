"""`python -m bench.scheduling_time`: how long stream allocation takes, beside the paper's figures.

Takes: the recorded kernel graphs of the models in the paper's table of overheads. Gives: milliseconds of Algorithm 1
(`streams.opara`) and of Nimble's matching (`chains.nimble`), medians, as a table. Must not change: anything. Imports
no torch.

The paper schedules raw ATen operators and we Inductor's fused kernels, so our graphs are smaller; its processor is
not named. What must hold all the same: nobody waits longer for a schedule than with the paper's own code.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from bench.recorded import Recording, load_all
from bench.tables import console, table
from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling import chains, streams

T = TypeVar("T")

# model: milliseconds of (Algorithm 1, Nimble's matching), as the paper reports them
PAPER: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "bert_base": (0.58, 20.8),
        "googlenet": (0.27, 5.8),
        "nasnet_large": (1.75, 257.8),
        "inception_v3": (0.50, 14.4),
        "t5_small": (2.8, 161.4),
    }
)


@dataclass(frozen=True)
class Times:
    """Milliseconds, ours, on one recorded graph."""

    model: str
    kernels: int
    opara: float
    nimble: float


def timed(call: Callable[[], T], runs: int = 1) -> tuple[T, float]:
    """What `call` returns, and the median of its milliseconds over `runs`."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds) * 1e3


def measure(recordings: Sequence[Recording], runs: int = 15) -> list[Times]:
    """Both policies on each model of the paper's table: on the largest of its recordings."""
    largest: dict[str, KernelGraph] = {}
    for recording in recordings:
        model, graph = str(recording.about["model"]), recording.graph
        if model in PAPER and len(graph) > len(largest.get(model, ())):
            largest[model] = graph
    rows = []
    for model, graph in largest.items():
        chains.nimble(graph)  # imports networkx
        opara, nimble = (timed(partial(policy, graph), runs)[1] for policy in (streams.opara, chains.nimble))
        rows.append(Times(model, len(graph), opara, nimble))
    return rows


def main() -> int:
    """Print the table."""
    headings = ("model", "kernels", "Algorithm 1 ms", "paper", "Nimble's matching ms", "paper")
    found = measure(load_all())
    rows = []
    for times in found:
        paper = map(str, PAPER[times.model])
        rows.append((times.model, str(times.kernels), f"{times.opara:.3f}", next(paper), f"{times.nimble:.2f}", *paper))
    console().print(table("Time of stream allocation", headings, rows))
    missing = sorted(PAPER.keys() - {times.model for times in found})
    if missing:
        console().print(f"not recorded: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
