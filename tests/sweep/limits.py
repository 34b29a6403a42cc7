"""A limit on the seconds a block may take, and errors as words fit for a table.

Takes: blocks and exceptions. Gives: `TimeLimit` in the main thread of a process, and texts without machine paths.
Must not change: alarms set before. A block that never returns to Python is ended by the pool that runs it.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

_LONGEST = 400  # characters of a text


class TimeLimit(BaseException):
    """The block took too long. No `Exception`, so that nothing in between takes it for a failure of its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit in the block after `seconds`."""

    def ring(signum: int, frame: Any) -> None:
        raise TimeLimit

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm was running, such as that of a test's own time limit
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - begun)))


def describe(error: BaseException) -> str:
    """Type and message of `error`, short, without paths, addresses or temporary names."""
    return clean(f"{type(error).__name__}: {error}")


def clean(text: str) -> str:
    """`text` on one line, with nothing in it that differs from machine to machine."""
    text = re.sub(r"(/[\w.+-]+)+/(?=[\w.+-]+)", "", text)
    text = re.sub(r"\b0x[0-9a-f]+\b", "0x", text)
    return " ".join(text.split())[:_LONGEST]
