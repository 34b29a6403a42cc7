"""What a generated module holds: the program as a generator, its KernelGraph, and how to step through it.

Takes: `program(args, alloc, task, release)` as `lowering.program` describes it. Gives: `Program`, which hands each
compiled model a callable of its own, and `Activation`, one run of the generator.
Must not change: the caller's list of arguments, beyond what stock Inductor does to it (it is emptied).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from opara_backend import fallback, options
from opara_backend.kernel_graph import KernelGraph

Task = Callable[[], None]


class Allocate(Protocol):
    """Makes the tensor for a buffer; `size` and `stride` in elements."""

    def __call__(
        self, name: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str
    ) -> torch.Tensor: ...


def fresh(name: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of its own, from the device's allocator."""
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


@dataclass(frozen=True)
class Program:
    """A lowered graph, as its generated module carries it.

    graph: None where lowering left the text to stock Inductor, with `unsupported` saying why.
    inputs: names of all arguments by position, sizes included. static_inputs: positions whose addresses stay.
    dynamic_inputs: positions of tensors with symbolic sizes or strides. number_inputs: positions of tensors on the CPU
    of which kernels on the GPU are given the value. labels: of the graph it was lowered from (`options.Compilation`).
    rewrites: which of `options.REWRITES` found something to do; possible: which others would have, if that was asked.
    """

    run: Callable[..., Any]
    graph_json: str | None
    inputs: tuple[str, ...] = ()
    static_inputs: tuple[int, ...] = ()
    dynamic_inputs: tuple[int, ...] = ()
    number_inputs: tuple[int, ...] = ()
    unsupported: str = ""
    labels: str = ""
    rewrites: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Name of the generated module, which Inductor derives from its text, kernels included."""
        return Path(self.run.__code__.co_filename).stem

    def bind(self) -> Callable[[list[Any]], Any]:
        """A callable with state of its own (captures, streams, lock), under the options now current."""
        compilation = options.current()
        compilation.reached = True
        chosen = compilation.options
        if self.graph_json is None:
            fallback.step_down(fallback.FallbackReason.UNSUPPORTED_LOWERING, self.unsupported, policy=chosen.fallback)
            return lambda args: self.run(args, None, None, None)
        from opara_backend.execution.runtime import Runtime

        graph = KernelGraph.from_json(self.graph_json)
        if compilation.labels != self.labels:  # out of a cache, made for a graph that is alike
            graph = graph.without_labels()
        runtime = Runtime(self, graph, chosen)
        compilation.bound.append(runtime)
        if not chosen.annotate:
            return runtime
        from opara_backend.report import annotate

        return annotate.named_call(runtime, runtime.name)


class Activation:
    """One run of a program's generator: the kernels it has handed over, and its outputs in the end."""

    def __init__(self, program: Program, args: Sequence[Any], alloc: Allocate) -> None:
        self.tasks: list[Task] = []
        self.release: dict[str, Callable[[], None]] = {}
        self.outputs: tuple[Any, ...] = ()
        self._steps: Generator[None, None, tuple[Any, ...]] = program.run(
            list(args), alloc, self.tasks.append, self.release
        )

    def advance(self) -> bool:
        """Go on until the kernels handed over so far must have run; False once the outputs are there."""
        try:
            next(self._steps)
        except StopIteration as finished:
            self.outputs = finished.value
            return False
        return True
