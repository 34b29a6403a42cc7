"""`python -m bench first-calls`: what the first call of a fresh process takes, caches empty and filled.

Takes: cases, and how many at once. Gives: a line a backend as each case is done, in the end a table for each backend
beside the first, and with --out a JSON file (`bench.starts`) that is renewed after every case. Exit code 1 if a call
failed or computed something else than eager. Must not change: anything else.

Backends take turns, each `--repeats` times cold and then warm, every call in a process of its own. Cases side by side
have cores of their own, so that they share no more than the GPU, which a first call uses for little of its time.
"""

from __future__ import annotations

import argparse
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from bench import models
from bench.about import environment
from bench.run import Job
from bench.samples import OURS, STOCK, Row
from bench.starts import Start, headings, rows, save
from bench.tables import console, table
from bench.variants import variant
from bench.workers import together
from opara_backend.commands.console import positive

LONGEST = 1800.0  # seconds a first call may take


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The subcommand `first-calls`."""
    parser = commands.add_parser("first-calls", help="how long first calls take, with caches empty and filled")
    names = models.names()
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    types = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=types, help="default: float16")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1], metavar="N", help="default: 1")
    help_text = f"the first is what the others are compared with; default: {STOCK} {OURS}"
    parser.add_argument("--backends", nargs="+", default=[STOCK, OURS], metavar="NAME", help=help_text)
    parser.add_argument("--repeats", type=positive, default=3, help="of a cold call and a warm one; default: 3")
    parser.add_argument("--at-once", type=positive, default=1, help="cases side by side, each on cores of its own")
    parser.add_argument("--small", action="store_true", help="reduced models, for machines without a GPU")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    parser.set_defaults(command=main)


def main(chosen: argparse.Namespace) -> int:
    """Entry point of `first-calls`."""
    output = console()
    try:
        for name in chosen.backends:
            if not variant(name).compiles:
                raise ValueError(f"{name} compiles nothing, so that its first call is like any other")
        cores = parts(sorted(os.sched_getaffinity(0)), chosen.at_once)
    except ValueError as error:
        output.print(str(error))
        return 2
    about = {**environment(chosen.commit), "cores": len(cores[0])}
    jobs = [
        Job(model, dtype, batch, tuple(chosen.backends), small=chosen.small)
        for batch in chosen.batches
        for dtype in chosen.dtypes
        for model in chosen.models
    ]
    starts: list[Start] = []
    failed = 0
    with tempfile.TemporaryDirectory() as caches:
        for found, problems in _side_by_side(jobs, cores, chosen.repeats, caches):
            starts += found
            for start in found:
                case = " ".join(map(str, start.case))
                output.print(f"{case} under {start.backend}: cold {start.cold:.2f} s, warm {start.warm:.2f} s")
            for problem in problems:
                output.print(problem)
            failed += len(problems)
            if chosen.out:  # after every case: a long run that is cut off keeps what it has
                save(chosen.out, about, starts)
    base, *others = chosen.backends
    for other in others:
        output.print(table("seconds of first calls", headings(base, other), rows(starts, base, other)))
    return 1 if failed else 0


def parts(cores: Sequence[int], count: int) -> list[set[int]]:
    """`cores` in `count` equal parts, the rest in none; ValueError if there are fewer."""
    each = len(cores) // count
    if not each:
        raise ValueError(f"--at-once {count}: this process may use {len(cores)} cores")
    return [{*cores[place * each : (place + 1) * each]} for place in range(count)]


def _side_by_side(
    jobs: Sequence[Job], cores: Sequence[set[int]], repeats: int, caches: str
) -> Iterator[tuple[list[Start], list[str]]]:
    free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for part in cores:
        free.put(part)

    def measure(job: Job) -> tuple[list[Start], list[str]]:
        own = free.get()
        os.sched_setaffinity(threading.get_native_id(), own)  # processes begun in this thread inherit it
        try:
            folder = f"{caches}/{'-'.join(map(str, job.case))}"
            return _repeated(replace(job, caches=folder), repeats)
        finally:
            free.put(own)

    with ThreadPoolExecutor(len(cores)) as pool:
        yield from pool.map(measure, jobs)


def _repeated(job: Job, repeats: int) -> tuple[list[Start], list[str]]:
    starts, problems = [], []
    for process in range(repeats):
        for row in first_calls(replace(job, caches=f"{job.caches}/{process}")):
            if row.cold_seconds is None or row.warm_seconds is None:
                problems.append(f"not reported: {' '.join(map(str, row.case))} under {row.backend}: {row.problem}")
            else:
                starts.append(Start(*row.case, row.backend, process, row.cold_seconds, row.warm_seconds))
    return starts, problems


def first_calls(job: Job) -> Iterator[Row]:
    """A row for each backend of the job that compiles: its first call in fresh processes, caches empty, then filled.

    job.caches: a folder for what they leave. A row whose call failed says why.
    """
    for number, backend in enumerate(job.backends):
        if not variant(backend).compiles:
            continue
        # Variants of the same kernels must not warm each other.
        own = replace(job, backends=(backend,), caches=f"{job.caches}/{number}", record_to=None)
        cold = _first_call(own)
        warm = cold if cold.problem else _first_call(own)  # what failed once would fail again, and take as long
        yield replace(
            warm,
            cold_seconds=None if cold.problem else cold.first_call_seconds,
            warm_seconds=None if warm.problem else warm.first_call_seconds,
        )


def _first_call(job: Job) -> Row:
    rows = [*together([job], workers=1, deadline=time.monotonic() + LONGEST)]
    if rows:
        return rows[0]
    return Row(*job.case, job.backends[0], None, None, None, problem=f"took longer than {LONGEST:.0f} s")
