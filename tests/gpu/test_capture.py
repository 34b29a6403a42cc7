"""The captured graph itself: its branches, who owns its outputs, what a failure leaves behind."""

from __future__ import annotations

import gc
import multiprocessing
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor, nn

from opara_backend.execution import cuda_graph, race
from opara_backend.fallback import FallbackReason, OparaFallbackError
from opara_backend.profiling.resources import graph_structure
from opara_backend.report.record import collect
from opara_backend.scheduling.search import NOISE


class Branches(nn.Module):
    """`width` independent chains of matrix products behind one input, joined in the end."""

    def __init__(self, width: int = 4, size: int = 256) -> None:
        super().__init__()
        self.chains = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh()) for _ in range(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x + i) for i, chain in enumerate(self.chains)], 1).softmax(1)


@pytest.fixture
def model() -> nn.Module:
    return Branches().cuda().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 256, device="cuda")


def graph_width(raw_graph: int) -> int:
    """Largest set of working nodes none of which waits for another, from the graph's own nodes and edges (Dilworth)."""
    work, edges = graph_structure(raw_graph)
    graph = networkx.DiGraph(edges)
    graph.add_nodes_from(work)
    closure = networkx.transitive_closure_dag(graph)
    left = {node: ("out", node) for node in work}
    pairs = networkx.Graph()
    pairs.add_nodes_from(left.values(), bipartite=0)
    pairs.add_edges_from((left[a], ("in", b)) for a, b in closure.edges if a in left and b in left)
    matching = networkx.bipartite.hopcroft_karp_matching(pairs, top_nodes=list(left.values()))
    return len(work) - len(matching) // 2


@pytest.fixture
def captured_graphs(monkeypatch: pytest.MonkeyPatch) -> list[cuda_graph.CapturedGraph]:
    """Every graph captured while the test runs; what only served profiling has been reset, and has no outputs."""
    made: list[cuda_graph.CapturedGraph] = []
    original = cuda_graph.capture

    def spy(*args: Any, **keywords: Any) -> cuda_graph.CapturedGraph:
        made.append(original(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(race, "capture", spy)
    return made


@pytest.mark.parametrize(("policy", "least", "most"), [("opara", 4, 8), ("sequential", 1, 1)])
def test_width_of_the_real_graph(
    model: nn.Module, x: Tensor, captured_graphs: list[cuda_graph.CapturedGraph], policy: str, least: int, most: int
) -> None:
    with torch.inference_mode():
        torch.compile(model, backend="opara", options={"policy": policy})(x)
    (graph,) = (g for g in captured_graphs if g.outputs is not None)
    assert least <= graph_width(graph.graph.raw_cuda_graph()) <= most


def test_streams_option_bounds_the_width(
    model: nn.Module, x: Tensor, captured_graphs: list[cuda_graph.CapturedGraph]
) -> None:
    with torch.inference_mode():
        torch.compile(model, backend="opara", options={"policy": "opara", "streams": 2})(x)
    (graph,) = (g for g in captured_graphs if g.outputs is not None)
    assert graph_width(graph.graph.raw_cuda_graph()) == 2


def test_as_fast_a_candidate_as_any_is_kept(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara", options={"candidates": 5})
        call(x)
        torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    (record,) = records
    ((plan, captured),) = record.plans.values()
    (tried,) = record.candidates.values()
    assert captured
    assert 2 <= len(tried) <= 5
    assert tried[0][0].streams == 1
    (seconds,) = (seconds for schedule, seconds in tried if schedule == plan.schedule)
    fastest, least = min(tried, key=lambda entry: entry[1])
    assert seconds <= NOISE * least
    assert plan.schedule.streams <= fastest.streams


def test_outputs_belong_to_the_caller(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        inputs = [x + i for i in range(5)]
        kept = [call(i) for i in inputs]
        for given, found in zip(inputs, kept, strict=True):
            torch.testing.assert_close(found, model(given), rtol=1e-3, atol=1e-4)
        again = call(kept[-1].repeat(1, 1)[:, :256].contiguous())  # an output fed back
        assert torch.isfinite(again).all()


def test_parameters_are_read_where_they_are(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        call(x)
        model.chains[0][0].weight.mul_(3)  # in place: no new capture needed
        torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.5  # new addresses
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)


def test_random_numbers_advance_and_are_right() -> None:
    def draw(t: Tensor) -> Tensor:
        return torch.rand_like(t) + torch.nn.functional.dropout(t, 0.5)

    t = torch.ones(10000, device="cuda")
    with torch.no_grad():
        call = torch.compile(draw, backend="opara")
        results = [call(t) for _ in range(4)]
        for i, a in enumerate(results):
            assert 1.45 < float(a.mean()) < 1.55
            assert all(not torch.equal(a, b) for b in results[:i])


def test_fallback_random_draws_what_eager_draws() -> None:
    def draw(t: Tensor) -> Tensor:
        return torch.rand_like(t) - torch.randn_like(t)

    t = torch.ones(10000, device="cuda")
    with torch.no_grad():
        call = torch.compile(draw, backend="opara", options={"fallback_random": True})
        torch.manual_seed(7)
        found = [call(t) for _ in range(4)]
        torch.manual_seed(7)
        for result in found:
            torch.testing.assert_close(result, draw(t))


def test_deleting_the_model_frees_its_memory() -> None:
    def once() -> None:
        model = Branches(size=1024).cuda().eval()
        given = torch.randn(8, 1024, device="cuda")
        with torch.inference_mode():
            call = torch.compile(model, backend="opara")
            for _ in range(3):
                call(given)

    def settle() -> int:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    once()
    before = settle()
    for _ in range(5):
        once()
    assert settle() <= before


@pytest.mark.parametrize("when", ["profiling", "capture", "invalid"])
def test_a_failure_steps_down_and_leaves_nothing_behind(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    original = cuda_graph._launch_all

    def failing(*args: Any) -> Any:
        profiling = args[5] is not None
        if profiling == (when == "profiling"):
            original(*args)  # streams are forked, kernels are captured
            if when == "invalid":
                torch.ones(1, device="cuda").item()  # what no capture survives
            raise RuntimeError("injected")
        return original(*args)

    monkeypatch.setattr(cuda_graph, "_launch_all", failing)
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    assert [f.reason for r in records for f in r.fallbacks] == [FallbackReason.CAPTURE_FAILED]
    assert not torch.cuda.is_current_stream_capturing()
    torch.randn(4, device="cuda")  # the generator is not stuck in capture
    torch._dynamo.reset()
    with torch.inference_mode():
        strict = torch.compile(model, backend="opara", options={"fallback": "error"})
        with pytest.raises(OparaFallbackError, match="capture_failed"):
            strict(x)
    monkeypatch.undo()
    torch._dynamo.reset()
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        for _ in range(2):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    assert not records[0].fallbacks


def _call_in_child(call: Any, x: Tensor, told: Any) -> None:
    try:
        with torch.inference_mode():
            call(x)
    except RuntimeError as error:
        told.send(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_gets_an_error_not_a_hang(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        call(x)
    heard, told = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_call_in_child, args=(call, x, told))
    child.start()
    child.join(60)
    assert not child.is_alive()
    assert heard.poll(1)
    assert "fork" in heard.recv()
