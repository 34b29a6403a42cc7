"""`python -m bench campaign --minutes 18 --out FOLDER`: the full run on one GPU, in a budget of minutes.

Takes: a budget and a folder. Gives: `FOLDER/results.json` (`bench.samples`), renewed after every case, and what is
still missing. Exit code 1 if a figure could not be reported, 3 if the budget ended first. Must not change: anything
but the folder. Run it again with the same folder and it goes on where it stopped.

1. Precompile: every program the cases need, in parallel processes on all cores, into `FOLDER/caches`. Nothing is timed.
2. Measure: alone on the machine, one fresh process a pass, the cases in order of interest: batch 1 before larger
   ones, float16 before float32; a second and a third pass, each in a process of its own, when all cases have one.

`rows.ndjson` is what counts: carry it (not the caches) to another machine of the same kind to go on there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import models
from bench.about import environment
from bench.measuring import DTYPES, progress_bar
from bench.run import Job
from bench.samples import Results, Row, dumps, row_from, save
from bench.summary import case_table, problems
from bench.tables import console
from bench.variants import variant
from bench.workers import measured, together

PAPER_MODELS = ("googlenet", "inception_v3", "deepfm", "nasnet_large", "bert_base", "t5_small")
STANDARD = ("reduce-overhead", "opara", "opara:nimble", "opara:wavefront", "opara:paper")
PAPERS_OWN = ("eager", "cudagraph", "opara:paper-unfused", "opara:nimble-unfused", "opara:wavefront-unfused")
ORDER_ALONE = ("opara:paper,launch_order=program", "opara:paper-unfused,launch_order=program")
WITHOUT_GPU = ("inductor", "eager", "opara", "opara:paper", "opara:paper-unfused")
CASE_SECONDS = 240.0  # a case that takes longer is given up, and says so


def backends_of(model: str, batch: int, on_gpu: bool) -> tuple[str, ...]:
    """What a case is measured under: the paper's own setting on the paper's models and batches."""
    if not on_gpu:
        return WITHOUT_GPU
    papers = model in PAPER_MODELS and (batch == 1 or model == "inception_v3")
    order = ORDER_ALONE if model == "googlenet" and batch == 1 else ()
    return (*STANDARD, *(PAPERS_OWN if papers else ()), *order)


def plan(
    names: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    processes: int,
    rounds: int,
    *,
    small: bool = False,
    on_gpu: bool = True,
    caches: str | None = None,
    backends: Sequence[str] = (),
) -> list[Job]:
    """Every case in every process, the most interesting first. backends: instead of those of `backends_of`."""
    return [
        Job(name, dtype, batch, tuple(backends) or backends_of(name, batch, on_gpu), rounds, small, process, caches)
        for process in range(processes)
        for batch in batches
        for dtype in dtypes
        for name in names
        if batch in models.get(name).batches
    ]  # fmt: skip


def missing(jobs: Iterable[Job], rows: Iterable[Row]) -> list[Job]:
    """The jobs of which there is no row yet."""
    done = {(*row.case, row.process) for row in rows}
    return [job for job in jobs if (*job.case, job.process) not in done]


def programs(jobs: Iterable[Job]) -> list[Job]:
    """What has to be compiled for `jobs`: one job per case and kind of kernels, each once.

    The schedule is none of a compiler's business, so the cheapest policy stands for all.
    """
    found: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        for backend in job.backends:
            chosen = variant(backend)
            if chosen.kind in ("eager", "cudagraph"):
                continue
            cheap = {"opara": "opara:sequential", "opara-unfused": "opara:sequential-unfused"}
            own = replace(job, backends=(cheap.get(chosen.kernels, backend),), process=0, rounds=1)
            found.setdefault((*job.case, chosen.kernels), own)
    return list(found.values())


class Kept:
    """The rows in a folder: read at the start, each new one written at once, half a line at the end is dropped."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "rows.ndjson"
        self.compiled_path = folder / "caches" / "compiled.ndjson"
        self.rows = [row_from(data) for data in _lines(self.path)]

    def add(self, rows: Iterable[Row]) -> None:
        """Keep `rows` for good."""
        new = list(rows)
        self.rows.extend(new)
        _append(self.path, [dumps(row) for row in new])

    def drop_problems(self) -> None:
        """Forget every case and process in which something was not reported, so that it is measured again."""
        bad = {(*row.case, row.process) for row in self.rows if row.problem}
        self.rows = [row for row in self.rows if (*row.case, row.process) not in bad]
        self.path.write_text("".join(dumps(row) + "\n" for row in self.rows))

    def compiled(self) -> set[tuple[Any, ...]]:
        """Case and backend of everything that lies in the caches."""
        return {tuple(entry) for entry in _lines(self.compiled_path)}

    def add_compiled(self, row: Row) -> None:
        """`row`'s program lies in the caches."""
        _append(self.compiled_path, [json.dumps([*row.case, row.backend])])

    def results(self, about: dict[str, Any]) -> Results:
        """As a document, cases of a kind together."""
        return Results(about, tuple(sorted(self.rows, key=lambda row: (row.dtype, row.batch, row.process))))


