"""Rows -> tables people read, and what of them could not be reported.

Takes: rows of `bench.samples`, of one or several processes. Gives: rich tables. Imports no torch.
Must not change: anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from bench.samples import MIB, Case, Results, Row, median, spread
from bench.tables import table

HEADINGS = (
    *("gpu ms", "wall ms", "p90", "rounds", "procs", "graph", "cold s", "warm s", "search s", "peak MiB"),
    *("kernels", "streams"),
)


def case_table(results: Results, case: Case) -> Table:
    """One case: a line per variant, the speed-up over the first, and below them what went wrong.

    rounds: middle half of the rounds over their median; procs: how far the processes' medians lie apart.
    """
    backends = list(dict.fromkeys(row.backend for row in results.rows if row.case == case))
    base = results.of(case, backends[0])
    lines: list[tuple[str, ...]] = []
    notes: list[str] = []
    for backend in backends:
        rows = results.of(case, backend)
        if rows:
            ratio = f"{median(base) / median(rows):.2f}x" if base and _on_gpu(base) == _on_gpu(rows) else "-"
            lines.append((backend, ratio, *_figures(rows)))
        else:
            lines.append((backend, "-"))
        failed = [r for r in results.rows if r.case == case and r.backend == backend and r.problem]
        said = [*(f"NOT REPORTED: {r.problem}" for r in failed), *(f for r in rows for f in r.fallbacks)]
        notes.extend(f"{backend}: {note}" for note in dict.fromkeys(said))
    model, dtype, batch = case
    made = table(f"{model} {dtype} batch {batch}", ("backend", f"over {backends[0]}", *HEADINGS), lines)
    made.caption = Text("\n".join(notes))
    made.caption_justify = "left"
    return made


def _on_gpu(rows: Sequence[Row]) -> bool:
    """True if the GPU's own time of all `rows` is known."""
    return all(row.samples is not None and row.samples.gpu is not None for row in rows)


def problems(results: Results) -> list[Row]:
    """Rows whose figure is not reported."""
    return [row for row in results.rows if row.samples is None]


def _figures(rows: Sequence[Row]) -> tuple[str, ...]:
    samples = [row.samples for row in rows if row.samples is not None]
    gpu = f"{median(rows, 'gpu') * 1e3:.3f}" if all(s.gpu is not None for s in samples) else "-"
    rounds = statistics.median(middle_half(s.best_clock) for s in samples)
    return (
        gpu,
        f"{median(rows, 'wall') * 1e3:.3f}",
        f"{median(rows, 'wall_p90') * 1e3:.3f}",
        f"{rounds:.1%}",
        f"{spread(rows):.1%}" if len(rows) > 1 else "-",
        captured(rows[0]),
        *(_middle([getattr(r, name) for r in rows]) for name in ("cold_seconds", "warm_seconds", "search_seconds")),
        _middle([None if r.peak_bytes is None else r.peak_bytes / MIB for r in rows]),
        str(rows[0].kernels or "-"),
        str(rows[0].streams or "-"),
    )


def middle_half(values: Sequence[float]) -> float:
    """How far the middle half of `values` reaches, as a fraction of the median; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def captured(row: Row) -> str:
    """Whether a CUDA Graph really ran: graphs replayed by one call."""
    if row.replays is None:
        return "-" if not row.captured else "yes"
    return f"yes ({row.replays})" if row.replays else "no"


def _middle(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known):.1f}" if known else "-"
