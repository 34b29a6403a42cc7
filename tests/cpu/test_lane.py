"""What lanes do beside capturing, which needs a GPU: who may capture, what is given up and when, what is lent."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from bench.counting import calls, instructions
from opara_backend import upstream
from opara_backend.execution import alternatives, cuda_graph, host, lane
from opara_backend.execution.alternatives import Kept, capture_fastest
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.lane import CudaLane, give_up_expired
from opara_backend.execution.outputs import OutputSpec
from opara_backend.execution.program import Program
from opara_backend.execution.race import Memory
from opara_backend.execution.runtime import Runtime
from opara_backend.fallback import OparaFallbackError
from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.options import Options
from opara_backend.report.record import Timed, collect
from opara_backend.scheduling.workspaces import NONE
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


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch with CUDA would ask a driver that may not be there."""
    monkeypatch.setattr(upstream, "current_stream_key", lambda index: None)


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
    monkeypatch.setattr(alternatives, "capture_best", capture)
    monkeypatch.setattr(lane, "StaticArguments", lambda *_: SimpleNamespace(written_static=lambda *_: []))
    for step in ("no graph yet", "one", "none any more"):
        if step == "one":
            here._captures.add((), graph)
        graph.gone = step == "none any more"
        with pytest.raises(InterruptedError):
            here._capture((), here.runtime.graph, [], NONE)
    assert happened == ["given back, 0 gone", 0, "given back, 0 gone", 0, "given back, 1 gone", 1]


@pytest.mark.parametrize("does_the_same", [True, False])
def test_a_shape_whose_parameters_move_keeps_its_lowering_if_it_does_the_same(
    monkeypatch: pytest.MonkeyPatch, does_the_same: bool
) -> None:
    """And what won with a lowering is where the next shape begins with the same one."""
    here, other = a_lane(), a_lane().runtime
    plans = [SimpleNamespace(graph=other.graph, schedule=name) for name in ("first", "second")]
    captured = SimpleNamespace(pool=(0, 1), outputs=())
    searched: list[tuple[object, object]] = []
    programs: list[Program] = []
    alone: list[bool] = []

    def best(runtime: Runtime, graph: object, arguments: object, memory: object, shape: object, near: object) -> Any:
        alone.append(True)
        return SimpleNamespace(graph=graph, schedule="of the first"), captured, []

    def fastest(*given: Any, **more: Any) -> Kept:
        if more["alone"]:
            return capture_fastest(*given, **more)
        runtime, near = given[0], given[-1]
        searched.append((near(other), near(runtime)))
        runtime.record.remembered.add(given[4])  # found on disk
        return Kept(other, plans[len(searched) - 1], captured, [], (Timed((), 2.0), Timed(("fuse_gemv",), 1.0)))

    def again(program: Program, plan: object, *more: object) -> object:
        programs.append(program)
        assert plan is plans[0]
        return captured

    arguments = SimpleNamespace(values=[], written_static=lambda *_: [], let_go=lambda: None, expired=lambda: False)
    arguments.accept = lambda args: False
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cuda_graph, "give_back_unused", lambda: None)
    monkeypatch.setattr(lane, "capture_fastest", fastest)
    monkeypatch.setattr(lane, "OutputSpec", lambda *_: None)
    monkeypatch.setattr(lane, "StaticArguments", lambda *_: arguments)
    monkeypatch.setattr(alternatives, "capture_best", best)
    monkeypatch.setattr(alternatives, "capture_plan", again)
    agreeing = [(other, other.graph)] if does_the_same else []
    monkeypatch.setattr(alternatives, "_agreeing", lambda first, others, arguments: agreeing)
    kept: list[object] = []
    monkeypatch.setattr(here.runtime.record, "planned", lambda key, plan, **more: kept.append(plan.schedule))
    for key in ((1,), (1,), (2,)):
        here._capture(key, here.runtime.graph, [], NONE)
    assert searched == [(None, None), ("first", None)]
    assert programs == ([other.program] if does_the_same else [])
    assert kept == ["first", "first" if does_the_same else "of the first", "second"]
    assert [timed.seconds for timed in here.runtime.record.lowerings[1,]] == [2.0, 1.0]
    assert ((1,) in here.runtime.record.remembered) == does_the_same, "else it has been searched for since"
    assert (2,) in here.runtime.record.remembered
    here.runtime.record.forget((2,))
    assert (2,) not in here.runtime.record.remembered
    for one in here._captures:
        one.reset = lambda: None