def precompile(jobs: Sequence[Job], kept: Kept, *, workers: int, deadline: float) -> Iterator[Row]:
    """Compile what `jobs` need and the caches lack, until `deadline`; the rows say how long each took, in company."""
    done = kept.compiled()
    todo = [job for job in programs(jobs) if (*job.case, job.backends[0]) not in done]
    for row in together(todo, workers=workers, deadline=deadline):
        kept.add_compiled(row)  # one that failed too: it will fail again, and say why where it is measured
        yield row


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `campaign`."""
    parser = commands.add_parser("campaign", help="the full run on one GPU within a budget of minutes; resumable")
    parser.add_argument("--minutes", type=float, default=18.0, help="the whole budget; default 18")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="run again with it to go on")
    parser.add_argument("--compile-share", type=float, default=0.4, help="of the budget, at most; default 0.4")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="compiling at once")
    parser.add_argument("--models", nargs="+", default=list(models.names()), choices=models.names(), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"], choices=DTYPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="default: as suits each model")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="reduced models, for machines without a GPU")
    parser.add_argument("--retry", action="store_true", help="measure again what could not be reported")
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `campaign`."""
    started, output = time.monotonic(), console()
    end = started + 60 * chosen.minutes
    kept = Kept(chosen.out)
    if chosen.retry:
        kept.drop_problems()
    about = environment(chosen.commit)
    on_gpu = torch.cuda.is_available()
    caches = str((chosen.out / "caches").resolve())
    grid = (chosen.models, chosen.dtypes, chosen.batches, chosen.processes, chosen.rounds)
    jobs = plan(*grid, small=chosen.small, on_gpu=on_gpu, caches=caches, backends=chosen.backends)
    todo = missing(jobs, kept.rows)
    output.print(f"{len(jobs)} cases x processes, {len(todo)} to measure, {chosen.minutes:.0f} minutes")
    _compile(todo, kept, output, chosen.workers, started + 60 * chosen.minutes * chosen.compile_share)
    _measure(todo, kept, output, about, chosen.out / "results.json", end)
    left = missing(jobs, kept.rows)
    failed = problems(kept.results(about))
    for row in failed:
        output.print(f"not reported: {' '.join(map(str, row.case))} under {row.backend}: {row.problem}")
    spent = (time.monotonic() - started) / 60
    output.print(f"{len(jobs) - len(left)} of {len(jobs)} measured, {len(failed)} not reported, {spent:.1f} minutes")
    if left:
        output.print("the budget ended: run the same command again to go on")
        return 3
    return 1 if failed else 0


def _compile(jobs: Sequence[Job], kept: Kept, output: Console, workers: int, deadline: float) -> None:
    total = len(programs(jobs))
    with progress_bar(output) as bar:
        task = bar.add_task("compiling", total=total)
        bar.advance(task, sum((*j.case, j.backends[0]) in kept.compiled() for j in programs(jobs)))
        for row in precompile(jobs, kept, workers=workers, deadline=deadline):
            took = row.problem or f"{row.first_call_seconds or 0:.1f} s"
            bar.console.print(f"compiled {' '.join(map(str, row.case))} {row.backend}: {took}")
            bar.advance(task)


def _measure(
    jobs: Sequence[Job], kept: Kept, output: Console, about: dict[str, Any], path: Path, deadline: float
) -> None:
    with progress_bar(output) as bar:
        task = bar.add_task("measuring", total=len(jobs))
        for process in dict.fromkeys(job.process for job in jobs):  # a fresh process each
            own = [job for job in jobs if job.process == process]
            for rows in measured(own, timeout=CASE_SECONDS, deadline=deadline):
                kept.add(rows)
                results = kept.results(about)
                save(path, results)
                bar.console.print(case_table(results, rows[0].case))
                bar.advance(task)


def _append(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def _lines(path: Path) -> list[Any]:
    """Each line of JSON; a last one that was cut off is taken out of the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
