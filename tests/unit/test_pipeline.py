"""From lines of a program to memory and back: whatever a schedule allows computes what program order computes.

Random programs with aliases, parts, writes in place, written inputs, random numbers and kernels that allocate are
lowered, scheduled and given memory; then they run on real bytes, in any order happens-before permits, in one arena.
No claim about reads, writes, edges, waits or offsets is trusted here: if one is wrong, bytes come out wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import MemoryPlan, plan_memory, verify_memory
from opara_backend.scheduling.schedule import Schedule, verify
from tests import reference
from tests.programs import NBYTES, Allocate, Run, Source, fresh
from tests.strategies import schedules

INPUTS = ("arg0", "arg1")
ACTIONS = ("mix", "cpp", "make", "in place", "view", "input", "concat", "draw", "alias")


@dataclass
class Written:
    """A program, and which of its names hold values by the end."""

    source: Source = field(default_factory=lambda: Source(inputs=INPUTS))
    names: list[str] = field(default_factory=lambda: list(INPUTS))
    counter: int = 0

    def new(self) -> str:
        self.counter += 1
        return f"buf{self.counter}"


@st.composite
def programs(draw: st.DrawFn) -> tuple[Source, tuple[str, ...]]:
    """A source, and the names it returns."""
    written = Written()
    source, names = written.source, written.names
    for salt in range(draw(st.integers(1, 10))):
        reads = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
        operands = f"({''.join(f'{name}, ' for name in reads)})"
        action = draw(st.sampled_from(ACTIONS))
        if action == "mix":
            names.append(name := written.new())
            source.alloc(name)
            source.call(f"mix({name}, {operands}, {salt})", " ".join(reads), name)
        elif action == "cpp":  # its pointers may all be read, as far as anybody can tell
            names.append(name := written.new())
            source.alloc(name)
            source.call(f"mix({name}, {operands}, {salt})", " ".join([*reads, name]), name, kind="cpp")
        elif action == "alias":
            of = draw(st.sampled_from(names))
            names.append(name := written.new())
            source.call(f"{name} = same({of})", of, aliases=of)
        elif action == "make":
            names.append(name := written.new())
            source.call(f"{name} = make({operands}, {salt})", " ".join(reads))
        elif action == "in place":
            target = draw(st.sampled_from(names))
            source.call(f"mix({target}, ({target}, *{operands}), {salt})", " ".join([*reads, target]), target)
        elif action == "input":
            target = draw(st.sampled_from(INPUTS))
            source.call(f"mix({target}, {operands}, {salt})", " ".join(reads), target)
        elif action == "view":
            of = draw(st.sampled_from(names))
            names.append(name := written.new())
            source.view(f"{name} = {of}{draw(st.sampled_from(['', '[:2]', '[1:]']))}")
        elif action == "draw":
            names.append(name := written.new())
            source.alloc(name)
            source.call(f"draw({name})", "", name, random=True)
        else:
            whole, left, right = written.new(), written.new(), written.new()
            source.alloc(whole)
            source.part(f"{left} = {whole}[:3]", whole)
            source.part(f"{right} = {whole}[3:]", whole)
            source.call(f"mix({left}, {operands}, {salt})", " ".join(reads), left)
            source.call(f"mix({right}, {operands}, {salt + 100})", " ".join(reads), right)
            names += [whole, left, right]
    outputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    return source, tuple(outputs)


def started(source: Source, outputs: tuple[str, ...], alloc: Allocate) -> tuple[Run, list[memoryview]]:
    args = [memoryview(bytearray(range(start, start + NBYTES))) for start in (10, 90)]
    return source.run(*outputs, args=args, alloc=alloc), args


def results(run: Run, args: list[memoryview]) -> tuple[bytes, ...]:
    """What the caller sees: outputs and inputs."""
    return (*map(bytes, run.finish()), *map(bytes, args))


def expected(source: Source, outputs: tuple[str, ...]) -> tuple[bytes, ...]:
    return results(*started(source, outputs, fresh))


def in_arena(plan: MemoryPlan) -> Allocate:
    arena = memoryview(bytearray(b"\xee" * plan.arena_bytes))
    offsets = {p.buffer: p.offset for p in plan.placements}

    def alloc(name: str, nbytes: int) -> memoryview:
        return arena[offsets[name] : offsets[name] + nbytes] if name in offsets else fresh(name, nbytes)

    return alloc


def planned(data: st.DataObject, source: Source, outputs: tuple[str, ...]) -> tuple[KernelGraph, Schedule, MemoryPlan]:
    graph = source.graph(*outputs)
    schedule = data.draw(schedules(graph))
    plan = plan_memory(graph, schedule)
    verify(graph, schedule)
    verify_memory(graph, schedule, plan)
    return graph, schedule, plan


@given(programs(), st.data())
def test_any_order_that_happens_before_permits_gives_the_same_bytes(
    program: tuple[Source, tuple[str, ...]], data: st.DataObject
) -> None:
    source, outputs = program
    graph, schedule, plan = planned(data, source, outputs)
    before = reference.happens_before(schedule)
    run, args = started(source, outputs, in_arena(plan))
    run.advance()
    dice = random.Random(data.draw(st.integers(0, 1000)))
    left = set(range(len(graph)))
    while left:
        kernel = dice.choice(sorted(k for k in left if not any(before[other][k] for other in left)))
        run.tasks[kernel]()
        left.remove(kernel)
    run.done = len(graph)
    assert results(run, args) == expected(source, outputs)


@given(programs(), st.data())
def test_launch_order_with_releases_gives_the_same_bytes(
    program: tuple[Source, tuple[str, ...]], data: st.DataObject
) -> None:
    source, outputs = program
    graph, schedule, plan = planned(data, source, outputs)
    run, args = started(source, outputs, in_arena(plan))
    run.advance()
    for kernel, finished in zip(schedule.order, plan.releases, strict=True):
        for name in finished:
            run.release[name]()
        run.tasks[kernel]()
    run.done = len(graph)
    assert results(run, args) == expected(source, outputs)