@pytest.fixture
def on_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go through a lane as on a GPU, of which they ask nothing."""
    monkeypatch.setattr(upstream, "current_device", lambda: 0)
    monkeypatch.setattr(upstream, "is_capturing", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: SimpleNamespace(wait_stream=lambda other: None)
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cuda_graph, "give_back_unused", lambda: None)
    monkeypatch.setattr(lane, "leaves_nothing", lambda graph: False)  # plain runs in memory as it comes
    monkeypatch.setattr(lane, "observe_metered", lambda program, graph, *more: host.observe(program, *more))
    monkeypatch.setattr(lane, "workspaces", lambda program, seen, product: NONE)
    monkeypatch.setattr(lane, "cublas_workspace_bytes", lambda device: 0)


def a_running_lane(
    graph: KernelGraph | None = None,
    inputs: tuple[str, ...] = (),
    static: tuple[int, ...] = (),
    dynamic: tuple[int, ...] = (),
    **options: object,
) -> CudaLane:
    """One whose program has two kernels that do nothing."""
    graph = graph or replace(graph_with_edges(2, [(0, 1)]), device="cuda:0")

    def run(args: list[object], alloc: object, task: Callable[..., None], release: object) -> Iterator[None]:
        task(lambda: None)
        task(lambda: None)
        yield
        return (torch.ones(1),)

    program = Program(run, graph.to_json(), inputs, static, dynamic)  # type: ignore[arg-type]
    return CudaLane(Runtime(program, graph, Options(**options)))  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_no_gpu")
def test_only_a_run_that_a_capture_follows_is_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that may never come back is served as it comes, and copies no outputs."""
    here, plain, apart = (
        a_running_lane(),
        Mock(wraps=host.observe),
        Mock(side_effect=lambda p, g, *more: plain(p, *more)),
    )
    monkeypatch.setattr(host, "observe", plain)
    monkeypatch.setattr(lane, "observe_apart", apart)
    monkeypatch.setattr(lane, "leaves_nothing", lambda graph: True)
    monkeypatch.setattr(here, "_capture", lambda *_: None)
    found = [(here(key, []), apart.call_count)[1] for key in ((7,), (7,), ())]
    assert found == [0, 1, 2]
    assert plain.call_count == 3


def served(parameters: int, **options: object) -> tuple[Runtime, list[torch.Tensor]]:
    """A runtime whose lane has captured a graph of so many parameters and an input among them, and arguments."""
    names = (*(f"p{number}" for number in range(parameters)), "x")
    position = {name: place for place, name in enumerate(("p0", "x", *names[1:-1]))}
    plain = graph_with_edges(2, [(0, 1)])
    output = next(buffer.name for buffer in plain.buffers if buffer.kind == "intermediate")
    inputs = tuple(Buffer(name, "input", "16", "", "cpu") for name in position)
    graph = replace(plain, device="cuda:0", buffers=(*plain.buffers, *inputs), outputs=(output,))
    static = tuple(place for name, place in position.items() if name != "x")
    program = Program(lambda *_: iter(()), graph.to_json(), inputs=tuple(position), static_inputs=static)
    runtime = Runtime(program, graph, Options(**options))  # type: ignore[arg-type]
    here = runtime._cuda = CudaLane(runtime)
    args = [nn.Parameter(torch.zeros(4)) if name != "x" else torch.zeros(4) for name in position]
    arguments = StaticArguments(program, graph, args)
    replayed = SimpleNamespace(reset=lambda: None, replay=lambda stream: None)
    outputs = OutputSpec(program, graph, (torch.zeros(4),), arguments.values)
    here._captures.add((), lane._Captured(replayed, arguments, outputs, here._loans))  # type: ignore[arg-type]
    return runtime, args


