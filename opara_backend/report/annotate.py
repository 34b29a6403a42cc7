"""Names for profilers: scopes around calls, kernels and the stages of a first call, with `annotate=True`.

Takes: a compiled graph. Gives: `torch.profiler.record_function` scopes, and on CUDA NVTX ranges around first call,
profiling, capture and replay. Must not change: what runs, nor in which order. Without the option nothing here runs:
wrappers are put on when a graph is made, none asks at every call.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from opara_backend.execution.program import Program, Task
from opara_backend.kernel_graph import KernelGraph

Call = Callable[..., Any]


def named_call(call: Call, name: str) -> Call:
    """`call` inside a scope called `name`."""

    def named(*args: Any) -> Any:
        with torch.profiler.record_function(name):
            return call(*args)

    return named


def named_kernels(program: Program, graph: KernelGraph) -> Program:
    """`program` whose kernels run in scopes like `k3 triton_poi_fused_relu_0`, where they are launched one by one."""
    names = [f"{kernel.name} {kernel.call}" for kernel in graph.kernels]

    def run(args: Any, alloc: Any, task: Callable[[Task], None], release: Any) -> Any:
        numbers = itertools.count()
        return program.run(args, alloc, lambda kernel: task(named_call(kernel, names[next(numbers)])), release)

    return replace(program, run=run)


def stage(annotate: bool, name: str, what: str) -> contextlib.AbstractContextManager[None]:
    """A range around one stage of a first call on CUDA; nothing without `annotate`."""
    return ranged(f"{name}: {what}") if annotate else contextlib.nullcontext()


@contextlib.contextmanager
def ranged(name: str) -> Iterator[None]:
    """A scope and an NVTX range, on CUDA."""
    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name):
        yield
