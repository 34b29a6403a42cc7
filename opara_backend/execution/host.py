"""Runs a program in program order; and what every way of running one needs: a Plan, an Arena.

Takes: a Program and arguments. Gives: the outputs, and what the run showed.
Must not change: anything but what the program itself writes. State per call only, so threads may run side by side.
"""

from __future__ import annotations

import operator
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from opara_backend import upstream
from opara_backend.execution.program import Activation, Program, fresh
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import Lifetimes, MemoryPlan
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.segments import segment_bytes


@dataclass(frozen=True)
class Plan:
    """Everything decided for one concrete shape.

    pool: by stream, bytes that torch's allocator reserves for what kernels allocate themselves, None where that was not
    asked. segments: of these, by stream, the bytes to reserve in one piece before a capture.
    """

    graph: KernelGraph
    profile: Profile
    schedule: Schedule
    memory: MemoryPlan
    verify_seconds: float = 0.0
    pool: Mapping[int, int] | None = None
    segments: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def reserved(self) -> int:
        """Bytes that the allocator reserves for the arena and that."""
        return segment_bytes(self.memory.arena_bytes) + sum((self.pool or {}).values())


class Metered(NamedTuple):
    """Bytes, as an allocator counts them: allocated, and freed."""

    allocated: int
    freed: int


@dataclass(frozen=True)
class Observed:
    """What one run in program order showed: outputs, bytes of each buffer, seconds per kernel as the host sees it.

    nbytes: None for a buffer that an operator has kept, or returned as its result: nobody knows when it ends.
    metered: what was allocated and freed while a kernel was launched, of those during which anything was; nothing
    without a meter.
    """

    outputs: tuple[Any, ...]
    nbytes: dict[str, int | None]
    durations: tuple[float, ...]
    metered: Mapping[int, Metered]


Supply = Callable[[int], torch.Tensor]
"""Gives at least so many bytes, as a tensor of bytes."""


