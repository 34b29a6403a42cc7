"""Fresh processes that measure cases one after another, and the rows they leave.

Takes: jobs. Gives: rows, in the order measured, as soon as each case is done. A worker that dies loses its case and
no other: the case's rows say so, and a new worker goes on. Must not change: anything but caches.

A worker reads jobs as lines of JSON on its standard input and answers each with one line of rows on its standard
output; what else the libraries print goes to standard error. Those that take turns on a GPU (`bench.turns`) also ask
there for being alone, and read the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TextIO

import torch

from bench import gate
from bench.run import Job, first_call, run_job
from bench.samples import Row
from bench.worker import FIRST_CALL, TURNS, Worker, WorkerError


def measured(jobs: Sequence[Job], *, timeout: float = 600.0) -> Iterator[list[Row]]:
    """The rows of each job in turn, by one fresh process."""
    worker: Worker | None = None
    try:
        for job in jobs:
            worker = worker or Worker()
            worker.send(job)
            try:
                yield worker.receive(timeout)
            except WorkerError as error:
                worker.stop()
                worker = None
                yield failed(job, str(error))
    finally:
        if worker is not None:
            worker.stop()


def failed(job: Job, problem: str) -> list[Row]:
    """The rows of a job that gave none."""
    return [Row(*job.case, b, None, None, None, process=job.process, problem=problem) for b in job.backends]


def together(
    jobs: Sequence[Job],
    *,
    workers: int,
    deadline: float,
    environment: Callable[[Job, int], Mapping[str, str]] = lambda job, left: {},
) -> Iterator[Row]:
    """The first calls of `jobs`, each with one backend and in a fresh process, `workers` at once.

    environment: variables for the process of a job, while so many are left, this one included. Those not done at
    `deadline` (`time.monotonic`) are stopped; what they have compiled stays in the caches.
    """
    waiting, running, ending = list(jobs), dict[Worker, Job](), list[Worker]()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < workers:
                left = len(waiting) + len(running)
                job = waiting.pop(0)
                worker = Worker(FIRST_CALL, environment(job, left))
                worker.send(job)
                running[worker] = job
            for worker in [w for w in running if w.ready()]:
                job = running.pop(worker)
                ending.append(worker)
                try:
                    rows = worker.receive()
                except WorkerError as error:
                    rows = failed(job, str(error))
                worker.retire()  # and not waited for: ending takes a process with a GPU a second
                yield from rows
            time.sleep(0.02)
    finally:
        for worker in (*running, *ending):
            worker.stop()


def synchronize() -> None:
    """Wait until this process's work on the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(mode: str, jobs: TextIO, answers: TextIO) -> None:
    """What a worker does until its input ends."""

    def say(text: str) -> None:
        answers.write(f"{text}\n")
        answers.flush()

    for line in iter(jobs.readline, ""):
        data: dict[str, Any] = json.loads(line)
        job = Job(**{**data, "backends": tuple(data["backends"])})
        if mode == FIRST_CALL:
            rows = [first_call(job)]
        elif mode == TURNS:
            with gate.through(gate.Gate(say, jobs.readline, synchronize)):
                # A first call that others had the machine with, or that was stopped meanwhile, says nothing.
                rows = [replace(row, first_call_seconds=None) for row in run_job(job)]
        else:
            rows = run_job(job)
        say(json.dumps([asdict(row) for row in rows]))


def main() -> None:
    """Entry point of a worker: what anybody prints goes to standard error, so that answers stay alone."""
    os.setpgrp()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
