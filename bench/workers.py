"""Fresh processes that measure cases one after another, and the rows they leave.

Takes: jobs. Gives: rows, in the order measured, as soon as each case is done. A worker that dies loses its case and
no other: the case's rows say so, and a new worker goes on. Must not change: anything but `folder`.

A worker reads jobs as lines of JSON on its standard input and answers each with one line of rows on its standard
output; what else the libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bench.run import Job, as_dict, first_call, run_job
from bench.samples import Row, row_from

ROOT = Path(__file__).parent.parent
MEASURE, FIRST_CALL = "measure", "first_call"


class WorkerError(RuntimeError):
    """A worker that died or took too long; the message is for the row."""


class Worker:
    """One process. mode: `MEASURE` gives rows with samples, `FIRST_CALL` only compiles and checks."""

    def __init__(self, mode: str = MEASURE, environment: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.workers", mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        self._at_work = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def send(self, job: Job) -> None:
        """Give it a job."""
        assert self._process.stdin is not None
        self._at_work = True
        with contextlib.suppress(BrokenPipeError):  # `receive` says that it died
            self._process.stdin.write(json.dumps(as_dict(job)) + "\n")
            self._process.stdin.flush()

    def receive(self, timeout: float | None = None) -> list[Row]:
        """The rows of the job sent; WorkerError if the process ends first, or `timeout` seconds pass."""
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout)[0]:
            self.stop()
            raise WorkerError(f"took longer than {timeout:.0f} s")
        line = out.readline()
        if not line:
            raise WorkerError(f"the process ended with exit code {self._process.wait()}")
        self._at_work = False
        return [row_from(data) for data in json.loads(line)]

    def ready(self) -> bool:
        """True if `receive` would not wait."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def stop(self) -> None:
        """End the process, at once if it is still at work."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=0.0 if self._at_work else 10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def measured(jobs: Sequence[Job], *, timeout: float = 600.0, deadline: float | None = None) -> Iterator[list[Row]]:
    """The rows of each job in turn, by one fresh process; none is begun after `deadline` (`time.monotonic`)."""
    worker: Worker | None = None
    try:
        for job in jobs:
            if deadline is not None and time.monotonic() >= deadline:
                return
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


def together(jobs: Sequence[Job], *, workers: int, deadline: float, threads: int = 1) -> Iterator[Row]:
    """The first calls of `jobs`, each with one backend and in a fresh process, `workers` at once.

    threads: compile threads of each process, 0 for as many as Inductor likes. Those not done at `deadline`
    (`time.monotonic`) are stopped; what they have compiled stays in the caches.
    """
    waiting, running = list(jobs), dict[Worker, Job]()
    bounded = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "OMP_NUM_THREADS": "1"}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < workers:
                job, worker = waiting.pop(0), Worker(FIRST_CALL, bounded if threads else {})
                worker.send(job)
                running[worker] = job
            for worker in [w for w in running if w.ready()]:
                job = running.pop(worker)
                try:
                    rows = worker.receive()
                except WorkerError as error:
                    rows = failed(job, str(error))
                worker.stop()
                yield from rows
            time.sleep(0.02)
    finally:
        for worker in running:
            worker.stop()


def serve(mode: str, jobs: TextIO, answers: TextIO) -> None:
    """What a worker does until its input ends."""
    for line in jobs:
        data: dict[str, Any] = json.loads(line)
        job = Job(**{**data, "backends": tuple(data["backends"])})
        rows = run_job(job) if mode == MEASURE else [first_call(job)]
        answers.write(json.dumps([asdict(row) for row in rows]) + "\n")
        answers.flush()


def main() -> None:
    """Entry point of a worker: what anybody prints goes to standard error, so that answers stay alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