class Arena:
    """One piece of memory that a MemoryPlan cuts up. Buffers without a place in it are allocated on their own."""

    def __init__(self, plan: MemoryPlan, device: str, supply: Supply | None = None) -> None:
        make = supply or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device))
        self.bytes = make(plan.arena_bytes) if plan.arena_bytes else None
        self._offset = plan.offsets

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return 0 if self.bytes is None else self.bytes.numel()

    def __call__(
        self, name: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        offset = self._offset.get(name)
        if offset is None or self.bytes is None:
            return fresh(name, size, stride, dtype, device)
        nbytes = storage_bytes(size, stride, dtype)
        flat = self.bytes.narrow(0, offset, nbytes).view(dtype)
        return torch.as_strided(flat, size, stride)


class SharedMemory:
    """Memory that arenas share which are never in use at once: a new one takes the tightest piece that is there.

    A piece lives as long as an arena in it does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pieces: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, nbytes: int) -> torch.Tensor:
        pieces = [piece for ref in self._pieces if (piece := ref()) is not None]
        fitting = [piece for piece in pieces if piece.numel() >= nbytes]
        found = min(fitting, key=torch.Tensor.numel, default=None)
        if found is None:
            found = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            pieces.append(found)
        self._pieces = [weakref.ref(piece) for piece in pieces]
        return found


def storage_bytes(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to behind the last element of a tensor of that layout."""
    if any(s == 0 for s in size):
        return 0
    return (1 + sum((s - 1) * t for s, t in zip(size, stride, strict=True))) * dtype.itemsize


class _OnDemand:
    """Memory for a plain run: buffers are there from the first kernel that touches them to the last.

    A program allocates all its buffers before its first kernel runs, because sizes are known then. Their storages are
    emptied at once and filled when needed, as an allocator would have it if they were allocated one by one. Those that
    a custom operator has kept stay as they are.
    """

    def __init__(self, lives: Lifetimes | None) -> None:
        self.lives = lives
        self._storages: dict[str, tuple[torch.UntypedStorage, int]] = {}
        self._tensors: dict[str, torch.Tensor] = {}  # of those that a custom operator may keep
        self._references: dict[str, tuple[int, ...]] = {}
        self.nbytes: dict[str, int | None] = {}

    def __call__(
        self, name: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str
    ) -> torch.Tensor:
        self.nbytes[name] = storage_bytes(size, stride, dtype)
        tensor = fresh(name, size, stride, dtype, device)
        if self.lives is not None and name in self.lives.buffers:
            storage = tensor.untyped_storage()
            self._storages[name] = storage, storage.nbytes()
            storage.resize_(0)
            if name in self.lives.may_stay:
                self._tensors[name] = tensor
        return tensor

    def before(self, kernel: int) -> None:
        """Fill the storages of the buffers that `kernel` is the first to touch."""
        if self.lives is not None:
            for name in self.lives.begin[kernel]:
                if name in self._storages:
                    storage, nbytes = self._storages[name]
                    storage.resize_(nbytes)
            self._references = self._count(kernel)

    def behind(self, kernel: int, release: Mapping[str, Callable[[], None]]) -> None:
        """Give back the buffers that `kernel` is the last to touch.

        But for those that a custom operator has kept: when it returned somebody new referred to them, who may let go
        before the end, or when the program has let go of them, with all its views, somebody still does.
        """
        if self.lives is None:
            return
        for name, now in self._count(kernel).items():
            if any(map(operator.gt, now, self._references[name])):
                self._kept(name)
        for name in self.lives.end[kernel]:
            storage, _ = self._storages.get(name, (None, 0))
            if name in release and (storage is None or name in self.lives.may_stay):
                release[name]()
            self._tensors.pop(name, None)
            if storage is not None and name in self.lives.may_stay and upstream.holders(storage) > 1:
                self._kept(name)
            elif storage is not None:
                storage.resize_(0)
                del self._storages[name]

    def _count(self, kernel: int) -> dict[str, tuple[int, ...]]:
        """How often those buffers are referred to that `kernel` is given and may keep, as far as none has yet."""
        lent = self.lives.lent[kernel] if self.lives is not None else ()
        still = [name for name in lent if name in self._tensors]
        return {name: upstream.references(self._tensors[name], self._storages[name][0]) for name in still}

    def _kept(self, name: str) -> None:
        """Leave a buffer to whoever has it."""
        self.nbytes[name] = None
        del self._storages[name]
        self._tensors.pop(name, None)


def observe(
    program: Program,
    args: Sequence[Any],
    lives: Lifetimes | None = None,
    meter: Callable[[int], Metered | None] = lambda kernel: None,
) -> Observed:
    """Run once in program order, each buffer in memory of its own: a plain run whose sizes and times are written down.

    lives: when each buffer is needed; without it all memory is held until the end, which is right for every program.
    meter: what has been allocated and freed so far, asked before and behind each kernel, whose index it is given; None
    where that is of no interest.
    """
    memory = _OnDemand(lives)
    activation = Activation(program, args, memory)
    durations: list[float] = []
    metered: dict[int, Metered] = {}
    while activation.advance():
        for kernel in range(len(durations), len(activation.tasks)):
            memory.before(kernel)
            before = meter(kernel)
            start = time.perf_counter()
            activation.tasks[kernel]()
            durations.append(time.perf_counter() - start)
            after = meter(kernel)
            if before is not None and after is not None and before != after:
                metered[kernel] = Metered(after.allocated - before.allocated, after.freed - before.freed)
            memory.behind(kernel, activation.release)
    return Observed(activation.outputs, memory.nbytes, tuple(durations), MappingProxyType(metered))


def run_unplanned(program: Program, args: Sequence[Any], lives: Lifetimes | None = None) -> tuple[Any, ...]:
    """Run in program order with memory from the allocator: what works for every program."""
    return observe(program, args, lives).outputs
