"""`python -m bench campaign --minutes 18 --out FOLDER`: the full run on one machine's GPUs, in a budget of minutes.

Takes: a budget and a folder. Gives: `FOLDER/results.json` (`bench.samples`), renewed after every case, and what is
still missing. Exit code 1 if a figure could not be reported, 3 if the budget ended first. Must not change: anything
but the folder. Run it again with the same folder and it goes on where it stopped.

1. Precompile (`bench.precompile`): every program the cases need, in parallel processes on all cores, into
   `FOLDER/caches`. A case whose programs are not all there when this has to end is left for the next run.
2. Measure (`bench.turns`): batch 1 before larger ones, the largest models first, whose variants take minutes to trace;
   a second and a third pass, each in a process of its own, when all cases have one. Several workers a GPU trace, load
   and warm up their cases at once; whoever profiles, searches or is timed is alone on its GPU, the others stopped.

First calls are not reported: they shared the machine. `bench run --compile-times` measures them apart.
To go on where the folder is gone, on another machine of the same kind, say `--go-on` with the results it made.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import models
from bench.about import environment
from bench.kept import Kept
from bench.measuring import DTYPES, add_planted, progress_bar
from bench.precompile import compiled, largest_first, precompile, program, programs
from bench.run import Job
from bench.samples import LEAN, Row, loaded, save
from bench.summary import case_table, problems
from bench.tables import console
from bench.turns import in_turns
from opara_backend.commands.console import positive

PAPER_MODELS = ("googlenet", "inception_v3", "deepfm", "nasnet_large", "bert_base", "t5_small")
# One stream, kernels in Inductor's order; outputs are lent, as reduce-overhead lends them. PLAIN_IN_A_ROW: without
# rewrites, which is what that runs.
IN_A_ROW = "opara:sequential,launch_order=program,copy_outputs=False"
PLAIN_IN_A_ROW = "opara:sequential,plain,launch_order=program,copy_outputs=False"
STANDARD = ("reduce-overhead", "opara", "opara:nimble", "opara:wavefront", "opara:paper", IN_A_ROW)
PAPERS_OWN = ("eager", "cudagraph", "opara:paper-unfused", "opara:nimble-unfused", "opara:wavefront-unfused")
ORDER_ALONE = ("opara:paper,launch_order=program", "opara:paper-unfused,launch_order=program")
WITHOUT_GPU = ("inductor", "eager", "opara", "opara:paper", "opara:paper-unfused")
MOST_PREPARING = 14  # workers a GPU; a case takes many times as long to prepare as it is alone


def backends_of(model: str, batch: int, on_gpu: bool) -> tuple[str, ...]:
    """What a case is measured under: the paper's own setting on the paper's models and batches."""
    if not on_gpu:
        return WITHOUT_GPU
    papers = model in PAPER_MODELS and (batch == 1 or model == "inception_v3")
    order = ORDER_ALONE if model == "googlenet" and batch == 1 else ()
    small = (PLAIN_IN_A_ROW, LEAN) if batch <= 8 else ()
    host = ("dynamo",) if batch == 1 else ()
    return (*STANDARD, *small, *host, *(PAPERS_OWN if papers else ()), *order)


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
    planted: float = 0.0,
) -> list[Job]:
    """Every case in every process, the most interesting first. backends: instead of those of `backends_of`."""
    return [
        Job(
            name,
            dtype,
            batch,
            tuple(backends) or backends_of(name, batch, on_gpu),
            rounds,
            small,
            process,
            caches,
            planted=planted,
        )
        for process in range(processes)
        for batch in batches
        for dtype in dtypes
        for name in names
        if batch in models.get(name).batches
    ]


def missing(jobs: Iterable[Job], rows: Iterable[Row]) -> list[Job]:
    """The jobs of which there is no row yet."""
    done = {(*row.case, row.process) for row in rows}
    return [job for job in jobs if (*job.case, job.process) not in done]


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine as `CUDA_VISIBLE_DEVICES` names them; those it leaves, if it is set."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))


def preparing(asked: int | None, gpus: int, cores: int) -> int:
    """Workers a GPU; if nobody asks, so many that those of other GPUs, or of the only one, keep half the cores busy at
    most, and each has a core. One where there is no GPU, whatever is asked: the processor is what must be quiet."""
    if gpus == 0:
        return 1
    others = max(1, gpus - 1)
    return asked or max(1, min(MOST_PREPARING, cores // 2 // others, (cores - gpus) // gpus))


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `campaign`."""
    parser = commands.add_parser("campaign", help="the full run within a budget of minutes; resumable")
    parser.add_argument(
        "--minutes",
        type=float,
        default=18.0,
        help="the whole budget, but for a minute that what has begun may take; default 18",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("campaign"), metavar="FOLDER", help="default campaign; run again to go on"
    )
    parser.add_argument("--compile-share", type=float, default=0.4, help="of the budget, at most; default 0.4")
    parser.add_argument("--workers", type=positive, default=max(1, (os.cpu_count() or 2) - 1), help="compiling at once")
    parser.add_argument("--gpus", nargs="+", metavar="GPU", help="as in CUDA_VISIBLE_DEVICES; default: all there are")
    parser.add_argument("--prepare", type=positive, metavar="N", help="workers a GPU; default: by cores, at most 14")
    parser.add_argument("--models", nargs="+", default=list(models.names()), choices=models.names(), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"], choices=DTYPES)
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8, 32])
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="default: as suits each model")
    parser.add_argument("--processes", type=positive, default=3)
    parser.add_argument("--rounds", type=positive, default=7)
    add_planted(parser)
    parser.add_argument("--small", action="store_true", help="reduced models, for machines without a GPU")
    parser.add_argument("--retry", action="store_true", help="measure again what could not be reported")
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    parser.add_argument(
        "--go-on", type=Path, metavar="FILE", help="results of such a run at the same commit: measure what they lack"
    )
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `campaign`."""
    started, output = time.monotonic(), console()
    end = started + 60 * chosen.minutes
    on_gpu = torch.cuda.is_available()
    if chosen.gpus and not on_gpu:
        output.print(f"--gpus {' '.join(chosen.gpus)}: torch sees no GPU here")
        return 2
    kept = Kept(chosen.out)
    if chosen.retry:
        kept.drop_problems()
    about = environment(chosen.commit)
    if chosen.go_on is not None and not _went_before(chosen.go_on, about, kept, output):
        return 2
    gpus = tuple(chosen.gpus or visible_gpus()) if on_gpu else ()
    each = preparing(chosen.prepare, len(gpus), os.cpu_count() or 1)
    caches = str((chosen.out / "caches").resolve())
    grid = (chosen.models, chosen.dtypes, chosen.batches, chosen.processes, chosen.rounds)
    given: dict[str, Any] = {"backends": chosen.backends, "planted": chosen.planted}
    jobs = plan(*grid, small=chosen.small, on_gpu=on_gpu, caches=caches, **given)
    todo = missing(jobs, kept.rows)
    output.print(f"{len(jobs)} cases x processes, {len(todo)} to measure, {chosen.minutes:.0f} minutes")
    places = gpus or (None,)
    _compile(todo, kept, output, places, chosen.workers, started + 60 * chosen.minutes * chosen.compile_share)
    done = kept.compiled()
    ready = largest_first(job for job in todo if compiled(job, done))
    if len(ready) < len(todo):
        output.print(f"{len(todo) - len(ready)} are not compiled yet and left for the next run")
    with contextlib.closing(in_turns(ready, gpus=places, each=each, deadline=end)) as found:  # ends its processes
        _measure(ready, kept, output, about, found)
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


def _went_before(path: Path, about: Mapping[str, Any], kept: Kept, output: Console) -> bool:
    """Keep the rows of the results at `path` as well; False, and why, if they do not go with those measured here."""
    found = loaded((path,), output.print)
    if found is None:
        return False
    (results,) = found
    for name in ("commit", "device", "driver", "torch", "cuda"):
        if results.about[name] != about[name]:
            output.print(f"--go-on {path.name}: its {name} is {results.about[name]}, here it is {about[name]}")
            return False
    known = {(*row.case, row.process) for row in kept.rows}
    kept.add(row for row in results.rows if (*row.case, row.process) not in known)
    return True


def _compile(
    jobs: Sequence[Job], kept: Kept, output: Console, gpus: Sequence[str | None], workers: int, deadline: float
) -> None:
    needed, done = programs(jobs), kept.compiled()
    todo = [job for job in needed if program(job) not in done]
    with progress_bar(output) as bar:
        task = bar.add_task("compiling", total=len(needed), completed=len(needed) - len(todo))
        for row in precompile(todo, gpus=gpus, workers=workers, deadline=deadline):
            kept.add_compiled(row)  # one that failed too: it will fail again, and say why where it is measured
            took = row.problem or f"{row.first_call_seconds or 0:.1f} s"
            bar.console.print(f"compiled {' '.join(map(str, row.case))} {row.backend}: {took}")
            bar.advance(task)


def _measure(
    jobs: Sequence[Job], kept: Kept, output: Console, about: dict[str, Any], found: Iterable[list[Row]]
) -> None:
    with progress_bar(output) as bar:
        task = bar.add_task("measuring", total=len(jobs))
        for rows in found:
            kept.add(rows)
            results = kept.results(about)
            save(kept.folder / "results.json", results)
            bar.console.print(case_table(results, rows[0].case))
            bar.advance(task)
