"""Runs a program in order: on the CPU, or on a CUDA device without capture.

Takes: a Program and arguments; with a `Plan`, its launch order and its memory. Gives: the outputs.
Must not change: anything but what the program itself writes. State per call only, so threads may run side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opara_backend.execution.program import Activation, Program, fresh
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlan
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """Everything decided for one concrete shape."""

    graph: KernelGraph
    profile: Profile
    schedule: Schedule
    memory: MemoryPlan
    verify_seconds: float = 0.0


@dataclass(frozen=True)
class Observed:
    """What one run in program order showed: outputs, bytes of each buffer, seconds per kernel as the host sees it."""

    outputs: tuple[Any, ...]
    nbytes: dict[str, int]
    durations: tuple[float, ...]


class Arena:
    """One piece of memory that a MemoryPlan cuts up. Buffers without a place in it are allocated on their own."""

    def __init__(self, plan: MemoryPlan, device: str) -> None:
        self.bytes = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=device) if plan.arena_bytes else None
        self._offset = {p.buffer: p.offset for p in plan.placements}

    def __call__(
        self, name: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        offset = self._offset.get(name)
        if offset is None or self.bytes is None:
            return fresh(name, size, stride, dtype, device)
        nbytes = storage_bytes(size, stride, dtype)
        flat = self.bytes.narrow(0, offset, nbytes).view(dtype)
        return torch.as_strided(flat, size, stride)


def storage_bytes(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to behind the last element of a tensor of that layout."""
    if any(s == 0 for s in size):
        return 0
    return (1 + sum((s - 1) * t for s, t in zip(size, stride, strict=True))) * dtype.itemsize


def observe(program: Program, args: Sequence[Any]) -> Observed:
    """Run once in program order, every buffer on its own: a plain run whose sizes and times are written down."""
    nbytes: dict[str, int] = {}

    def alloc(name: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
        nbytes[name] = storage_bytes(size, stride, dtype)
        return fresh(name, size, stride, dtype, device)

    activation = Activation(program, args, alloc)
    durations: list[float] = []
    while activation.advance():
        for task in activation.tasks[len(durations) :]:
            start = time.perf_counter()
            task()
            durations.append(time.perf_counter() - start)
    return Observed(activation.outputs, nbytes, tuple(durations))


def run_unplanned(program: Program, args: Sequence[Any]) -> tuple[Any, ...]:
    """Run in program order with memory from the allocator: what works for every program."""
    activation = Activation(program, args, fresh)
    done = 0
    while activation.advance():
        for task in activation.tasks[done:]:
            task()
        done = len(activation.tasks)
    return activation.outputs


class InOrder:
    """A planned program, run kernel by kernel in launch order on the current stream or the CPU."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self._device = plan.graph.device
        # Arenas are lent to calls and come back; appending and popping a list is atomic, so no lock is needed. On
        # CUDA the allocator does the same, and orders reuse by stream, which a list could not.
        self._idle: list[Arena] = []

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        try:
            arena = self._idle.pop()
        except IndexError:
            arena = Arena(self.plan.memory, self._device)
        activation = Activation(self.program, args, arena)
        activation.advance()
        for kernel, finished in zip(self.plan.schedule.order, self.plan.memory.releases, strict=True):
            for name in finished:
                activation.release[name]()
            activation.tasks[kernel]()
        activation.advance()
        if self._device == "cpu":
            self._idle.append(arena)
        return activation.outputs
