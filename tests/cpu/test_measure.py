"""Schedules are compared by what they take on the GPU, however slow the host is. Host and GPU are made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opara_backend import upstream
from opara_backend.execution import measure
from opara_backend.execution.measure import seconds_per_replay


@dataclass
class Machine:
    """Two clocks in seconds: the host's, and when the GPU will have done all that is queued."""

    now: float = 0.0
    free: float = 0.0
    longest_wait: float = 0.0

    def queue(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def occupy(self, seconds: float) -> None:
        self.longest_wait = max(self.longest_wait, seconds)
        self.queue(seconds)


@dataclass
class Graph:
    """Takes `gpu` seconds on the GPU and `host` to be launched, once in `hiccups` launches ten times as much."""

    machine: Machine
    gpu: float
    host: float
    hiccups: int = 1_000_000
    device: str = "cuda:0"
    launches: int = 0

    def replay(self) -> None:
        self.launches += 1
        self.machine.now += self.host * (10 if self.launches % self.hiccups == 0 else 1)
        self.machine.queue(self.gpu)


@dataclass
class Event:
    machine: Machine
    at: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def record(self) -> None:
        self.machine.queue(0.0)
        self.at = self.machine.free

    def synchronize(self) -> None:
        self.machine.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(made, options=options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made)
    monkeypatch.setattr(upstream, "occupy", made.occupy)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


@pytest.mark.parametrize("host", [1e-6, 20e-6, 200e-6])
def test_what_the_host_takes_does_not_count(machine: Machine, host: float) -> None:
    taken = [18e-6, 17e-6, 30e-6]
    graphs: list[Any] = [Graph(machine, gpu, host) for gpu in taken]
    assert seconds_per_replay(graphs, 10.0) == pytest.approx(taken, rel=1e-3)


def test_nor_what_it_takes_now_and_then(machine: Machine) -> None:
    taken = [18e-6, 17e-6]
    graphs: list[Any] = [Graph(machine, gpu, 16e-6, hiccups=25) for gpu in taken]
    assert seconds_per_replay(graphs, 10.0) == pytest.approx(taken, rel=1e-2)
    assert min(graph.launches for graph in graphs) > 2 * 25


def test_the_gpu_never_waits_long(machine: Machine) -> None:
    """A host that needs seconds to launch a graph is not waited for."""
    graphs: list[Any] = [Graph(machine, 1e-5, 1.0)]
    seconds_per_replay(graphs, 10.0)
    assert 0.0 < machine.longest_wait <= measure.LONGEST_WAIT


def test_it_ends_when_the_budget_is_spent(machine: Machine) -> None:
    graphs: list[Any] = [Graph(machine, 1e-3, 1e-5), Graph(machine, 1e-3, 1e-5)]
    seconds_per_replay(graphs, 0.0)
    assert all(graph.launches <= 2 + 1 + measure.ENOUGH * measure.SHORTEST_BURST for graph in graphs)
