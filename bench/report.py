"""Committed results -> the tables that README and docs show.

Takes: results (`bench.samples`). Gives: Markdown. Must not change: anything. Imports no torch. Every figure on a page
comes from here, and a test keeps the two together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from bench.samples import LEAN, MIB, OURS, STOCK, Case, Results, Row, median
from bench.tables import geometric_mean


def markdown(results: Results, base: str = STOCK, ours: str = OURS, batch: int = 1) -> str:
    """GPU and wall time of `ours` beside `base`, one row a case, and the geometric means of both ratios."""
    lines = _head(
        *(f"model, batch {batch}", f"{base}, GPU ms", f"{ours}, GPU ms", "speed-up"),
        *(f"{base}, wall ms", f"{ours}, wall ms", "wall speed-up", "kernels", "streams"),
    )
    ratios, on_the_wall, processes = [], [], set()
    for case, stock, mine in results.both(base, ours):
        if case[2] != batch:
            continue
        ratio = median(stock, "gpu") / median(mine, "gpu")
        ratios.append(ratio)
        on_the_wall.append(median(stock, "wall") / median(mine, "wall"))
        processes.add(len(mine))
        lines.append(
            f"| {case[0]} {case[1]} | {_ms(stock, 'gpu')} | {_ms(mine, 'gpu')} | **{ratio:.2f}x** | "
            f"{_ms(stock, 'wall')} | {_ms(mine, 'wall')} | {on_the_wall[-1]:.2f}x | "
            f"{mine[0].kernels} | {mine[0].streams} |"
        )
    if ratios:
        gpu, wall = (f"**{geometric_mean(found):.2f}x**" for found in (ratios, on_the_wall))
        lines.append(_line(f"geometric mean of {len(ratios)}", "", "", gpu, "", "", wall, "", ""))
    lines += ["", _origin(results, processes)]
    return "\n".join(lines)


def batches(results: Results) -> str:
    """How many times as fast as stock by GPU time, one row a model, one column a batch; and the geometric means."""
    columns = sorted({case[2] for case in results.cases()})
    found: dict[str, dict[int, float]] = {}
    processes = set()
    for case, stock, mine in results.both():
        found.setdefault(f"{case[0]} {case[1]}", {})[case[2]] = median(stock, "gpu") / median(mine, "gpu")
        processes.add(len(mine))
    lines = _head("model", *(f"batch {batch}" for batch in columns))
    for name, by_batch in found.items():
        lines.append(_line(name, *(f"{by_batch[b]:.2f}x" if b in by_batch else "" for b in columns)))
    means = [[by[b] for by in found.values() if b in by] for b in columns]
    lines.append(_line("geometric mean", *(f"**{geometric_mean(m):.2f}x** of {len(m)}" if m else "" for m in means)))
    return "\n".join([*lines, "", _origin(results, processes)])


def gaps(results: Results) -> str:
    """What a call takes above its critical path at batch 1, by cause, as shares of its GPU time."""
    lines = _head(
        "model, batch 1",
        "GPU us",
        "critical path",
        "in turn on a stream",
        "launches and joins",
        "contention",
        "streams",
    )
    processes = set()
    for case in results.cases():
        rows = [row for row in results.of(case, OURS) if row.path_seconds is not None]
        if not rows or case[2] != 1:
            continue
        processes.add(len(rows))
        whole = median(rows, "gpu")
        parts = [statistics.median(getattr(row, name) for row in rows) for name in PARTS]
        shares = [f"{part / whole:.0%}".replace("-0%", "0%") for part in (*parts, whole - sum(parts))]
        lines.append(_line(f"{case[0]} {case[1]}", f"{whole * 1e6:.0f}", *shares, str(rows[0].streams)))
    return "\n".join([*lines, "", _origin(results, processes)])


PARTS = ("path_seconds", "streams_seconds", "launch_seconds")


def memory(results: Results) -> str:
    """Bytes reserved on the GPU beyond model and inputs, at most and once warm; and all in all, over stock's.

    The same with no schedule that takes much more than one stream (`LEAN`), and its speed-up, where that was measured.
    """
    lean = any(row.backend == LEAN for row in results.rows)
    lines = _head(
        *("model", "batch", "model and inputs, MiB", f"{STOCK}: at most, held", f"{OURS}: at most, held"),
        *("arena", "all in all, at most", *([f"`{LEAN}`: at most", "speed-up"] if lean else [])),
    )
    processes = set()
    for case, stock, mine in results.both():
        if any(row.peak_bytes is None or row.held_bytes is None for row in (*stock, *mine)):
            continue
        processes.add(len(mine))
        model = _middle(mine, "model_bytes")
        peaks = [_middle(rows, "peak_bytes") for rows in (stock, mine)]
        held = [_middle(rows, "held_bytes") for rows in (stock, mine)]
        pairs = [f"{peak / MIB:.0f}, {kept / MIB:.0f}" for peak, kept in zip(peaks, held, strict=True)]
        arena, ratio = _middle(mine, "arena_bytes") / MIB, (model + peaks[1]) / (model + peaks[0])
        cells = [f"{model / MIB:.0f}", *pairs, f"{arena:.1f}", f"{ratio:.2f}x"]
        if lean:
            small = [row for row in results.of(case, LEAN) if row.peak_bytes is not None]
            most = (model + _middle(small, "peak_bytes")) / (model + peaks[0]) if small else 0.0
            cells += [f"{most:.2f}x", f"{median(stock, 'gpu') / median(small, 'gpu'):.2f}x"] if small else ["", ""]
        lines.append(_line(f"{case[0]} {case[1]}", str(case[2]), *cells))
    return "\n".join([*lines, "", _origin(results, processes)])


def policies(results: Results) -> str:
    """How many times as fast the schedule that was chosen is as those of other policies, on the same kernels.

    And stock's kernels on one stream beside stock, which runs them so; empty where that was not measured. At the
    smallest batch.
    """
    batch = min((case[2] for case in results.cases()), default=1)
    others = ("opara:paper", "opara:nimble", "opara:wavefront")
    head = ("over one stream", f"one stream over {STOCK}, its kernels")
    lines = _head(f"model, batch {batch}", *(f"over `{other}`" for other in others), *head)
    found: list[list[float]] = [[] for _ in range(5)]
    processes = set()
    in_a_row = [r.backend for r in results.rows if r.backend.startswith("opara:sequential")]
    rewritten, plain = (next((b for b in in_a_row if ("plain" in b) is wanted), "") for wanted in (False, True))
    for case, stock, mine in results.both():
        rows = [results.of(case, name) for name in (*others, rewritten)]
        if case[2] != batch or not all(rows):
            continue
        processes.add(len(mine))
        ratios = [median(other, "gpu") / median(mine, "gpu") for other in rows]
        alone = results.of(case, plain) or (rows[-1] if not any(row.rewrites for row in rows[-1]) else ())
        if alone:
            ratios.append(median(stock, "gpu") / median(alone, "gpu"))
        for column, ratio in zip(found, ratios, strict=False):
            column.append(ratio)
        cells = [f"{ratio:.2f}x" for ratio in ratios]
        lines.append(_line(f"{case[0]} {case[1]}", *cells, *[""] * (5 - len(cells))))
    if processes:
        means = (f"**{geometric_mean(column):.2f}x**" if column else "" for column in found)
        lines.append(_line("geometric mean", *means))
    return "\n".join([*lines, "", _origin(results, processes)])


def options(results: Results) -> str:
    """GPU time under an option over the time without, one row a model, one column each variant of `opara`."""
    variants = sorted({row.backend for row in results.rows if row.backend.startswith(f"{OURS}:")})
    lines = _head("model", *(f"`{variant.removeprefix(f'{OURS}:')}`" for variant in variants))
    processes = set()
    for case in results.cases():
        cells = []
        for variant in variants:
            rows = results.of(case, variant)
            same = {row.process for row in rows}
            plain = [row for row in results.of(case, OURS) if row.process in same]
            cells.append(f"{median(rows, 'gpu') / median(plain, 'gpu'):.2f}x" if rows and plain else "")
            processes.update({len(rows)} - {0})
        if any(cells):
            lines.append(_line(f"{case[0]} {case[1]}", *cells))
    return "\n".join([*lines, "", _origin(results, processes)])


def host(results: Results) -> str:
    """What a call takes beyond the GPU's time at batch 1, and what of it is Dynamo's, whatever the backend; in us."""
    lines = _head("model, batch 1", "Dynamo alone", *(f"{backend}, wall - GPU" for backend in (STOCK, OURS)))
    processes = set()
    for case, stock, mine in results.both():
        alone = results.of(case, "dynamo")
        if case[2] != 1 or not alone:
            continue
        processes.add(len(mine))
        taken = [median(alone, "wall"), *(median(rows, "wall") - median(rows, "gpu") for rows in (stock, mine))]
        lines.append(_line(f"{case[0]} {case[1]}", *(f"{seconds * 1e6:.0f}" for seconds in taken)))
    return "\n".join([*lines, "", _origin(results, processes)])


def searches(results: Results) -> str:
    """Seconds a search takes by batch, the most of any process at any, and its first part, the profile.

    Kernels and profile are of the smallest batch that was measured.
    """
    found: dict[str, dict[int, list[Row]]] = {}
    for case in results.cases():
        rows = [row for row in results.of(case, OURS) if row.search_seconds and row.profile_seconds]
        if rows:
            found.setdefault(f"{case[0]} {case[1]}", {})[case[2]] = rows
    columns = sorted({batch for by_batch in found.values() for batch in by_batch})
    lines = _head("model", "kernels", *(f"batch {batch}, s" for batch in columns), "at most, s", "the profile, s")
    processes = {len(rows) for by_batch in found.values() for rows in by_batch.values()}
    for name, by_batch in found.items():
        taken = [f"{_middle(by_batch[b], 'search_seconds'):.2f}" if b in by_batch else "" for b in columns]
        most = max(row.search_seconds or 0 for rows in by_batch.values() for row in rows)
        least = by_batch[min(by_batch)]
        lines.append(
            _line(name, str(least[0].kernels), *taken, f"{most:.2f}", f"{_middle(least, 'profile_seconds'):.2f}")
        )
    return "\n".join([*lines, "", _origin(results, processes)])


def lowerings(results: Results) -> str:
    """What rewrites do to the time of a replay, as the first call timed them, at batch 1; below 1 is faster.

    One column each rewrite alone, and one all that were timed in that case. Ratios are of one process each.
    """
    raced: dict[Case, list[Mapping[frozenset[str], float]]] = {}
    for row in results.rows:
        timed = {frozenset(rewrites): seconds for rewrites, seconds in row.lowerings}
        if row.samples is not None and row.batch == 1 and NO_REWRITES in timed:
            raced.setdefault(row.case, []).append(timed)
    columns = sorted({name for found in raced.values() for timed in found for names in timed for name in names})
    lines = _head("model, batch 1", "without, us a replay", *(f"`{name}`" for name in columns), "all together")
    for case, found in raced.items():
        without = statistics.median(timed[NO_REWRITES] for timed in found)
        everything = frozenset(name for timed in found for names in timed for name in names)
        cells = []
        for names in (*(frozenset({name}) for name in columns), everything):
            ratios = [timed[names] / timed[NO_REWRITES] for timed in found if names in timed]
            cells.append(f"{statistics.median(ratios):.2f}x" if ratios else "")
        lines.append(_line(f"{case[0]} {case[1]}", f"{without * 1e6:.0f}", *cells))
    return "\n".join([*lines, "", _origin(results, {len(found) for found in raced.values()})])


NO_REWRITES: frozenset[str] = frozenset()

TABLES: Mapping[str, Callable[[Results], str]] = {
    "results": markdown,
    "batches": batches,
    "gaps": gaps,
    "memory": memory,
    "policies": policies,
    "searches": searches,
    "host": host,
    "times": options,
    "lowerings": lowerings,
}


def _middle(rows: Sequence[Row], name: str) -> float:
    return statistics.median(getattr(row, name) or 0 for row in rows)


def _head(*cells: str) -> list[str]:
    return [_line(*cells), _line(*("---" for _ in cells))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(results: Results, processes: set[int]) -> str:
    """What the figures were measured on, and the command that measures them again."""
    about = results.about
    count = " to ".join(str(n) for n in sorted({min(processes, default=0), max(processes, default=0)}))
    return (
        f"{about['device']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}, {count} "
        f"process{'' if count == '1' else 'es'} a case: `{about['command']}`"
    )


def _ms(rows: Sequence[Row], clock: str) -> str:
    return f"{median(rows, clock) * 1e3:.3f}"
