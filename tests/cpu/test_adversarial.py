"""Real lowered kernels under every kind of race their schedule allows: always the result of program order.

On the CPU the interleavings that streams would produce are played out one kernel at a time (`tests.adversary`), with
memory spoiled as soon as the plan calls it free. A schedule that lacks a wait must be caught by the same means.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import models
from opara_backend.execution import runtime
from opara_backend.execution.host import Plan, run_unplanned
from opara_backend.execution.in_order import InOrder, Spare
from opara_backend.execution.program import Program
from opara_backend.memory import plan_memory, verify_memory
from opara_backend.scheduling.policies import build, policy_names
from opara_backend.scheduling.schedule import ScheduleError, verify
from tests import adversary


class Branches(nn.Module):
    """Branches of different depth over one input, a concatenation whose slices are written apart, a reused result."""

    def __init__(self, width: int = 4, size: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(size, size)
        self.branches = nn.ModuleList(
            nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(size, size), nn.Tanh())))
            for depth in range(1, width + 1)
        )
        self.norm = nn.LayerNorm(width * size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        parts = [branch(x) for branch in self.branches]
        joined = self.norm(torch.cat(parts, 1))
        values, _ = torch.topk(parts[0] + parts[-1], 3)
        return joined.sum(1), values


class Case:
    """A lowered program with the arguments of one call and the outputs program order gives."""

    def __init__(self, program: Program, plan: Plan, args: Sequence[Any]) -> None:
        self.program, self.plan, self.args = program, plan, args
        self.expected = run_unplanned(program, args)

    def planned(self, policy: str, order: str, streams: int = 8) -> Plan:
        schedule = build(self.plan.graph, self.plan.profile, policy=policy, launch_order=order, streams=streams)
        return self.for_schedule(replace(self.plan, schedule=schedule))

    def for_schedule(self, plan: Plan) -> Plan:
        outputs = [n for n in plan.graph.outputs if n is not None]
        memory = plan_memory(plan.graph, plan.schedule, exclude=outputs)
        verify_memory(plan.graph, plan.schedule, memory)
        return replace(plan, memory=memory)

    def agrees(self, plan: Plan, choose: adversary.Choose) -> bool:
        found = adversary.run(self.program, plan, self.args, choose)
        return all(torch.equal(a, b) for a, b in zip(found, self.expected, strict=True))


def lower(module: nn.Module, inputs: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch) -> Case:
    made: list[tuple[Program, Plan]] = []
    seen: list[Sequence[Any]] = []

    class Spy(InOrder):
        def __init__(self, program: Program, plan: Plan, spare: Spare) -> None:
            super().__init__(program, plan, spare)
            made.append((program, plan))

        def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
            seen.append(list(args))
            return super().__call__(args)

    monkeypatch.setattr(runtime, "InOrder", Spy)
    with torch.inference_mode():
        call = torch.compile(module.eval(), backend="opara", fullgraph=True)
        call(*inputs)
        call(*inputs)
    ((program, plan),) = made
    return Case(program, plan, seen[0])


@pytest.fixture(params=["branches", "squeezenet", "deepfm"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.inference_mode():
        if request.param == "branches":
            yield lower(Branches(), [torch.randn(5, 16)], monkeypatch)
        else:
            entry = models.get(request.param).reduced()
            yield lower(entry.build(), entry.inputs(1), monkeypatch)


def test_every_interleaving_gives_the_result_of_program_order(case: Case) -> None:
    generator = random.Random(0)
    for policy in policy_names():
        for order in ("opara", "critical_path", "random"):
            plan = case.planned(policy, order)
            for choose in (generator.choice, min, max, lambda ready: ready[-1]):
                assert case.agrees(plan, choose), (policy, order)


def test_a_missing_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.inference_mode():
        case = lower(Branches(), [torch.randn(5, 16)], monkeypatch)
        plan = case.planned("opara", "opara")
        schedule = plan.schedule
        assert schedule.wait_count > 0
        for kernel, waits in enumerate(schedule.waits):
            for awaited in waits:
                fewer = list(schedule.waits)
                fewer[kernel] = tuple(w for w in waits if w != awaited)
                broken = replace(schedule, waits=tuple(fewer))
                with pytest.raises(ScheduleError, match=plan.graph.kernels[kernel].name):
                    verify(plan.graph, broken)

                def late(ready: Sequence[int], awaited: int = awaited) -> int:
                    """The awaited kernel as late as the broken schedule allows, everything else as it comes."""
                    others = [k for k in ready if k != awaited]
                    return others[0] if others else awaited

                assert not case.agrees(replace(plan, schedule=broken), late), (kernel, awaited)


def test_buffers_sharing_bytes_wrongly_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.inference_mode():
        case = lower(Branches(), [torch.randn(5, 16)], monkeypatch)
        plan = case.planned("opara", "opara")
        first = plan.memory.placements[0]
        moved = tuple(replace(p, offset=first.offset) for p in plan.memory.placements)
        crowded = replace(plan, memory=replace(plan.memory, placements=moved))
        assert case.agrees(plan, min)
        assert not case.agrees(crowded, min)
