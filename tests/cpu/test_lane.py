"""What lanes do beside capturing, which needs a GPU: graphs whose parameters are gone are given up in all of them."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from opara_backend.execution import cuda_graph, lane
from opara_backend.execution.candidates import Memory
from opara_backend.execution.lane import CudaLane, give_up_expired
from opara_backend.execution.program import Program
from opara_backend.execution.runtime import Runtime
from opara_backend.kernel_graph import KernelGraph
from opara_backend.options import Options
from opara_backend.report.record import collect
from tests.strategies import graph_with_edges


@dataclass(eq=False)
class Graph:
    """Stands in for a captured graph. gone: whether its parameters are."""

    gone: bool
    resets: int = 0

    def accepts(self, args: list[object]) -> bool:
        return not self.gone

    def expired(self) -> bool:
        return self.gone

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture(autouse=True)
def no_other_lanes() -> None:
    gc.collect()
    assert not list(lane._LANES)


def a_lane() -> CudaLane:
    graph = replace(graph_with_edges(2, [(0, 1)]), device="cuda:0")
    return CudaLane(Runtime(Program(lambda *_: iter(()), graph.to_json()), graph, Options()))


def test_graphs_of_dropped_models_are_given_up_in_every_lane() -> None:
    lanes = [a_lane() for _ in range(3)]
    graphs = [Graph(gone) for gone in (False, True, True)]
    for each, graph in zip(lanes, graphs, strict=True):
        each._captures.add((), graph)
    give_up_expired()
    assert [graph.resets for graph in graphs] == [0, 1, 1]
    assert [len(each._captures) for each in lanes] == [1, 0, 0]


def test_a_lane_at_work_is_left_alone_and_does_not_hold_up() -> None:
    busy, graph = a_lane(), Graph(True)
    busy._captures.add((), graph)
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with busy._lock:
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    give_up_expired()
    assert graph.resets == 0
    done.set()
    thread.join()
    give_up_expired()
    assert graph.resets == 1


def test_a_lane_is_not_kept_alive_by_being_known() -> None:
    with torch.no_grad(), collect():
        here = a_lane()
    assert len(lane._LANES) == 1
    del here
    gc.collect()
    assert not len(lane._LANES)


def test_a_pool_ends_with_its_last_graph_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that move leave a pool behind each time, on which nothing can be captured any more."""
    handles, happened = iter(range(100)), list[object]()
    here, graph = a_lane(), Graph(False)

    def capture(runtime: Runtime, bound: KernelGraph, arguments: object, memory: Memory, *more: object) -> None:
        happened.append(memory.pool)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(cuda_graph, "give_back_unused", lambda: happened.append(f"given back, {graph.resets} gone"))
    monkeypatch.setattr(lane, "capture_best", capture)
    monkeypatch.setattr(lane, "StaticArguments", lambda *_: SimpleNamespace(written_static=lambda *_: []))
    for step in ("no graph yet", "one", "none any more"):
        if step == "one":
            here._captures.add((), graph)
        graph.gone = step == "none any more"
        with pytest.raises(InterruptedError):
            here._capture((), here.runtime.graph, [])
    assert happened == ["given back, 0 gone", 0, "given back, 0 gone", 0, "given back, 1 gone", 1]
