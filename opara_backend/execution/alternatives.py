"""One graph lowered in several ways: each captured, timed against the others for one shape, the fastest kept.

Takes: a Runtime whose graph may have `alternatives`, the arguments of a call that it has just served. Gives: which
lowering to keep for that shape, its Plan and its captured graph.
Must not change: state outside the programs' intermediates; what a run of an alternative writes is put back.

An alternative takes part only if it does what the first lowering does, within rounding, with the arguments and
parameters that there are: weights that a rewrite scales may overflow in one model and not in another of the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opara_backend.execution import winners
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.candidates import Tried, capture_best
from opara_backend.execution.cuda_graph import CapturedGraph, give_back_unused
from opara_backend.execution.first_run import observe_metered, workspaces
from opara_backend.execution.host import Observed, Plan
from opara_backend.execution.measure import seconds_per_replay
from opara_backend.execution.race import Memory, capture_plan
from opara_backend.execution.state import state_kept
from opara_backend.execution.winners import Choice
from opara_backend.kernel_graph import KernelGraph
from opara_backend.report.record import Timed
from opara_backend.scheduling.schedule import Schedule
from opara_backend.scheduling.search import NOISE
from opara_backend.scheduling.workspaces import Workspaces

if TYPE_CHECKING:
    from opara_backend.execution.runtime import Runtime

log = logging.getLogger(__name__)

# Relative L2 distance from the first lowering that is rounding still, by the coarsest type that kernels work in;
# convolutions in float32 may use tf32.
TOLERANCE = {"float16": 2e-2, "bfloat16": 5e-2}
OTHERWISE = 2e-3

AT_ONCE = 1 << 20  # elements compared, which takes a hundred bytes for each


@dataclass(frozen=True)
class Kept:
    """What a shape runs by. tried: schedules of this lowering with their seconds per replay. lowerings: all that were
    timed against each other, the first one's first; nothing if there was no choice."""

    runtime: Runtime
    plan: Plan
    captured: CapturedGraph
    tried: Tried
    lowerings: tuple[Timed, ...] = ()


def capture_fastest(
    runtime: Runtime,
    graph: KernelGraph,
    arguments: StaticArguments,
    memory: Memory,
    shape: object,
    near: Callable[[Runtime], Schedule | None],
    *,
    alone: bool = False,
) -> Kept:
    """Capture the lowering of `runtime` that is fastest for `shape` of its `graph` (sizes bound), by its best schedule.

    near: the schedule that won with a lowering for another shape, if it did. alone: by the first lowering, without a
    look at others. Errors: those of capturing the first lowering; an alternative that fails is left out, and said.
    """

    def best_of(one: Runtime, bound: KernelGraph, needed: Workspaces, reserves: bool = memory.reserves) -> Kept:
        there = replace(memory, needed=needed, reserves=reserves)
        return Kept(one, *capture_best(one, bound, arguments, there, shape, near(one)))

    first = runtime, graph, memory.needed

    if alone or not runtime.alternatives:
        return best_of(*first)
    sources = tuple(other.generated.source for other in runtime.alternatives)
    path = winners.place(runtime.generated, graph, ("lowerings", shape, sources), runtime.options)
    choice = winners.find_choice(path)
    wanted = [o for o in runtime.alternatives if choice is None or o.generated.source == choice.source]
    with runtime.record.stage("first_run"):
        racing = [
            (other, bound, workspaces(other.generated, seen, memory.needed.product))
            for other, bound, seen in _agreeing(runtime, wanted, arguments)
        ]
    give_back_unused()  # while something is captured, nothing that is cached can be given back
    if choice is None or not racing:
        racing.insert(0, first)
    made: list[Kept] = []
    for one, bound, needed in racing:
        try:
            made.append(best_of(one, bound, needed, memory.reserves and not made))
        except Exception as error:
            if one is runtime:
                raise
            _left_out(one, f"{type(error).__name__}: {error}")
    if not made:
        made.append(best_of(*first))
    if choice is not None:
        return replace(made[0], lowerings=choice.lowerings)
    if len(made) == 1:
        return made[0]
    with runtime.record.stage("search"):
        kept = _fastest(made, runtime.options.search_seconds)
    runtime.record.remembered.discard(shape)  # at most schedules were, not which lowering to keep
    winners.keep(path, Choice(kept.runtime.generated.source, kept.lowerings))
    return kept


