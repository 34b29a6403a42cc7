"""What has to be alone on a GPU, seen from the process that does it: it asks, waits, and says when it is done.

Takes: blocks. Gives: the same blocks, run while every other worker of this GPU is stopped. A process that was given
no gate (`through`) just runs them. Must not change: what runs; what is wrapped is put back. Imports no torch.

1. Finish what this process has queued on the device, then write `ENTER` to whoever grants (`bench.turns`).
2. Wait for the answer: how many seconds the others' queued work may still need. Wait that long too, then run.
3. Finish again, and write `LEAVE`. A block inside another one just runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENTER, LEAVE = "enter", "leave"


class Gate:
    """The way in. say: tells whoever grants; hear: the next line from there, empty at its end; finish: waits until
    this process's own work on the device is done."""

    def __init__(self, say: Callable[[str], None], hear: Callable[[], str], finish: Callable[[], None]) -> None:
        self._say, self._hear, self._finish = say, hear, finish
        self._inside = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Run the block alone. SystemExit if nobody grants any more: nobody waits for the figures either."""
        if self._inside:
            yield
            return
        self._finish()
        self._tell(json.dumps(ENTER))
        granted = self._hear()
        if not granted:
            raise SystemExit("whoever granted the GPU has gone")
        time.sleep(float(granted))
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            try:
                self._finish()
            finally:
                self._tell(json.dumps(LEAVE))

    def _tell(self, text: str) -> None:
        try:
            self._say(text)
        except OSError as error:
            raise SystemExit("whoever granted the GPU has gone") from error


_gate: Gate | None = None


@contextlib.contextmanager
def through(gate: Gate) -> Iterator[None]:
    """In the block, `gate` is the way to be alone."""
    global _gate
    before, _gate = _gate, gate
    try:
        yield
    finally:
        _gate = before


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run the block alone on this GPU; at once where there is no gate."""
    if _gate is None:
        yield
        return
    with _gate.held():
        yield


@contextlib.contextmanager
def searching_alone() -> Iterator[None]:
    """Each search for schedules in the block is alone. Enter it last: whoever times searches must not time the wait."""
    if _gate is None:
        yield
        return
    lane: Any = importlib.import_module("opara_backend.execution.lane")
    original = lane.capture_fastest

    def capture_fastest(*args: Any, **kwargs: Any) -> Any:
        with alone():
            return original(*args, **kwargs)

    with _replaced(lane, "capture_fastest", capture_fastest):
        yield


@contextlib.contextmanager
def tuning_alone(lock: Path | None) -> Iterator[None]:
    """In the block, configurations of Triton kernels are timed while no other process holds `lock`, a file.

    For processes that compile at the same time: one that is disturbed keeps a slower kernel for good. None: as ever.
    """
    if lock is None:
        yield
        return
    tuner: Any = importlib.import_module("opara_backend.upstream").CachingAutotuner
    original = tuner.benchmark_all_configs
    lock.parent.mkdir(parents=True, exist_ok=True)

    def benchmark_all_configs(*args: Any, **kwargs: Any) -> Any:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            return original(*args, **kwargs)

    with _replaced(tuner, "benchmark_all_configs", benchmark_all_configs):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """What `owner` has as `name` is `by` in the block, and is put back."""
    original = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, original)
