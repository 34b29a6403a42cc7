"""Spreads jobs over processes, and survives what the samples do to them.

Takes: jobs, a Setting, how many processes, how long in all. Gives: results as they come. Must not change: the verdict
of one sample because of another: a process that dies is replaced; samples that shared it are judged one by one, and
the one that kills it is judged with inductor alone, which tells whose fault it was.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from tests.sweep.records import Case, Job, Result, Setting
from tests.sweep.worker import serve

Serve = Callable[[Connection, Setting], None]

_JOBS_PER_PROCESS = 200  # then a fresh one, since compiled code is never unloaded
_START = 120.0  # seconds that a process may need to come up


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    deadline: float = 0.0
    jobs: int = 0


class Pool:
    """`run` gives results. After it, `left` holds the jobs that the time did not suffice for."""

    def __init__(
        self,
        setting: Setting,
        processes: int,
        seconds: float | None,
        *,
        context: Literal["spawn", "fork"] = "spawn",
        work: Serve = serve,
    ) -> None:
        self.setting, self.processes = setting, processes
        self.context: Any = multiprocessing.get_context(context)
        self.work = work
        self.end = time.monotonic() + seconds if seconds is not None else float("inf")
        self.left: deque[Job] = deque()
        self._deaths: dict[Case, str] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[list[Result]]:
        """Judge everything, or as much as the time allows."""
        self.left = deque(jobs)
        workers: list[_Worker] = []
        try:
            while self.left or any(worker.job for worker in workers):
                if time.monotonic() > self.end:
                    break
                self._hand_out(workers)
                wait([w.connection for w in workers if w.job] + [w.process.sentinel for w in workers], timeout=1.0)
                for worker in list(workers):
                    results = self._attend(worker, workers)
                    if results:
                        yield results
        finally:
            for worker in workers:
                if worker.job is not None:
                    self.left.append(worker.job)
                _end(worker)

    def _hand_out(self, workers: list[_Worker]) -> None:
        for worker in workers:
            if worker.job is None and self.left:
                self._give(worker, self.left.popleft())
        while self.left and len(workers) < self.processes:
            workers.append(self._start())
            self._give(workers[-1], self.left.popleft())

    def _start(self) -> _Worker:
        here, there = self.context.Pipe()
        process = self.context.Process(target=self.work, args=(there, self.setting), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _give(self, worker: _Worker, job: Job) -> None:
        # Eager, both backends, and each sample again alone where they are wrong together.
        allowed = self.setting.limit * 2.5 * (1 + (len(job.cases) > 1) * len(job.cases) / 2)
        worker.job, worker.deadline = job, time.monotonic() + allowed + (_START if not worker.jobs else 0.0)
        worker.jobs += 1
        worker.connection.send(job)

    def _attend(self, worker: _Worker, workers: list[_Worker]) -> list[Result]:
        """What `worker` has to say, if anything; it is removed if it is dead, late or old."""
        job, how = worker.job, ""
        results: list[Result] = []
        try:
            if job is not None and worker.connection.poll():
                results = self._explained(job, worker.connection.recv())
                worker.job = None
        except (EOFError, ConnectionError):
            worker.process.join(5.0)
        alive = worker.process.is_alive()  # asked once: it may die between two questions, and its job be forgotten
        if worker.job is not None and not alive:
            how = f"process ended with {worker.process.exitcode}"
        elif worker.job is not None and time.monotonic() > worker.deadline:
            how = "no answer in time"
        if how or not alive or (worker.job is None and worker.jobs >= _JOBS_PER_PROCESS):
            worker.job = None
            workers.remove(worker)
            _end(worker)
        return self._mourned(job, how) if how and job is not None else results

    def _mourned(self, job: Job, how: str) -> list[Result]:
        """What follows from the death of the process that had `job`: other jobs, or a result."""
        if len(job.cases) > 1:
            self.left.extendleft(Job((case,)) for case in reversed(job.cases))
            return []
        (case,) = job.cases
        if job.only_theirs:
            return [Result(case, "both_wrong", f"{self._deaths[case]}; with inductor, {how}")]
        self._deaths[case] = how
        self.left.appendleft(replace(job, only_theirs=True))
        return []

    def _explained(self, job: Job, results: list[Any]) -> list[Result]:
        """Results as they are, or what they mean for a sample that killed the process before."""
        if not job.only_theirs:
            return results
        (result,) = results
        if result.verdict == "skipped":
            return [result]
        how = self._deaths[result.case]
        verdict = "crashed" if result.verdict == "agrees" else "both_wrong"
        return [replace(result, verdict=verdict, detail=f"{how}; inductor: {result.theirs}", graphs=0)]


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join(10.0)
    worker.connection.close()
