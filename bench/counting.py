"""Work counted, not timed: the same on a busy machine and an idle one.

Takes: a function. Gives: Python instructions it executes, or functions it calls. Must not change: anything; tracing
and profiling functions that were set are put back. Imports no torch. Differs between versions of Python.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


def instructions(work: Callable[[], object]) -> int:
    """Bytecode instructions `work` executes in Python; what C functions do counts as the one that calls them."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    with _no_collection():
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)
    return count


def calls(work: Callable[[], object]) -> int:
    """Functions `work` calls, of Python and of C, in this thread."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    with _no_collection():
        sys.setprofile(profile)
        try:
            work()
        finally:
            sys.setprofile(before)
    return count


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Finalizers run at a collection, which comes whenever it likes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