def capture_again(
    runtime: Runtime, decided: tuple[Runtime, Plan], arguments: StaticArguments, memory: Memory
) -> Kept | None:
    """What was decided for a shape, captured with parameters that lie elsewhere; None if it does not do with them what
    `runtime` does, which runs by its own lowering then."""
    lowering, plan = decided
    if lowering is not runtime and not list(_agreeing(runtime, [lowering], arguments)):
        return None
    return Kept(lowering, plan, capture_plan(lowering.program, plan, arguments, memory), [])


def _fastest(made: Sequence[Kept], budget: float) -> Kept:
    """The fastest of `made`, or an earlier one that is as fast; the others are given up."""
    seconds = seconds_per_replay([one.captured for one in made], budget)
    lowerings = tuple(Timed(one.runtime.generated.rewrites, taken) for one, taken in zip(made, seconds, strict=True))
    best = next(one for one, taken in zip(made, seconds, strict=True) if taken <= NOISE * min(seconds))
    for one in made:
        if one is not best:
            one.captured.reset()
    give_back_unused()
    return replace(best, lowerings=lowerings)


def _agreeing(
    first: Runtime, others: Iterable[Runtime], arguments: StaticArguments
) -> Iterator[tuple[Runtime, KernelGraph, Observed]]:
    """Those of `others` that do what `first` does, with their graphs, sizes bound, and what a run of them showed."""
    expected: list[Tensor] = []
    rounding = max(TOLERANCE.get(kernel.dtype, OTHERWISE) for kernel in first.graph.kernels)
    for other in others:
        try:
            expected = expected or _run(first, arguments)[0]
            found, seen = _run(other, arguments)
            same = agree(expected, found, rounding)
        except Exception as error:
            _left_out(other, f"{type(error).__name__}: {error}")
            continue
        if same:
            yield other, other.graph.bind(seen.nbytes), seen
        else:
            _left_out(other, "its results differ from those of the graph as it is by more than rounding")


def _left_out(other: Runtime, why: str) -> None:
    log.warning("not tried with %s: %s", ", ".join(other.generated.rewrites), why)


def _run(runtime: Runtime, arguments: StaticArguments) -> tuple[list[Tensor], Observed]:
    """What one run leaves behind, in memory of its own: outputs, and arguments it writes; and what it showed."""
    program, graph = runtime.program, runtime.graph
    with arguments.copies_kept(), state_kept(arguments.written_static(program, graph), graph):
        seen = observe_metered(program, graph, arguments.values, runtime.lives)
        left = [*seen.outputs, *arguments.written(program, graph)]
        return [value.clone() for value in left if isinstance(value, Tensor)], replace(seen, outputs=())


def agree(expected: Sequence[Tensor], found: Sequence[Tensor], rounding: float) -> bool:
    """True if tensors are the same within `rounding`: numbers by their relative L2 distance; all that is not a finite
    number, and integers, exactly."""
    pairs = zip(expected, found, strict=False)
    return len(expected) == len(found) and all(_agree(one, other, rounding) for one, other in pairs)


def _agree(expected: Tensor, found: Tensor, rounding: float) -> bool:
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, found)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    distance, size = 0.0, 0.0
    for some, others in zip(*(tensor.reshape(-1).split(AT_ONCE) for tensor in (expected, found)), strict=True):
        one, other = some.to(wide), others.to(wide)
        finite = one.isfinite()
        if not torch.allclose(one[~finite], other[~finite], equal_nan=True):
            return False
        distance += float((one - other)[finite].abs().square().sum())
        size += float(one[finite].abs().square().sum())
    return distance <= rounding**2 * size  # NaN is no agreement
