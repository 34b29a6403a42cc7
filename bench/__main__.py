"""`python -m bench run`: measure and print; see `bench.run`.

Takes: command-line arguments. Gives: a table on standard output and, with --out, a JSON file.
Must not change: anything else.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from bench import models
from bench.readme import PAGES, renewed
from bench.run import Row, run, save
from bench.tables import console, table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 if every figure could be reported."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of the opara backend.")
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="measure models under several backends, interleaved in one process")
    runner.add_argument("--models", nargs="+", default=["googlenet"], choices=models.names(), metavar="NAME")
    runner.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16"])
    runner.add_argument("--batches", nargs="+", type=int, default=[1])
    runner.add_argument(
        "--backends", nargs="+", default=None, help="default: reduce-overhead on a GPU, inductor without; opara"
    )
    runner.add_argument("--rounds", type=int, default=7)
    runner.add_argument("--small", action="store_true", help="reduced models, for machines without a GPU")
    runner.add_argument("--out", help="write the samples to this JSON file")
    runner.add_argument("--record", type=Path, help="write the kernel graphs the last backend made to this folder")
    runner.add_argument("--commit", help="commit to record, where git cannot tell")
    commands.add_parser("readme", help="renew the generated parts of README.md and docs/").set_defaults(models=None)
    chosen = parser.parse_args(argv)
    if chosen.models is None:
        for page in PAGES:
            page.write_text(renewed(page.read_text()))
        return 0
    stock = "reduce-overhead" if torch.cuda.is_available() else "inductor"
    backends = chosen.backends or [stock, "opara"]
    rows: list[Row] = []
    output = console()
    cases = run(
        chosen.models,
        chosen.dtypes,
        chosen.batches,
        backends,
        rounds=chosen.rounds,
        small=chosen.small,
        record_to=chosen.record,
        commit=chosen.commit,
    )
    for case in cases:
        rows.extend(case)
        output.print(_table(case))
        if chosen.out:  # after every case: a long run that is cut off keeps what it has
            save(chosen.out, rows, chosen.commit)
    return 0


def _table(case: list[Row]) -> Table:
    first = case[0]
    speed_up = f"speed-up over {first.backend}"
    headings = ("backend", "gpu ms", "wall ms", speed_up, "first call s", "kernels", "streams")
    base = statistics.median(first.samples.best_clock)
    rows: list[tuple[str, ...]] = []
    for row in case:
        gpu = "-" if row.samples.gpu is None else f"{statistics.median(row.samples.gpu) * 1e3:.3f}"
        rows.append(
            (
                row.backend,
                gpu,
                f"{statistics.median(row.samples.wall) * 1e3:.3f}",
                f"{base / statistics.median(row.samples.best_clock):.2f}x",
                f"{row.first_call_seconds:.1f}",
                str(row.kernels or "-"),
                str(row.streams or "-"),
            )
        )
        rows.extend((f"  {text}",) for text in row.fallbacks)
    return table(f"{first.model} {first.dtype} batch {first.batch}", headings, rows)


if __name__ == "__main__":
    raise SystemExit(main())