@pytest.mark.usefixtures("on_no_gpu")
@pytest.mark.parametrize("copied", [True, False], ids=["outputs copied", "outputs lent"])
def test_a_warm_call_executes_as_many_instructions_for_ten_parameters_as_for_hundreds(
    copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lender(monkeypatch)
    found = []
    for parameters in (10, 300):
        runtime, args = served(parameters, copy_outputs=copied)
        with torch.no_grad():
            for _ in range(3):
                runtime(list(args))
            found.append([count(partial(runtime, list(args))) for count in (calls, instructions)])
        assert runtime.record.replays == 5, "each call was one replay"
        runtime._cuda.release()
    assert found[0] == found[1]


def test_every_static_address_is_looked_at() -> None:
    runtime, args = served(10)
    (captured,) = runtime._cuda._captures
    assert captured.accepts(args)
    for place, value in enumerate(args):
        elsewhere = [*args[:place], value.detach().clone(), *args[place + 1 :]]
        assert captured.accepts(elsewhere) == (place == 1), "the input alone may lie anywhere"
    held = args[7].data
    args[7].data = torch.ones(4)
    assert not captured.accepts(args), "the same parameter, with other memory"
    args[7].data = held
    assert captured.accepts(args)


@pytest.mark.usefixtures("on_no_gpu")
@pytest.mark.parametrize("why", ["host kernel", "cuda_graph=False", "a capture that failed"])
def test_what_is_never_captured_is_not_by_a_thread_that_waited_for_its_turn(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = replace(graph_with_edges(2, [(0, 1)]), device="cuda:0")
    if why == "host kernel":
        graph = replace(graph, kernels=(replace(graph.kernels[0], host=True), *graph.kernels[1:]))
    here = a_running_lane(graph, cuda_graph=why != "cuda_graph=False")
    attempts: list[bool] = []

    def capture(*_: object) -> None:
        attempts.append(here._never)
        raise RuntimeError("injected")

    monkeypatch.setattr(here, "_capture", capture)
    waiting = threading.Semaphore(0)
    seen = here._seen_before
    monkeypatch.setattr(here, "_seen_before", lambda key: (seen(key), waiting.release())[0])
    threads = [threading.Thread(target=here, args=((), [])) for _ in range(3)]
    with cuda_graph.EXCLUSIVE:  # as while another model is compiled
        for thread in threads:
            thread.start()
        for _ in threads:
            waiting.acquire()
    for thread in threads:
        thread.join()
    assert attempts == ([False] if why == "a capture that failed" else [])


@pytest.mark.usefixtures("on_no_gpu")
def test_every_thread_of_a_dynamic_shape_counts_as_a_sighting(monkeypatch: pytest.MonkeyPatch) -> None:
    here, captured = a_running_lane(), list[tuple[object, ...]]()
    monkeypatch.setattr(here, "_capture", lambda key, *_: captured.append(key))
    for key in ((1,), (2,), (2,), (3,)):
        here(key, [])
    assert captured == [(2,)]


@pytest.mark.usefixtures("on_no_gpu")
def test_with_errors_for_fallbacks_no_later_call_passes_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    here, serving = a_running_lane(fallback="error"), Graph(False)
    monkeypatch.setattr(here, "_capture", Mock(side_effect=RuntimeError("injected")))
    for _ in range(3):
        with pytest.raises(OparaFallbackError, match="capture_failed"):
            here((), [])
    assert here._capture.call_count == 1, "it is not tried again"
    monkeypatch.setattr(Graph, "__call__", lambda *_: ("served",), raising=False)
    here._captures.add((7,), serving)
    assert here((7,), []) == ("served",), "what was captured before still is"


class Lender:
    """Loans without a GPU, and what of them has ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: set[int] = set()
        monkeypatch.setattr(upstream, "forbid_access", lambda storage, message: self.ended.add(storage.cdata))
        monkeypatch.setattr(upstream, "storage_over", lambda address, device, nbytes: torch.UntypedStorage(nbytes))

    def taken_back(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.ended


def a_capture(here: CudaLane, gone: bool) -> lane._Captured:
    arguments = SimpleNamespace(
        accept=lambda args: not gone, expired=lambda: gone, load=lambda args: None, store=lambda args, ended: None
    )
    graph = SimpleNamespace(reset=lambda: None, replay=lambda stream: None)
    outputs = OutputSpec.__new__(OutputSpec)
    outputs._sources, outputs._as_copied = [torch.ones(3)], True
    return lane._Captured(graph, arguments, outputs, here._loans)  # type: ignore[arg-type]


def test_a_graph_that_is_given_up_ends_its_own_loans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lender, here = Lender(monkeypatch), a_running_lane(copy_outputs=False)
    for gone in (True, False):
        here._captures.add((), a_capture(here, gone))
    gone, serving = here._captures
    assert here._loans is not None
    (old,) = gone.outputs.collect([], here._loans)
    (lent,) = serving.outputs.collect([], here._loans)
    give_up_expired()  # as at some other model's first call
    assert (lender.taken_back(old), lender.taken_back(lent)) == (True, False)
    serving([], None)
    assert lender.taken_back(lent)


def stored(*size: int, stride: tuple[int, ...] | None = None, **how: Any) -> torch.Tensor:
    return torch.empty_strided(size, stride, **how).zero_() if stride else torch.zeros(size, **how)


MOVED = {
    "transposed": (lambda: stored(4, 6, stride=(1, 4)), r"torch.float32 of size \(4, 6\) and strides \(1, 4\) on cpu"),
    "another type": (lambda: stored(4, 6, dtype=torch.half), r"torch.float16 of size \(4, 6\)"),
    "another size": (lambda: stored(4, 5), r"size \(4, 5\) and strides \(5, 1\)"),
    "elsewhere": (lambda: stored(4, 6, device="meta"), "on meta"),
}


@pytest.mark.usefixtures("on_no_gpu")
@pytest.mark.parametrize("capturing", [False, True], ids=["", "while somebody captures"])
@pytest.mark.parametrize("how", MOVED)
def test_parameters_that_kernels_would_misread_are_refused(
    monkeypatch: pytest.MonkeyPatch, how: str, capturing: bool
) -> None:
    """Dynamo's guards do that, unless the user leaves them out."""
    here = a_running_lane(inputs=("x", "weight", "bias"), static=(1, 2), cuda_graph=False)
    x, weight, bias = stored(3), stored(4, 6), stored(6)
    make, found = MOVED[how]
    here((), [x, weight, bias])
    here((), [stored(3), stored(4, 6), bias])  # elsewhere, and the same
    monkeypatch.setattr(upstream, "is_capturing", lambda: capturing)
    message = (
        rf"input 1 \(weight\).*: found .*{found}.*; accepted is torch.float32 of size \(4, 6\) and strides \(6, 1\) "
    )
    for _ in range(2):  # not only once
        with pytest.raises(RuntimeError, match=message + r"on cpu\. .*torch\._dynamo\.reset\(\)"):
            here((), [x, make(), bias])
    with pytest.raises(RuntimeError, match="and 1 more like it"):
        here((), [x, make(), stored(7)])
    here((), [x, weight, bias])


@pytest.mark.usefixtures("on_no_gpu")
def test_parameters_may_differ_in_what_no_kernel_reads() -> None:
    """Strides of one element, or of none; and what Dynamo left open."""
    here = a_running_lane(inputs=("row", "none", "open", "input"), static=(0, 1, 2), dynamic=(2,), cuda_graph=False)
    here((), [stored(1, 6), stored(0, 6), stored(4, 6), stored(4, 6)])
    one, none = stored(1, 6, stride=(99, 1)), stored(0, 6, stride=(1, 7))
    here((), [one, none, stored(5, 7), stored(4, 6, dtype=torch.half)])


@pytest.mark.usefixtures("on_no_gpu")
def test_a_graph_whose_parameter_lies_otherwise_elsewhere_is_not_captured_again() -> None:
    runtime, args = served(3)
    with torch.no_grad():
        runtime._cuda._check_layouts(list(args))  # as the call did behind which the graph was captured
        runtime(list(args))
        with pytest.raises(RuntimeError, match=r"strides \(2,\)"):
            runtime([stored(4, stride=(2,)), *args[1:]])
        runtime(list(args))
    assert (runtime.record.replays, runtime.record.other_calls) == (2, 0)
    runtime._cuda.release()


@pytest.mark.usefixtures("on_no_gpu")
def test_an_argument_that_was_lent_is_copied_before_it_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the graph that lent it must make room for the one that is to be captured."""
    lender, here = Lender(monkeypatch), a_running_lane(inputs=("a",), copy_outputs=False, max_captures=1)
    here._captures.add((1,), a_capture(here, gone=False))
    (lent,) = here((1,), [torch.ones(3)])
    copied: list[bool] = []

    def arguments(program: object, graph: object, args: list[torch.Tensor]) -> object:
        copied.append(lender.taken_back(args[0]))
        raise InterruptedError

    monkeypatch.setattr(lane, "StaticArguments", arguments)
    with pytest.raises(InterruptedError):
        here._capture((2,), here.runtime.graph, [lent], NONE)
    assert copied == [False]


def test_nothing_is_written_back_to_what_was_lent() -> None:
    """It lies where the graph has just written its outputs, and nobody may read it any more."""
    args = [torch.zeros(3), torch.zeros(3)]
    arguments = StaticArguments.__new__(StaticArguments)
    arguments.values, arguments._written_back = [torch.ones(3), torch.ones(3)], [0, 1]
    arguments.store(args, {args[0].untyped_storage()._cdata})
    assert [float(arg.sum()) for arg in args] == [0.0, 3.0]


def test_a_graph_is_left_alone_in_a_process_that_was_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(False)
    captured = cuda_graph.CapturedGraph(graph, (), SimpleNamespace(bytes=None), torch.device("cuda:0"), (0, 1))  # type: ignore[arg-type]
    monkeypatch.setattr(captured, "_process", captured._process + 1)
    captured.__del__()
    assert graph.resets == 0
    monkeypatch.undo()
    captured.__del__()
    assert graph.resets == 1


@pytest.mark.parametrize("told", [True, False], ids=["streams are told by number", "or not at all"])
def test_a_call_follows_the_last_one_on_whatever_stream(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """And looks for the stream only where it may be another."""
    here, looked, waited = a_lane(), list[int](), list[tuple[int, int]]()
    streams = [SimpleNamespace(number=number) for number in range(2)]
    for stream in streams:
        stream.wait_stream = lambda other, own=stream: waited.append((own.number, other.number))
    current = 0

    def look(device: torch.device) -> Any:
        looked.append(current)
        return streams[current]

    monkeypatch.setattr(torch.cuda, "current_stream", look)
    monkeypatch.setattr(upstream, "current_stream_key", lambda index: (current, index, 1) if told else None)
    for current in (0, 0, 1, 1, 0):
        assert here._follow_last_call() is streams[current]
    assert waited == [(1, 0), (0, 1)]
    assert looked == ([0, 1, 0] if told else [0, 0, 1, 1, 0])
