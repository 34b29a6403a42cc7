"""Several workers a GPU that prepare cases at once, and are alone on it, one after another, for what needs that.

Takes: jobs, the GPUs, how many workers each. Gives: the rows of each job as it is done. A worker that dies, or takes
too long, loses its case and no other. Must not change: anything; all processes are continued and ended at the end.

1. Deal: the next job goes to the GPU with the fewest; a worker takes one job at a time, of one `Job.process` only, so
   that each of a case's passes has a process of its own. All variants of a case run in one process on one GPU.
2. A worker that wants to be alone says so (`bench.gate`). First come, first served: the GPU's others are stopped by
   SIGSTOP, and the one is told to go on as soon as what they had queued should be done.
3. It says that it is done, or dies, or exceeds its time: the next in the queue, or all others go on.

Time limits count only what a worker spends running. The one that is alone has a limit of its own: one of those that
are stopped may hold a lock of the file system which it turns out to need. Only its own GPU is quiet: workers of the
others keep their cores busy meanwhile, so have no more of them than half the cores.
"""

from __future__ import annotations

import json
import select
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from bench.gate import ENTER, LEAVE
from bench.run import Job
from bench.samples import Row
from bench.worker import TURNS, Worker, WorkerError
from bench.workers import failed

LOOK = 0.05  # seconds between two looks at the clocks


@dataclass(frozen=True)
class Limits:
    """Seconds. case: one case may take, waiting and being stopped not counted; alone: one may stay alone on the GPU;
    drain: what the others have queued when they are stopped, a call of the slowest model, has ended by then; grace:
    what has begun may go on after the deadline."""

    case: float = 420.0
    alone: float = 120.0
    drain: float = 0.05
    grace: float = 60.0


@dataclass(eq=False)
class Seat:
    """A worker and what it does. process: the only `Job.process` it serves; spent: seconds on its job so far."""

    worker: Worker
    process: int
    job: Job | None = None
    spent: float = 0.0


def gpu_worker(gpu: str | None) -> Worker:
    """A worker that sees one GPU, and has one core to prepare with; None: this machine as it is, without a GPU."""
    if gpu is None:
        return Worker(TURNS)
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # and no processes that would not be stopped
    return Worker(TURNS, {"CUDA_VISIBLE_DEVICES": gpu, **one})


class Device:
    """The workers of one GPU and the way to be alone on it."""

    def __init__(self, gpu: str | None, each: int, limits: Limits, start: Callable[[str | None], Worker]) -> None:
        self.gpu, self.each, self.limits, self._start = gpu, each, limits, start
        self.seats: list[Seat] = []
        self.queue: deque[Seat] = deque()
        self.holder: Seat | None = None
        self._since = 0.0
        self._leaving: list[Worker] = []  # have no more jobs, but have not ended yet

    @property
    def busy(self) -> list[Seat]:
        """Those with a job."""
        return [seat for seat in self.seats if seat.job is not None]

    def room(self) -> bool:
        """True if it can take a job now; not while a worker is alone, for a new process is not quiet."""
        return self.holder is None and len(self.busy) < self.each

    def give(self, job: Job) -> None:
        """Let a worker that is free, or a new one, begin `job`."""
        free = [seat for seat in self.seats if seat.job is None]
        seat = next((s for s in free if s.process == job.process), None)
        if seat is None:
            for old in free[: max(0, len(self.seats) - self.each + 1)]:
                self.seats.remove(old)
                old.worker.retire()
                self._leaving.append(old.worker)
            seat = Seat(self._start(self.gpu), job.process)
            self.seats.append(seat)
        seat.job, seat.spent = job, 0.0
        seat.worker.send(job)

    def turn(self, passed: float) -> Iterator[list[Row]]:
        """Hear what the workers say, after `passed` seconds more; the rows of those that are done. Then pass on."""
        for seat in self.busy:
            if not seat.worker.paused and seat not in self.queue:
                seat.spent += passed
            try:
                rows = self._hear(seat)
            except WorkerError as error:
                assert seat.job is not None
                rows = failed(seat.job, str(error))
                self._remove(seat)
            if rows is not None:
                yield rows
        self._leaving = [worker for worker in self._leaving if not worker.ended()]
        self._pass_on()

    def end(self) -> None:
        """End all processes, whatever they are at."""
        workers = [seat.worker for seat in self.seats] + self._leaving
        for worker in workers:
            worker.pause(False)
            worker.retire()
        for worker in workers:
            worker.stop()

    def _hear(self, seat: Seat) -> list[Row] | None:
        while (message := seat.worker.message()) is not None:
            said = json.loads(message)
            if said == ENTER:
                self.queue.append(seat)
            elif said == LEAVE:
                self.holder = None
            else:
                seat.job = None
                return seat.worker.rows(said)
        if seat is self.holder and time.monotonic() - self._since > self.limits.alone:
            raise WorkerError(f"was alone on the GPU for longer than {self.limits.alone:.0f} s")
        if seat.spent > self.limits.case:
            raise WorkerError(f"took longer than {self.limits.case:.0f} s")
        return None

    def _remove(self, seat: Seat) -> None:
        seat.worker.stop()
        self.seats.remove(seat)
        if seat in self.queue:
            self.queue.remove(seat)
        if seat is self.holder:
            self.holder = None

    def _pass_on(self) -> None:
        """If nobody is alone, the next in the queue is; the others are stopped for exactly as long as somebody is."""
        granted = self.holder is None and bool(self.queue)
        if granted:
            self.holder = self.queue.popleft()
        others = [seat.worker for seat in self.seats if seat is not self.holder] + self._leaving
        for worker in others:
            worker.pause(self.holder is not None)
        if granted and self.holder is not None:
            self.holder.worker.pause(False)
            self.holder.worker.say(str(self.limits.drain if others else 0.0))
            self._since = time.monotonic()


def deal(jobs: deque[Job], devices: Sequence[Device]) -> None:
    """Give out jobs, in order, each to the device with the fewest, until none has room."""
    while jobs and (free := [device for device in devices if device.room()]):
        min(free, key=lambda device: len(device.busy)).give(jobs.popleft())


def in_turns(
    jobs: Sequence[Job],
    *,
    gpus: Sequence[str | None],
    each: int,
    deadline: float = float("inf"),
    limits: Limits = Limits(),
    start: Callable[[str | None], Worker] = gpu_worker,
) -> Generator[list[Row], None, None]:
    """The rows of each job when it is done; `each` workers a GPU.

    None is begun after `deadline` (`time.monotonic`), and those not done soon after it give no rows at all.
    """
    waiting = deque(jobs)
    devices = [Device(gpu, each, limits, start) for gpu in gpus]
    looked = time.monotonic()
    try:
        while time.monotonic() < deadline + limits.grace:
            if time.monotonic() < deadline:
                deal(waiting, devices)
            busy = [seat.worker for device in devices for seat in device.busy]
            if not busy:
                return
            select.select(busy, [], [], LOOK)
            passed, looked = time.monotonic() - looked, time.monotonic()
            for device in devices:
                yield from device.turn(passed)
    finally:
        for device in devices:
            device.end()
