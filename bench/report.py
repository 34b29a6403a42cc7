"""Committed results -> the table a README shows.

Takes: results (`bench.samples`). Gives: Markdown. Must not change: anything. Imports no torch. Every figure in a
README comes from here, and a test keeps the two together.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.samples import Results, Row, median
from bench.tables import geometric_mean


def markdown(results: Results, base: str = "reduce-overhead", ours: str = "opara", batch: int = 1) -> str:
    """GPU and wall time of `ours` beside `base`, one row a case, and the geometric mean of the GPU ratios."""
    lines = [
        f"| model, batch {batch} | {base}, GPU ms | {ours}, GPU ms | speed-up | {base}, wall ms | {ours}, wall ms "
        "| kernels | streams |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ratios, processes = [], set()
    for case in results.cases():
        stock, mine = results.of(case, base), results.of(case, ours)
        if not stock or not mine or case[2] != batch:
            continue
        ratio = median(stock, "gpu") / median(mine, "gpu")
        ratios.append(ratio)
        processes.add(len(mine))
        lines.append(
            f"| {case[0]} {case[1]} | {_ms(stock, 'gpu')} | {_ms(mine, 'gpu')} | **{ratio:.2f}x** | "
            f"{_ms(stock, 'wall')} | {_ms(mine, 'wall')} | {mine[0].kernels} | {mine[0].streams} |"
        )
    if ratios:
        lines.append(f"| geometric mean of {len(ratios)} | | | **{geometric_mean(ratios):.2f}x** | | | | |")
    about = results.about
    count = " to ".join(str(n) for n in sorted({min(processes, default=0), max(processes, default=0)}))
    lines.append("")
    lines.append(
        f"{about['device']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}, {count} "
        f"process{'' if count == '1' else 'es'} a case: `{about['command']}`"
    )
    return "\n".join(lines)


def _ms(rows: Sequence[Row], clock: str) -> str:
    return f"{median(rows, clock) * 1e3:.3f}"
