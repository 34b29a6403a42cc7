"""Runs a planned program in any order its schedule allows, and spoils memory the moment the plan calls it free.

Takes: what `execution.in_order.InOrder` takes, and a choice of interleaving. Gives: the program's outputs.
Must not change: anything else. On a GPU the streams race; here the race is played out kernel by kernel, so that a
missing wait, or two buffers that share bytes wrongly, becomes a wrong result on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opara_backend.execution.host import Arena, Plan
from opara_backend.execution.program import Activation, Program
from opara_backend.memory import Placement

POISON = 0xFF  # NaN in every floating-point type, -1 in every signed integer

Choose = Callable[[Sequence[int]], int]


def run(program: Program, plan: Plan, args: Sequence[Any], choose: Choose) -> tuple[Any, ...]:
    """Run the program; `choose` picks the next kernel among those whose stream and waits allow them to start."""
    schedule, graph = plan.schedule, plan.graph
    arena = Arena(plan.memory, graph.device)
    if arena.bytes is not None:
        arena.bytes.fill_(POISON)
    activation = Activation(program, args, arena)
    activation.advance()
    left = _accesses_left(plan)
    blockers: list[set[int]] = [set(waits) for waits in schedule.waits]
    previous: dict[int, int] = {}
    for kernel in schedule.order:
        stream = schedule.stream[kernel]
        if stream in previous:
            blockers[kernel].add(previous[stream])
        previous[stream] = kernel
    pending = list(schedule.order)
    while pending:
        kernel = choose([k for k in pending if not blockers[k]])
        activation.tasks[kernel]()
        pending.remove(kernel)
        for other in blockers:
            other.discard(kernel)
        _spoil_what_is_free(kernel, plan, left, arena, activation)
    activation.advance()
    return activation.outputs


def _accesses_left(plan: Plan) -> dict[str, set[int]]:
    """For each buffer, the kernels that have yet to touch it or a part of it."""
    whole = {b.name: b.part_of for b in plan.graph.buffers}
    left: dict[str, set[int]] = {}
    for index, kernel in enumerate(plan.graph.kernels):
        for name in (*kernel.reads, *kernel.writes):
            owner: str | None = name
            while owner is not None:
                left.setdefault(owner, set()).add(index)
                owner = whole[owner]
    return left


def _same_place(placed: Mapping[str, Placement], first: str, second: str) -> bool:
    return first in placed and second in placed and placed[first].offset == placed[second].offset


def _spoil_what_is_free(
    kernel: int, plan: Plan, left: dict[str, set[int]], arena: Arena, activation: Activation
) -> None:
    placed = {p.buffer: p for p in plan.memory.placements}
    own = {b.name for b in plan.graph.buffers if b.kind == "intermediate" and not b.planned and b.part_of is None}
    for name, kernels in left.items():
        if kernel not in kernels:
            continue
        kernels.discard(kernel)
        if kernels or name in plan.graph.outputs:
            continue
        if any(read == name and _same_place(placed, read, over) for read, over in plan.graph.kernels[kernel].inplace):
            continue  # those bytes are another buffer's now
        if name in placed and arena.bytes is not None:
            arena.bytes.narrow(0, placed[name].offset, placed[name].nbytes).fill_(POISON)
        elif name in own and name in activation.release:
            activation.release[name]()
