"""`python -m bench run`: models x dtypes x batches x backends, in one process or several, with a progress bar.

Takes: what to measure. Gives: a table a case, and with --out a results file that is renewed after every case.
Exit code 1 if a figure could not be reported. Must not change: anything else.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import models
from bench.about import environment
from bench.first_calls import first_calls
from bench.run import Job, run_job
from bench.samples import Results, Row, save
from bench.summary import case_table, problems
from bench.tables import console
from bench.variants import accepted, defaults, variant
from bench.workers import measured
from opara_backend.commands.console import positive

DTYPES = ("float32", "float16", "bfloat16")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `run`."""
    parser = commands.add_parser("run", help="measure models under several backends, interleaved in one process")
    parser.add_argument("--models", nargs="+", default=["googlenet"], choices=models.names(), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--batches", nargs="+", type=positive, default=[1])
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"default: {' '.join(defaults())}; the first is what the others are compared with. "
        f"Known: {', '.join(accepted())}; after a colon also options, as in opara:nimble,streams=4",
    )
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each variant in a process")
    add_planted(parser)
    parser.add_argument(
        "--processes", type=positive, default=1, help="fresh processes, one after another; 1 is this one"
    )
    parser.add_argument(
        "--compile-times", action="store_true", help="first calls in fresh processes, caches cold, warm"
    )
    parser.add_argument("--small", action="store_true", help="reduced models, for machines without a GPU")
    parser.add_argument("--out", type=Path, help="write the samples to this JSON file")
    parser.add_argument("--record", type=Path, help="write the kernel graphs the last backend made to this folder")
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    parser.set_defaults(command=main)


def add_planted(parser: argparse.ArgumentParser) -> None:
    """The option that `run` and `campaign` share."""
    text = "slow every backend but the first down by this share (0.05), to see whether `compare` finds it"
    parser.add_argument("--planted", type=float, default=0.0, metavar="SHARE", help=text)


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """One job a case; ValueError for a backend nobody knows."""
    backends = tuple(chosen.backends or defaults())
    for name in backends:
        variant(name)
    record_to = str(chosen.record) if chosen.record else None
    return [
        Job(name, dtype, batch, backends, chosen.rounds, chosen.small, record_to=record_to, planted=chosen.planted)
        for name in chosen.models
        for dtype in chosen.dtypes
        for batch in chosen.batches
    ]


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `run`."""
    output = console()
    try:
        jobs = jobs_of(chosen)
    except ValueError as error:
        output.print(str(error))
        return 2
    about = environment(chosen.commit)
    rows: list[Row] = []
    with progress_bar(output) as bar, tempfile.TemporaryDirectory() as caches:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=" ".join(map(str, job.case)))
            rows.extend(measure_case(job, chosen.processes, caches if chosen.compile_times else None, about))
            results = Results(about, tuple(rows))
            bar.console.print(case_table(results, job.case))
            bar.advance(task)
            if chosen.out:  # after every case: a long run that is cut off keeps what it has
                save(chosen.out, results)
    failed = problems(Results(about, tuple(rows)))
    for row in failed:
        output.print(f"not reported: {' '.join(map(str, row.case))} under {row.backend}: {row.problem}")
    return 1 if failed else 0


def measure_case(job: Job, processes: int, caches: str | None, about: dict[str, object]) -> Iterator[Row]:
    """The rows of one case from every process. caches: a folder, if first calls are to be timed cold and warm."""
    first = {} if caches is None else {row.backend: row for row in first_calls(replace(job, caches=caches))}
    for process in range(processes):
        own = replace(job, process=process, caches=caches)
        rows = run_job(own, about) if processes == 1 else next(measured([own]))
        for row in rows:
            found = first.get(row.backend, row)
            yield replace(row, cold_seconds=found.cold_seconds, warm_seconds=found.warm_seconds)


def progress_bar(output: Console) -> Progress:
    """A bar that says what is being measured and for how long it will go on; nothing where nobody looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=output, disable=not output.is_terminal
    )
