"""Workers of one GPU: never two alone at once, the others really stopped, and no case lost but the one at fault.

The processes are real and really stopped; what they do instead of measuring is `WORKER`. Each counts as fast as it
can outside the gate, and looks from inside whether anybody else's count moves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.run import Job
from bench.samples import Row
from bench.turns import Device, Limits, deal, in_turns
from bench.worker import ROOT, Worker

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

WORKER = """
import json, mmap, os, struct, sys, time
from pathlib import Path
from bench import gate

os.setpgrp()
answers = os.fdopen(os.dup(1), "w")
folder = Path(sys.argv[1])
own = folder / f"{os.getpid()}.count"
own.write_bytes(bytes(8))
file = own.open("r+b")
memory = mmap.mmap(file.fileno(), 8)

def say(text):
    answers.write(text + "\\n")
    answers.flush()

def count(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        memory[:] = struct.pack("q", struct.unpack("q", memory[:])[0] + 1)

def others():
    return {path.name: path.read_bytes() for path in folder.glob("*.count") if path != own}

def note(what):
    with (folder / "log").open("a") as log:
        log.write(f"{what} {os.getpid()}\\n")

for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    word, found = job["model"], "quiet"
    count(0.1)
    with gate.through(gate.Gate(say, sys.stdin.readline, lambda: None)):
        for _ in range(2 if word == "times" else 0):
            with gate.alone(), gate.alone():
                note("in")
                before = others()
                time.sleep(0.1)
                if others() != before:
                    found = "disturbed"
                note("out")
            count(0.02)
        if word == "counts":
            count(0.5)
        if word == "sleeps":
            time.sleep(60)
        if word == "dies":
            with gate.alone():
                os._exit(9)
        if word in ("holds", "hangs"):
            with gate.alone():
                note("in")
                time.sleep(1 if word == "holds" else 60)
    say(json.dumps([{**{k: job[k] for k in ("model", "dtype", "batch", "process")}, "backend": str(os.getpid()),
                     "samples": None, "problem": found}]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The file of `WORKER`."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def jobs_of(*words: str, process: int = 0) -> list[Job]:
    return [Job(word, "float32", place, ("eager",), process=process) for place, word in enumerate(words)]


def done(jobs: list[Job], script: Path, each: int = 3, gpus: int = 1, **limits: float) -> list[Row]:
    """The only row of each job, in the jobs' order; every process that was started has ended."""
    started: list[Worker] = []

    def start(gpu: str | None) -> Worker:
        folder = script.parent / str(gpu)
        folder.mkdir(exist_ok=True)
        started.append(Worker(program=(str(script), str(folder))))
        return started[-1]

    found = [
        rows[0]
        for rows in in_turns(jobs, gpus=tuple(map(str, range(gpus))), each=each, limits=Limits(**limits), start=start)
    ]
    assert all(worker.ended() for worker in started)
    return sorted(found, key=lambda row: (row.process, row.batch))


def test_one_at_a_time_and_nobody_else_moves(script: Path) -> None:
    rows = done(jobs_of("times", "counts", "times", "counts", "times"), script)
    assert [row.problem for row in rows] == ["quiet"] * 5
    log = [line.split() for line in (script.parent / "0" / "log").read_text().splitlines()]
    assert [word for word, _ in log] == ["in", "out"] * 6
    assert all(log[place][1] == log[place + 1][1] for place in range(0, 12, 2))
    assert len({row.backend for row in rows}) == 3  # and no new process a case


def test_a_pass_has_processes_of_its_own_and_a_gpu_does_not_stop_another(script: Path) -> None:
    rows = done(jobs_of("counts", "times", "times") + jobs_of("times", "times", process=1), script, each=1, gpus=2)
    assert [row.problem for row in rows] == ["quiet"] * 5
    first, second = ({row.backend for row in rows if row.process == process} for process in (0, 1))
    assert not first & second
    assert {path.name for path in script.parent.glob("?")} == {"0", "1"}


def test_one_that_dies_or_stays_too_long_alone_loses_its_case_and_no_other(script: Path) -> None:
    rows = done(jobs_of("dies", "counts", "hangs", "times", "times"), script, alone=0.5)
    assert [row.problem for row in rows] == [
        "the process ended with exit code 9",
        "quiet",
        "was alone on the GPU for longer than 0 s",
        "quiet",
        "quiet",
    ]


def test_waiting_and_being_stopped_do_not_count(script: Path) -> None:
    """Two are stopped for longer than they may take, while two others take longer than they may."""
    rows = done(jobs_of("hangs", "hangs", "times", "times"), script, each=4, case=1.5)
    assert [row.problem for row in rows] == ["took longer than 2 s", "took longer than 2 s", "quiet", "quiet"]


def test_nothing_is_begun_after_the_deadline_and_what_has_begun_is_given_up_soon(script: Path) -> None:
    started: list[Worker] = []

    def start(gpu: str | None) -> Worker:
        started.append(Worker(program=(str(script), str(script.parent))))
        return started[-1]

    def run(seconds: float, *words: str) -> list[list[Row]]:
        end = time.monotonic() + seconds
        return list(
            in_turns(jobs_of(*words), gpus=(None,), each=2, deadline=end, limits=Limits(grace=0.7), start=start)
        )

    assert run(0.0, "times") == []
    assert started == []
    assert [rows[0].model for rows in run(0.5, "sleeps", "counts", "counts")] == ["counts"]
    assert run(0.5, "hangs", "counts") == []  # one alone, the other stopped
    assert all(worker.ended() for worker in started)


def test_a_generator_closed_early_leaves_no_process(script: Path) -> None:
    started: list[Worker] = []

    def start(gpu: str | None) -> Worker:
        started.append(Worker(program=(str(script), str(script.parent))))
        return started[-1]

    found = in_turns(jobs_of("dies", "sleeps", "counts"), gpus=(None,), each=3, start=start)
    assert next(found)
    found.close()
    assert len(started) == 3
    assert all(worker.ended() for worker in started)


def state(pid: int) -> str:
    """`T` if it is stopped, `Z` if it has ended or is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


PARENT = """
import sys
from bench.turns import in_turns
from bench.worker import Worker
from bench.run import Job

jobs = [Job(word, "float32", 1, ("eager",)) for word in ("counts", "holds")]
list(in_turns(jobs, gpus=(None,), each=2, start=lambda gpu: Worker(program=tuple(sys.argv[1:]))))
"""


def test_when_the_parent_is_killed_nobody_stays_stopped(script: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PARENT, str(script), str(script.parent)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as parent:
        log = script.parent / "log"
        wait_for(lambda: log.exists() and log.read_text(), 60)
        holder = int(log.read_text().split()[1])
        (other,) = (int(path.stem) for path in script.parent.glob("*.count") if path.stem != str(holder))
        wait_for(lambda: state(other) == "T")
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: state(other) == "Z")
    wait_for(lambda: state(holder) == "Z")


class Fake:
    """A worker that is told much and does nothing."""

    paused = False

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.retired = False

    def send(self, job: Job) -> None:
        assert not self.retired
        self.jobs.append(job)

    def retire(self) -> None:
        self.retired = True


@given(
    processes=st.lists(st.integers(0, 2), max_size=30).map(sorted),
    gpus=st.integers(1, 4),
    each=st.integers(1, 4),
    done=st.randoms(use_true_random=False),
)
def test_dealing_out(processes: list[int], gpus: int, each: int, done: Any) -> None:
    """Every job once, in order, evenly; never more than `each` a GPU, and a process serves one pass."""
    made: list[Fake] = []

    def start(gpu: str | None) -> Any:
        made.append(Fake())
        return made[-1]

    devices = [Device(str(gpu), each, Limits(), start) for gpu in range(gpus)]
    jobs = [Job("m", "float32", place, ("eager",), process=process) for place, process in enumerate(processes)]
    waiting, given_out = deque(jobs), 0
    while waiting:
        deal(waiting, devices)
        counts = [len(device.busy) for device in devices]
        assert max(counts) <= each
        assert not waiting or min(counts) == each  # nobody waits where there is room
        if given_out == 0:
            assert max(counts) - min(counts) <= 1
        assert all(len(device.seats) <= each for device in devices)
        assert sum(len(fake.jobs) for fake in made) == len(jobs) - len(waiting) > given_out
        given_out = len(jobs) - len(waiting)
        assert jobs[given_out:] == list(waiting)
        for device in devices:
            for seat in done.sample(device.busy, done.randint(1, len(device.busy))) if device.busy else ():
                seat.job = None
    assert sorted(job.batch for fake in made for job in fake.jobs) == list(range(len(jobs)))
    assert all(len({job.process for job in fake.jobs}) == 1 for fake in made)


def test_nothing_is_dealt_to_a_gpu_where_somebody_is_alone() -> None:
    fake: Any = Fake
    devices = [Device(name, 2, Limits(), lambda gpu: fake()) for name in ("0", "1")]
    deal(deque(jobs_of("a")), devices)
    devices[0].holder = devices[0].seats[0]
    deal(deque(jobs_of("b", "c", "d")), devices)
    assert [len(device.busy) for device in devices] == [1, 2]
