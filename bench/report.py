"""Committed results -> the table a README shows.

Takes: a results file (`bench.run`). Gives: Markdown. Must not change: the file. Every figure in a README comes from
here, and a test keeps the two together.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import documents
from bench.run import SCHEMA
from bench.tables import geometric_mean


def load(path: Path) -> dict[str, Any]:
    """The document at `path`; ValueError if it is of another schema."""
    return documents.read(path, SCHEMA)


def markdown(document: dict[str, Any], base: str = "reduce-overhead", ours: str = "opara") -> str:
    """GPU and wall time of `ours` beside `base`, one row a case, and the geometric mean of the GPU ratios."""
    cases: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in document["rows"]:
        cases.setdefault((row["model"], row["dtype"], row["batch"]), {})[row["backend"]] = row
    lines = [
        f"| model, batch 1 | {base}, GPU ms | {ours}, GPU ms | speed-up | {base}, wall ms | {ours}, wall ms "
        "| kernels | streams |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ratios = []
    for (model, dtype, batch), rows in cases.items():
        if base not in rows or ours not in rows or batch != 1:
            continue
        stock, mine = rows[base]["samples"], rows[ours]["samples"]
        ratio = _median(stock["gpu"]) / _median(mine["gpu"])
        ratios.append(ratio)
        lines.append(
            f"| {model} {dtype} | {_ms(stock['gpu'])} | {_ms(mine['gpu'])} | **{ratio:.2f}x** | {_ms(stock['wall'])} | "
            f"{_ms(mine['wall'])} | {rows[ours]['kernels']} | {rows[ours]['streams']} |"
        )
    lines.append(f"| geometric mean of {len(ratios)} | | | **{geometric_mean(ratios):.2f}x** | | | | |")
    lines.append("")
    lines.append(
        f"{document['device']}, driver {document['driver']}, torch {document['torch']}, commit {document['commit']}: "
        f"`{document['command']}`"
    )
    return "\n".join(lines)


def _median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def _ms(seconds: Sequence[float]) -> str:
    return f"{_median(seconds) * 1e3:.3f}"
