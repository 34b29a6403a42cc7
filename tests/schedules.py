"""Random schedules of real models, captured and replayed on a GPU: all give what program order gives, bit for bit.

`python -m tests.schedules --schedules 1000 --models googlenet bert_base moe_decode --out FILE`. A schedule puts every
kernel on a random stream in a random legal order, with buffers planned for just that schedule, every other one of them
with buffers written in place. Before a replay the arena is filled with NaNs, so that bytes read before they are written
show. Exit code 1 if any output differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench import models
from bench.about import environment
from opara_backend.execution import alternatives
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.candidates import Tried
from opara_backend.execution.cuda_graph import CapturedGraph
from opara_backend.execution.host import Plan
from opara_backend.execution.race import Memory, capture_plan
from opara_backend.execution.runtime import Runtime
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import plan_memory, verify_memory
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling import launch_order
from opara_backend.scheduling.policies import Allocation, draft
from opara_backend.scheduling.schedule import Schedule, verify

SCHEMA = 1
WIDTHS = (2, 3, 4, 6, 8, 16)
POISON = 255  # as bytes of any floating-point type: NaN


@dataclass
class Found:
    """Schedules replayed of one model; differing: seeds whose outputs were not those of program order."""

    model: str
    dtype: str
    kernels: int = 0
    schedules: int = 0
    written_in_place: int = 0
    most_streams: int = 0
    differing: tuple[int, ...] = ()


def random_schedule(graph: KernelGraph, profile: Profile, seed: int) -> Schedule:
    """Every kernel on a random stream, in a random legal order."""
    width = WIDTHS[seed % len(WIDTHS)]
    chosen = random.Random(seed)
    stream = tuple(chosen.randrange(width) for _ in graph.kernels)
    order = functools.partial(launch_order.random, seed=seed)
    schedule = draft(graph, profile, lambda *_: Allocation(stream), order, width)
    verify(graph, schedule)
    return replace(schedule, policy=f"random:{seed}")


@contextmanager
def replaying(found: Found, schedules: int, progress: Progress | None = None) -> Iterator[None]:
    """Replay so many schedules of every graph that is captured while the block runs."""
    module: Any = alternatives
    original = module.capture_best

    def capture_best(
        runtime: Runtime, graph: KernelGraph, arguments: StaticArguments, memory: Memory, *more: Any
    ) -> tuple[Plan, CapturedGraph, Tried]:
        plan, captured, tried = original(runtime, graph, arguments, memory, *more)
        expected = _outputs(captured)
        found.kernels += len(graph)
        task = progress.add_task(found.model, total=schedules) if progress else None
        for seed in range(schedules):
            _replay(found, seed, expected, (runtime, graph, arguments, memory), plan.profile)
            if progress and task is not None:
                progress.advance(task)
        return plan, captured, tried

    module.capture_best = capture_best
    try:
        yield
    finally:
        module.capture_best = original


def _replay(
    found: Found,
    seed: int,
    expected: Sequence[torch.Tensor],
    what: tuple[Runtime, KernelGraph, StaticArguments, Memory],
    profile: Profile,
) -> None:
    runtime, graph, arguments, memory = what
    schedule = random_schedule(graph, profile, seed)
    placed = plan_memory(graph, schedule, in_place=seed % 2 == 0)
    verify_memory(graph, schedule, placed)
    own = capture_plan(runtime.program, Plan(graph, profile, schedule, placed), arguments, memory)
    try:
        pairs = zip(_outputs(own), expected, strict=True)
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    finally:
        own.reset()
    found.schedules += 1
    found.written_in_place += seed % 2 == 0
    found.most_streams = max(found.most_streams, schedule.streams)
    if not same:
        found.differing = (*found.differing, seed)


def _outputs(captured: CapturedGraph) -> list[torch.Tensor]:
    """Copies of what one replay from a poisoned arena gives."""
    if captured.arena.bytes is not None:
        captured.arena.bytes.fill_(POISON)
    captured.replay()
    return [t.contiguous().clone() for t in captured.outputs or () if isinstance(t, torch.Tensor)]


def check(name: str, dtype: torch.dtype, schedules: int, progress: Progress | None = None) -> Found:
    """So many random schedules of the model called `name`."""
    entry = models.get(name)
    model = entry.build().cuda().to(dtype).eval()
    inputs = tuple(x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for x in entry.inputs(1))
    found = Found(name, str(dtype).removeprefix("torch."))
    torch._dynamo.reset()
    with torch.inference_mode(), replaying(found, schedules, progress):
        # What is compared with is the program in a row: the one schedule that nothing can go wrong with.
        options: dict[str, Any] = {"policy": "sequential", "launch_order": "program"}
        torch.compile(model, backend="opara", options=options)(*inputs)
    torch._dynamo.reset()
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.schedules", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--models", nargs="+", default=["googlenet", "bert_base", "moe_decode"])
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="commit to record, where git cannot tell")
    arguments = parser.parse_args(given)
    started, rows = time.monotonic(), []
    with Progress() as progress:
        for name in arguments.models:
            rows.append(check(name, getattr(torch, arguments.dtype), arguments.schedules, progress))
            print(rows[-1], flush=True)
    about = environment(arguments.commit, "python -m tests.schedules")
    seconds = round(time.monotonic() - started, 1)
    document = {"schema": SCHEMA, **about, "seconds": seconds, "rows": [asdict(row) for row in rows]}
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(row.differing or not row.schedules for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
