"""One fresh process that answers jobs with rows, from its parent's side: spoken to, listened to, paused, ended.

Takes: jobs. Gives: rows (`bench.samples`), and what else it says. Must not change: anything. WorkerError says why a
process gave no rows. It writes a line whenever it likes: reading never waits for the rest of one, because a process
that is paused in the middle of a line will not finish it.

Each leads a process group: it is paused with all it started, and should its parent be killed while it is paused, the
system ends it. One that is not paused ends when it next looks for a job.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.run import Job, as_dict
from bench.samples import Row, row_from

ROOT = Path(__file__).parent.parent
MEASURE, TURNS, FIRST_CALL = "measure", "turns", "first_call"


class WorkerError(RuntimeError):
    """A worker that died or took too long; the message is for the row."""


class Worker:
    """One process, in a process group of its own with what it starts. mode: what it answers jobs with.

    `MEASURE`: rows with samples; `TURNS`: the same, asking before it needs a GPU for itself (`bench.turns` grants);
    `FIRST_CALL`: it only compiles and checks. program: for tests, what Python runs instead.
    """

    def __init__(
        self,
        mode: str = MEASURE,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "bench.workers"),
    ) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, *program, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what lies in a buffer `select` does not see
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._read = b""
        self._at_work = False
        self.paused = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def fileno(self) -> int:
        """For `select`: readable when it has said something, or ended."""
        return self._output.fileno()

    def send(self, job: Job) -> None:
        """Give it a job."""
        self._at_work = True
        self.say(json.dumps(as_dict(job)))

    def say(self, text: str) -> None:
        """Write it a line; nothing if it has ended, which reading from it tells."""
        with contextlib.suppress(BrokenPipeError):
            self._input.write(f"{text}\n".encode())

    def message(self) -> str | None:
        """The next line it wrote, None if there is no whole one yet; WorkerError if it has ended."""
        if b"\n" not in self._read and self._readable(0):
            part = os.read(self.fileno(), 1 << 20)
            if not part:
                raise WorkerError(f"the process ended with exit code {self._exit_code()}")
            self._read += part
        line, newline, rest = self._read.partition(b"\n")
        if not newline:
            return None
        self._read = rest
        return line.decode()

    def rows(self, said: Any) -> list[Row]:
        """What an answer to a job says; the worker is free for the next one."""
        self._at_work = False
        return [row_from(data) for data in said]

    def receive(self, timeout: float | None = None) -> list[Row]:
        """The rows of the job sent; WorkerError if the process ends first, or `timeout` seconds pass."""
        end = None if timeout is None else time.monotonic() + timeout
        while (message := self.message()) is None:
            if not self._readable(None if end is None else max(0.0, end - time.monotonic())):
                self.stop()
                raise WorkerError(f"took longer than {timeout:.0f} s")
        return self.rows(json.loads(message))

    def ready(self) -> bool:
        """True if it has answered, or ended."""
        return bool(self._read) or self._readable(0)

    def pause(self, paused: bool = True) -> None:
        """Stop it and what it started where they are, or let them go on."""
        if paused != self.paused and not self.ended():
            self._signal(signal.SIGSTOP if paused else signal.SIGCONT)
            self.paused = paused

    def ended(self) -> bool:
        """True if the process is no more."""
        return self._process.poll() is not None

    def retire(self) -> None:
        """Let it end by itself: there are no more jobs for it."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()

    def stop(self) -> None:
        """End the process, at once if it is still at work."""
        self.retire()
        self._exit_code(0.0 if self._at_work else 10.0)
        self._output.close()

    def _readable(self, timeout: float | None) -> bool:
        return bool(select.select([self], [], [], timeout)[0])

    def _exit_code(self, patience: float = 10.0) -> int:
        """Wait until it has ended; after `patience` seconds it is killed."""
        self.pause(False)
        try:
            return self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            return self._process.wait()

    def _signal(self, number: int) -> None:
        pid = self._process.pid
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has only just begun, and no group yet
            self._process.send_signal(number)
