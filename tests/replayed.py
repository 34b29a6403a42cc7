"""What a captured graph does with arguments, arena and outputs, on the CPU: its kernels are run again for every call.

Takes: calls of compiled models while `replayed` is in place. Gives: the first call of a shape as the lane runs it;
every later one in the order of a schedule, reading copies of the arguments, in an arena, outputs copied out. Must not
change: anything else. What only CUDA does (streams, capture, pools of memory) is not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opara_backend.execution import cuda_graph, first_run, host
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.host import Arena
from opara_backend.execution.outputs import OutputSpec
from opara_backend.execution.program import Activation
from opara_backend.execution.runtime import Runtime
from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.profile import build_profile


class Replayed:
    """One shape, as `execution.lane` keeps it."""

    def __init__(self, runtime: Runtime, graph: KernelGraph, durations: Sequence[float], args: Sequence[Any]) -> None:
        self.runtime, self.graph, self.replays = runtime, graph, 0
        profile = build_profile(graph, durations, None, None)
        (schedule,) = runtime.schedules(graph, profile)
        self.plan = runtime.plan(graph, profile, schedule, captured=True)
        self.arguments = StaticArguments(runtime.program, graph, args)
        self.arena = Arena(self.plan.memory, "cpu")

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        if not self.arguments.accept(list(args)):  # parameters that have moved: the lane would capture again
            return host.run_unplanned(self.runtime.program, args, self.runtime.lives)
        self.arguments.load(args)
        run = Activation(self.runtime.program, self.arguments.values, self.arena)
        run.advance()
        for kernel, over in zip(self.plan.schedule.order, self.plan.memory.releases, strict=True):
            for name in over:
                run.release[name]()
            run.tasks[kernel]()
        run.advance()
        outputs = OutputSpec(self.runtime.program, self.graph, run.outputs, self.arguments.values)
        self.arguments.store(args)
        self.replays += 1
        return outputs.collect(args)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Calls on the CPU go through `Replayed` while the test runs; a list of those made."""
    made: list[Replayed] = []

    def first_call(self: Runtime, key: tuple[Any, ...], args: Sequence[Any]) -> tuple[Any, ...]:
        seen = first_run.observe_apart(self.program, self.graph, args, self.lives)
        made.append(Replayed(self, self.graph.bind(seen.nbytes), seen.durations, args))
        self._executables[key] = made[-1]
        return seen.outputs

    monkeypatch.setattr(torch.cuda, "MemPool", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", contextlib.nullcontext)
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(first_run, "private_streams", lambda device, count: [stream])
    monkeypatch.setattr(cuda_graph, "give_up_workspaces", lambda streams: None)
    monkeypatch.setattr(Runtime, "_first_call", first_call)
    return made
