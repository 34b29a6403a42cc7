"""What launching costs is read off correctly: a GPU that does as the simulator says has the simulator's constants."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import launch_costs, shapes
from bench.about import command
from bench.launch_costs import STREAMS, Cost, in_a_row, measure, replayed, settled, shown
from bench.shapes import Drawing, Played, Shape, delays, middle, slope, step, tick
from bench.tables import console
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.costs import FREE, CostModel
from opara_backend.scheduling.simulator import simulate
from tests.gpu_profiles import GPU, tiny_recording
from tests.strategies import graph_with_edges

RAMP = 0.74e-6


class Simulated:
    """A GPU that does as the simulator with `costs` says; a kernel's launch is the part that holds nothing."""

    def __init__(self, costs: CostModel) -> None:
        self.costs, self.streams = costs, set[int]()

    def __call__(self, shape: Shape, **_: int) -> Played:
        self.streams.add(shape.schedule.streams)
        graph = graph_with_edges(len(shape.seconds), [])
        profile = Profile(tuple(KernelProfile(self.costs.ramp + s, 0.0, memory_bound=False) for s in shape.seconds))
        times = simulate(graph, profile, shape.schedule, GPU, self.costs)
        first = min(times.start)
        trace = tuple((a - first, b - first) for a, b in zip(times.start, times.end, strict=True))
        return Played((trace, trace), times.makespan)


MODEL = CostModel(ramp=RAMP)
OTHER = CostModel(
    ramp=1.1e-6,
    launch_interval=0.3e-6,
    branch_latency=0.5e-6,
    sync_latency=2.0e-6,
    settling=9e-6,
    step_memory=55e-6,
    stream_latency=0.8e-6,
)


@pytest.mark.parametrize("costs", [MODEL, OTHER], ids=["defaults", "another GPU"])
def test_the_constants_of_the_simulator_are_found_again(costs: CostModel) -> None:
    found = {cost.name: cost.seconds for cost in measure(Simulated(costs))}
    assert found.pop("next") == pytest.approx(costs.ramp)
    assert found.pop("handed over") == pytest.approx(costs.ramp)
    assert found.pop("further wait") == pytest.approx(0.0, abs=0.05e-6)
    assert found.pop("settling") == pytest.approx(costs.settling, rel=0.15)  # seen only where a kernel joins streams
    assert found.pop("step_memory") == pytest.approx(costs.step_memory, abs=6e-6)
    for name, seconds in found.items():
        assert seconds == pytest.approx(getattr(costs, name), rel=0.02), name


def test_where_nothing_costs_anything_nothing_is_found() -> None:
    found = {cost.name: cost.seconds for cost in measure(Simulated(FREE))}
    assert found.pop("step_memory") in (None, pytest.approx(0.0))
    assert all(seconds == pytest.approx(0.0, abs=1e-12) for seconds in found.values()), found


def test_no_more_streams_are_used_than_it_says() -> None:
    play = Simulated(MODEL)
    measure(play)
    assert max(play.streams) == STREAMS


def test_joins_long_after_the_start_are_not_late() -> None:
    """The last late one lies within the graph, so that what is found is not just where the graph ends."""
    shape, _ = shapes.joined(STREAMS, 1, launch_costs.ROUNDS)
    end = max(b for _, b in Simulated(MODEL)(shape).traces[0])
    assert max(seconds for _, seconds in settled(Simulated(MODEL), RAMP + 0.5e-6)) < 0.8 * end
    assert in_a_row(Simulated(MODEL))[0] == pytest.approx(RAMP)


def test_a_kernel_follows_its_stream_and_its_waits() -> None:
    drawing = Drawing()
    first, other, last = drawing.add(0), drawing.add(1), drawing.add(0, 1)
    shape = drawing.shape()
    assert (shape.awaited(first), shape.awaited(other), shape.awaited(last)) == ([], [], [other, first])
    played = Played((((0.0, 3.0), (0.0, 5.0), (6.0, 7.0)), ((0.0, 5.0), (0.0, 3.0), (7.0, 8.0))), 9.0)
    assert delays(shape, played, last) == [1.0, 2.0]


def test_the_middle_of_some_values() -> None:
    assert middle([1.0, 2.0, 4.0, 100.0]) == 3.0
    assert middle([7.0]) == 7.0


def test_the_line_with_the_least_squares() -> None:
    assert slope(((0.0, 1.0), (1.0, 3.0), (2.0, 5.0))) == pytest.approx(2.0)
    assert slope(((0.0, 0.0), (1.0, 1.0), (2.0, 1.0), (3.0, 2.0))) == pytest.approx(0.6)


def test_where_values_rise_above_a_level() -> None:
    assert step(((10.0, 1.0), (30.0, 3.0), (20.0, 1.0)), 2.0) == 25.0
    assert step(((10.0, 1.0), (20.0, 3.0), (30.0, 1.0), (40.0, 3.0), (50.0, 3.0)), 2.0) == 15.0
    assert step(((10.0, 1.0), (20.0, 1.0)), 2.0) is None
    assert step(((10.0, 3.0), (20.0, 3.0)), 2.0) is None


def test_the_tick_of_the_clock() -> None:
    assert tick(Played((((0.0, 96e-9), (160e-9, 192e-9)),), 0.0)) == pytest.approx(32e-9)


def test_what_of_a_recorded_graph_is_launching_is_predicted() -> None:
    """On a GPU that does as the simulator says the prediction is exact, whatever was measured."""
    recording = tiny_recording((9e-6, 9e-6))
    play = Simulated(MODEL)
    found = replayed(recording, play, RAMP)
    assert (found.graph, found.schedules) == (recording.name, 2)
    assert found.error == pytest.approx(0.0, abs=1e-3)
    assert found.spearman == 1.0


def test_the_table_stands_beside_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    costs = [Cost("next", "begins", 0.7e-6), Cost("sync_latency", "late", 1.3e-6), Cost("step_memory", "age", None)]
    console().print(shown(costs, replace(MODEL, sync_latency=1.1e-6)))
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["", "begins", "0.70", "", "", ""] in rows
    assert ["", "late", "1.30", "sync_latency", "1.10", ""] in rows
    assert ["", "age", "", "step_memory", "80.00", ""] in rows


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch_costs.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_without_triton_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "bench.spinning", None)
    assert launch_costs.main([]) == 2
    assert "needs triton" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--recorded"]], ids=str)
def test_what_it_finds_is_written(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "bench.spinning", types.SimpleNamespace(play=Simulated(MODEL)))  # type: ignore[arg-type]
    monkeypatch.setattr("bench.about.environment", lambda commit, program: {"commit": commit, "command": program})
    monkeypatch.setattr(launch_costs, "load_all", lambda: (tiny_recording((9e-6, 8e-6)),))
    out = tmp_path / "costs.json"
    assert launch_costs.main([*options, "--out", str(out), "--commit", "abc"]) == 0
    found = json.loads(out.read_text())
    assert (found["schema"], found["commit"], found["command"]) == (1, "abc", "python -m bench.launch_costs")
    assert {cost["name"] for cost in found["costs"]} >= {"launch_interval", "branch_latency", "sync_latency"}
    assert [row["graph"] for row in found["recorded"]] == (["tiny-float16"] if options else [])
    assert "sync_latency" in capsys.readouterr().out


def test_the_command_that_is_written_down_is_the_program_s() -> None:
    assert command(["--recorded", "--out", "x.json"], "python -m bench.launch_costs") == (
        "python -m bench.launch_costs --recorded"
    )
