"""What a campaign compiles before it measures: many programs at once, batch by batch, into one folder of caches.

Takes: jobs. Gives: the programs they need, each once; a row a program as it is compiled, its `first_call_seconds` in
company. Must not change: anything but the caches. Nothing is timed here.

A program far larger than the others would be alone in the end and hold up all: it is begun first of its batch and with
several compile threads, and any program gets more of them when fewer programs than workers are left.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import models
from bench.run import Job
from bench.samples import Row
from bench.variants import variant
from bench.workers import together

MOST_THREADS = 8  # more of them wait for the one that traces and lowers

FAR = 3.0  # times as many modules as the middle model: takes minutes to trace

Program = tuple[Any, ...]  # case and backend


def programs(jobs: Iterable[Job]) -> list[Job]:
    """What has to be compiled for `jobs`: one job per case and kind of kernels, each once.

    The schedule is none of a compiler's business, so the cheapest policy stands for all.
    """
    cheap = {"opara": "opara:sequential", "opara-unfused": "opara:sequential-unfused"}
    found: dict[Program, Job] = {}
    for job in jobs:
        for backend in job.backends:
            kernels = kernels_of(backend)
            if kernels is not None:
                own = replace(job, backends=(cheap.get(kernels, backend),), process=0, rounds=1)
                found.setdefault(program(own), own)
    return list(found.values())


@functools.cache
def kernels_of(backend: str) -> str | None:
    """`Variant.kernels`, None where nothing is compiled. Looking a backend up takes milliseconds, and jobs are many."""
    chosen = variant(backend)
    return chosen.kernels if chosen.compiles else None


def program(job: Job) -> Program:
    """The name of what a job of `programs` compiles."""
    return (*job.case, job.backends[0])


def compiled(job: Job, done: Container[Program]) -> bool:
    """True if all that `job` runs is among `done`, so that it can be measured without compiling."""
    return all(program(own) in done for own in programs([job]))


@functools.cache
def size(model: str, small: bool = False) -> int:
    """How many modules a model has; built without its weights."""
    entry = models.get(model).reduced() if small else models.get(model)
    with torch.device("meta"):
        return sum(1 for _ in entry.build().modules())


def largest_first(jobs: Iterable[Job]) -> list[Job]:
    """The order to work in: process by process and batch by batch as they are given, so that one is whole when time is
    up, and of each the largest first, which take longest. What is equally large stays in the order given.

    Those far larger than the middle one begin with the first process in every other, too: a model that takes minutes to
    trace would not be done before time is up.
    """
    jobs = list(jobs)
    sizes = {job.model: size(job.model, job.small) for job in jobs}
    far = FAR * statistics.median(sizes.values() or [0])
    parts = list(dict.fromkeys((job.process, job.batch) for job in jobs))
    first = parts[0][0] if parts else 0

    def place(job: Job) -> tuple[int, int]:
        process = first if sizes[job.model] > far and (first, job.batch) in parts else job.process
        return parts.index((process, job.batch)), -sizes[job.model]

    return sorted(jobs, key=place)


def threads(job_size: int, middle: float, left: int, workers: int) -> int:
    """Compile threads for a program: as many times as it is larger than the middle one, or its share of the workers
    when so many programs are left."""
    return max(1, min(MOST_THREADS, max(round(job_size / middle), workers // max(1, left))))


def surroundings(
    jobs: Sequence[Job], gpus: Sequence[str | None], workers: int
) -> Callable[[Job, int], Mapping[str, str]]:
    """The variables of each process that compiles one of `jobs`, its GPU among them: each in turn."""
    middle = statistics.median([size(job.model, job.small) for job in jobs] or [1])
    gpu = itertools.cycle(gpus)

    def of(job: Job, left: int) -> dict[str, str]:
        count = threads(size(job.model, job.small), middle, left, workers)
        own = {"TORCHINDUCTOR_COMPILE_THREADS": str(count), "OMP_NUM_THREADS": "1"}
        chosen = next(gpu)
        return own if chosen is None else {**own, "CUDA_VISIBLE_DEVICES": chosen}

    return of


def precompile(todo: Sequence[Job], *, gpus: Sequence[str | None], workers: int, deadline: float) -> Iterator[Row]:
    """Compile the programs `todo`, until `deadline`; the rows say how long each took, in company."""
    order = largest_first(todo)
    yield from together(order, workers=workers, deadline=deadline, environment=surroundings(order, gpus, workers))
