"""A planned program, run kernel by kernel in launch order: on the CPU, or on a CUDA device without capture.

Takes: a Program, its Plan for one shape, arguments; on the CPU, a `Spare` that all shapes of a graph share. Gives: the
outputs. Must not change: anything but what the program itself writes. Calls may run side by side, or one inside another
(an operator may call the model): each has an arena of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from opara_backend.execution.host import Arena, Plan
from opara_backend.execution.program import Activation, Program


class Spare:
    """One piece of memory on the CPU that is kept between calls, for the next of any shape.

    An arena is one large block, which the system's allocator may map anew each time, where it keeps plain Inductor's
    many small ones. More than one piece is not kept: what calls side by side need beyond it goes when they end. A piece
    that is too small makes way for one that is not, so that soon it is as large as any shape needs.
    """

    def __init__(self) -> None:
        self._pieces: deque[torch.Tensor] = deque(maxlen=1)  # appending and popping are atomic, so it needs no lock

    def take(self, nbytes: int) -> torch.Tensor:
        """At least so many bytes, nobody else's until they are given back. What never is goes with its last user."""
        try:
            piece = self._pieces.pop()
        except IndexError:
            return torch.empty(nbytes, dtype=torch.uint8)
        if piece.numel() < nbytes:
            del piece  # first: there may be no room for both
            return torch.empty(nbytes, dtype=torch.uint8)
        return piece

    def give(self, piece: torch.Tensor) -> None:
        """Keep `piece`, in place of any other."""
        self._pieces.append(piece)


class InOrder:
    """One planned shape, ready to run. spare: where arenas come from; without it, from torch's allocator.

    On CUDA that one keeps what is freed, and orders reuse by stream, which a Spare could not.
    """

    def __init__(self, program: Program, plan: Plan, spare: Spare | None = None) -> None:
        self.program, self.plan = program, plan
        self._spare = spare

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        spare, memory = self._spare, self.plan.memory
        arena = Arena(memory, self.plan.graph.device, spare.take if spare is not None else None)
        activation = Activation(self.program, args, arena)
        activation.advance()
        for kernel, finished in zip(self.plan.schedule.order, memory.releases, strict=True):
            for name in finished:
                activation.release[name]()
            activation.tasks[kernel]()
        activation.advance()
        if spare is not None and arena.bytes is not None:  # not behind an error, whose traceback may hold what is in it
            spare.give(arena.bytes)
        return activation.outputs
