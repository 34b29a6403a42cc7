"""A graph lowered in several ways: which there are, that they do the same, and which is kept. Times are made up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from opara_backend import backend, fallback, upstream
from opara_backend.execution import alternatives, winners
from opara_backend.execution.alternatives import Kept, agree, capture_fastest
from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.host import observe
from opara_backend.execution.race import Memory
from opara_backend.execution.runtime import Runtime
from opara_backend.kernel_graph import KernelGraph
from opara_backend.lowering import alternatives as lowering
from opara_backend.lowering import fused_convolutions, gemv, patches, under_way
from opara_backend.lowering.inductor import OparaWrapperCodegen
from opara_backend.lowering.sorting import Unsupported
from opara_backend.options import Options
from opara_backend.report.record import GraphRecord, collect
from opara_backend.scheduling.search import NOISE
from opara_backend.scheduling.workspaces import Workspaces

ON = {"try_rewrites": True}


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for module in (fused_convolutions, gemv, patches):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(backend, "_on_cuda", lambda example_inputs: True)
    monkeypatch.setattr(winners, "current_device_spec", lambda index: None)
    monkeypatch.setattr(upstream, "cache_directory", lambda: tmp_path)
    with torch.no_grad():
        yield


@dataclass
class Lowered:
    """A compiled function: the Runtimes of its graphs, the arguments each was given last, and what the reports know."""

    call: Callable[..., Any]
    runtimes: list[Runtime] = field(default_factory=list)
    arguments: list[list[Any]] = field(default_factory=list)
    records: list[GraphRecord] = field(default_factory=list)

    def sets(self) -> list[tuple[str, ...]]:
        """The rewrites of every lowering of the only graph."""
        (runtime,) = self.runtimes
        return [one.generated.rewrites for one in (runtime, *runtime.alternatives)]


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lowered]]:
    """Compiles a function and calls it once, its Runtimes' calls written down."""
    made: list[Lowered] = []
    called = Runtime.__call__

    def call(self: Runtime, args: list[Any]) -> Any:
        if self in made[-1].runtimes:
            made[-1].runtimes.remove(self)
        made[-1].runtimes.append(self)
        made[-1].arguments = [list(args)]
        return called(self, args)

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Lowered:
        torch._dynamo.reset()
        with collect() as records:
            compiled = torch.compile(function, backend="opara", fullgraph=True, options={**ON, **options})
            made.append(Lowered(compiled, records=records))
            compiled(*arguments)
        return made[-1]

    monkeypatch.setattr(Runtime, "__call__", call)
    yield run
    torch._dynamo.reset()


def network(width: int = 8) -> nn.Module:
    """Of patches, and a convolution with batch norm and ReLU: two rewrites find something to do."""
    layers = [nn.Conv2d(3, width, 8, stride=8), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 2, 1)).eval()


IMAGE = torch.rand(1, 3, 32, 32)
BOTH, FUSED, UNFOLDED = ("fuse_convolutions", "unfold_patches"), ("fuse_convolutions",), ("unfold_patches",)


def test_with_all_rewrites_and_without_each(lowered: Callable[..., Lowered]) -> None:
    found = lowered(network(), IMAGE)
    assert found.sets() == [(), BOTH, UNFOLDED, FUSED]
    assert len(found.records) == 1, "they are one graph to reports"
    assert all(other.record is found.runtimes[0].record for other in found.runtimes[0].alternatives)


def test_what_is_asked_for_is_in_all_of_them(lowered: Callable[..., Lowered]) -> None:
    assert lowered(network(), IMAGE, fuse_convolutions=True).sets() == [FUSED, BOTH]


def count_lowerings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that gains an entry with each."""
    compiled = upstream.compile_fx_inner
    times: list[bool] = []
    monkeypatch.setattr(
        upstream, "compile_fx_inner", lambda *args, **kwargs: (times.append(True), compiled(*args, **kwargs))[1]
    )
    return times


def test_where_no_rewrite_finds_anything_there_is_one_lowering(
    lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = count_lowerings(monkeypatch)
    assert lowered(torch.cos, torch.rand(4)).sets() == [()]
    assert len(times) == 1


def test_nothing_is_tried_unasked(lowered: Callable[..., Lowered]) -> None:
    found = lowered(network(), IMAGE, try_rewrites=False)
    assert found.sets() == [BOTH], "what is on by default"
    assert found.runtimes[0].generated.possible == ()


def test_what_is_forbidden_is_in_none_of_them(lowered: Callable[..., Lowered]) -> None:
    assert lowered(network(), IMAGE, fuse_convolutions=False).sets() == [(), UNFOLDED]


def test_what_is_off_by_default_is_tried_as_well() -> None:
    merged, convolutions = "merge_products", "merge_convolutions"
    assert (Options().merge_products, Options().merge_convolutions) == (True, False)
    assert list(lowering._sets((), (convolutions, merged))) == [(merged,), (convolutions, merged)]
    assert list(lowering._sets((convolutions,), (merged,))) == [(convolutions, merged)]
    assert list(lowering._sets((), (convolutions,))) == [(convolutions,)]


def test_all_are_found_again_in_inductors_cache(lowered: Callable[..., Lowered]) -> None:
    model = network()
    lowered(model, IMAGE)
    before = upstream.counters["inductor"]["fxgraph_cache_hit"]
    assert lowered(model, IMAGE).sets() == [(), BOTH, UNFOLDED, FUSED]
    assert upstream.counters["inductor"]["fxgraph_cache_hit"] == before + 4


@pytest.mark.parametrize("where", ["fuse_convolutions", "copying"])
def test_looking_for_rewrites_cannot_fail_the_compilation(
    lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def fail(*args: Any) -> int:
        raise RuntimeError("injected")

    if where == "copying":
        monkeypatch.setattr(lowering, "_copied", fail)
    else:
        monkeypatch.setattr(fused_convolutions, where, fail)
    model = network(9)
    found = lowered(model, IMAGE)
    assert found.sets() == ([()] if where == "copying" else [(), UNFOLDED])
    assert "RuntimeError: injected" in caplog.text
    torch.testing.assert_close(found.call(IMAGE), model(IMAGE))


def test_a_lowering_left_to_inductor_is_no_step_down(
    lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody falls back, as the graph as it is runs."""
    rewrite = OparaWrapperCodegen.rewrite

    def refused(self: Any, lines: Any, code: Any) -> None:
        if under_way.current().rewrites:
            raise Unsupported("injected")
        rewrite(self, lines, code)

    monkeypatch.setattr(OparaWrapperCodegen, "rewrite", refused)
    with fallback.collect() as steps:
        assert lowered(network(10), IMAGE).sets() == [()]
    assert steps == []


def test_frozen_graphs_are_lowered_once(lowered: Callable[..., Lowered]) -> None:
    """They hold weights, and caches would take a copy's for those of another model."""
    with upstream.inductor_config.patch(freezing=True):
        assert len(lowered(network(), IMAGE).sets()) == 1
        usual = backend._rewrites(Options(), [IMAGE])
        assert backend._rewrites(Options(try_rewrites=True), [IMAGE]) == usual, "and with what it always is"
        assert "fuse_gemv" in usual


def test_without_a_gpu_caches_are_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_on_cuda", lambda example_inputs: False)
    monkeypatch.setattr(upstream, "without_autograd_cache", lambda: pytest.fail("switched off"))
    torch._dynamo.reset()
    torch.compile(torch.cos, backend="opara", options=ON)(torch.ones(3))


def test_a_lowering_that_fails_is_left_out_and_said(
    lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = upstream.compile_fx_inner

    def broken(*args: Any, **kwargs: Any) -> Any:
        given = upstream.inductor_config.post_grad_custom_pre_pass
        for one in given if isinstance(given, list) else [given]:
            if "fuse_convolutions" in one.asked:
                raise RuntimeError("injected")
        return compiled(*args, **kwargs)

    monkeypatch.setattr(upstream, "compile_fx_inner", broken)
    model = network()
    found = lowered(model, IMAGE)
    assert found.sets() == [(), UNFOLDED]
    assert "not tried with fuse_convolutions: RuntimeError: injected" in caplog.text
    torch.testing.assert_close(found.call(IMAGE), model(IMAGE))


class Counting(nn.Module):
    """Convolutions, a counter that every call moves on, and an argument that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, sums: Tensor) -> Tensor:
        self.calls.add_(1)
        result = self.layers(x) + self.calls
        sums.add_(result.mean())
        return result


def a_choice(width: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Counting().to(width).eval(), (IMAGE.to(width), torch.zeros(3, dtype=width))


def test_a_run_of_any_of_them_leaves_no_trace_and_does_the_same(lowered: Callable[..., Lowered]) -> None:
    model, inputs = a_choice()
    found = lowered(model, *inputs)
    (runtime,), (args,) = found.runtimes, found.arguments
    arguments = StaticArguments(runtime.program, runtime.graph, args)
    before = [value.clone() for value in arguments.values]
    runs = [alternatives._run(one, arguments)[0] for one in (runtime, *runtime.alternatives)]
    torch.testing.assert_close(arguments.values, before, rtol=0, atol=0)
    assert len(runs) == 4
    assert len(runs[0]) > 2, "the output, the counter and the sums"
    assert all(agree(runs[0], other, 1e-3) for other in runs[1:])
    written = [value.clone() for value in arguments.written(runtime.program, runtime.graph)]
    assert len(written) == 2
    for found, unwritten in zip(runs[0][-2:], written, strict=True):
        assert not torch.equal(found, unwritten), "what a run leaves is what it wrote"


def test_graphs_inside_the_graph(lowered: Callable[..., Lowered]) -> None:
    """Lowering changes them, too."""
    model = network()

    @torch.compiler.nested_compile_region  # type: ignore[untyped-decorator]
    def region(x: Tensor) -> Tensor:
        return x.cos() @ x.sin()

    def function(x: Tensor) -> Tensor:
        found = model(x).mean(1)[0]
        return region(region(found))

    found = lowered(function, IMAGE)
    assert found.sets() == [(), BOTH, UNFOLDED, FUSED]
    for one in (found.runtimes[0], *found.runtimes[0].alternatives):
        torch.testing.assert_close(observe(one.program, found.arguments[0]).outputs[0], function(IMAGE))


def test_a_copy_has_graphs_of_its_own_and_the_same_tensors() -> None:
    inner = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    root = nn.Module()
    root.inner, root.weight = inner, nn.Parameter(torch.ones(3))  # type: ignore[assignment]
    graph = torch.fx.Graph()
    result = graph.call_module("inner", (graph.placeholder("x"),))
    graph.output(graph.call_function(torch.mul, (result, graph.get_attr("weight"))))
    given = torch.fx.GraphModule(root, graph)
    given.meta["kept"] = 3
    copied = lowering._copied(given)
    assert copied.meta == given.meta
    assert copied.weight is given.weight
    for name in ("", "inner"):
        one, other = given.get_submodule(name).graph, copied.get_submodule(name).graph
        assert one is not other
        assert [n.op for n in one.nodes] == [n.op for n in other.nodes]
        assert not set(one.nodes) & set(other.nodes)


def test_dynamic_shapes(lowered: Callable[..., Lowered]) -> None:
    model, images = network(), torch.rand(3, 3, 32, 32)
    torch._dynamo.mark_dynamic(images, 0)
    found = lowered(model, images)
    assert found.sets() == [(), FUSED]
    for one in found.runtimes[0].alternatives:
        torch.testing.assert_close(observe(one.program, found.arguments[0]).outputs[0], model(images))


def test_what_is_never_captured_is_lowered_once(
    lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()

    def function(x: Tensor) -> Tensor:
        found = model(x).mean((2, 3))
        return torch.cond(x.sum() > 0, lambda: found.cos() + 1, lambda: found.sin() - 1)

    times = count_lowerings(monkeypatch)
    assert lowered(function, IMAGE).sets() == [()]
    assert len(times) == 1
    assert lowered(network(11), IMAGE, cuda_graph=False).sets() == [BOTH], "as ever"
    assert len(times) == 2


# --- which one is kept ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Captured:
    """Stands in for a captured graph."""

    runtime: Runtime
    alive: bool = True

    def reset(self) -> None:
        self.alive = False


@dataclass
class World:
    """What the choice is given in place of a GPU. seconds: by rewrites; failing: rewrites that cannot be captured."""

    found: Lowered
    seconds: dict[tuple[str, ...], float]
    failing: tuple[tuple[str, ...], ...] = ()
    made: list[Captured] = field(default_factory=list)
    raced: int = 0

    def capture_best(self, runtime: Runtime, graph: KernelGraph, *more: Any) -> tuple[Any, Captured, list[Any]]:
        if runtime.generated.rewrites in self.failing:
            raise RuntimeError("injected")
        assert [b.name for b in graph.buffers] == [b.name for b in runtime.graph.buffers], "its own graph"
        assert all(isinstance(b.nbytes, int) for b in graph.buffers if b.planned), "with sizes"
        first = runtime is self.found.runtimes[0]
        assert more[1].needed == Workspaces({0: 5} if first else {}, 7, kept={0: 3} if first else {}), "its own kernels"
        self.made.append(Captured(runtime))
        return "plan", self.made[-1], []

    def seconds_per_replay(self, graphs: list[Captured], budget: float) -> list[float]:
        self.raced += 1
        return [self.seconds[graph.runtime.generated.rewrites] for graph in graphs]

    def choose(self) -> Kept:
        (runtime,), (args,) = self.found.runtimes, self.found.arguments
        graph = runtime.graph.bind(observe(runtime.program, args, runtime.lives).nbytes)
        arguments = StaticArguments(runtime.program, graph, args)
        memory = Memory(None, lambda nbytes: torch.empty(0), Workspaces({0: 5}, 7, kept={0: 3}))
        self.made.clear()
        kept = capture_fastest(runtime, graph, arguments, memory, (), lambda one: None)
        assert [one for one in self.made if one.alive] == [kept.captured]
        return kept


@pytest.fixture
def world(lowered: Callable[..., Lowered], monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setattr(alternatives, "give_back_unused", lambda: None)

    def make(seconds: dict[tuple[str, ...], float], model: nn.Module | None = None, **options: Any) -> World:
        given, inputs = a_choice()
        made = World(
            lowered(model or given, *inputs, **options), {(): 1.0, BOTH: 1.0, FUSED: 1.0, UNFOLDED: 1.0, **seconds}
        )
        monkeypatch.setattr(alternatives, "capture_best", made.capture_best)
        monkeypatch.setattr(alternatives, "seconds_per_replay", made.seconds_per_replay)
        return made

    return make


@pytest.mark.parametrize("fastest", [(), BOTH, UNFOLDED, FUSED], ids=str)
def test_the_fastest_is_kept_and_the_others_are_given_up(world: Callable[..., World], fastest: tuple[str, ...]) -> None:
    here = world({fastest: 0.5})
    kept = here.choose()
    assert kept.runtime.generated.rewrites == fastest
    assert [(timed.rewrites, timed.seconds) for timed in kept.lowerings] == [
        (rewrites, 0.5 if rewrites == fastest else 1.0) for rewrites in ((), BOTH, UNFOLDED, FUSED)
    ]


def test_what_is_no_faster_is_not_kept(world: Callable[..., World]) -> None:
    assert world({BOTH: 1.0 / NOISE}).choose().runtime.generated.rewrites == ()


def test_a_choice_is_remembered(world: Callable[..., World]) -> None:
    first = world({FUSED: 0.5})
    found = first.choose()
    again = world({}, model=None)
    kept = again.choose()
    assert kept.runtime.generated.rewrites == FUSED
    assert kept.lowerings == found.lowerings
    assert (first.raced, again.raced, len(again.made)) == (1, 0, 1)


def test_also_that_none_was_better(world: Callable[..., World]) -> None:
    world({}).choose()
    again = world({FUSED: 0.5})
    assert again.choose().runtime.generated.rewrites == ()
    assert (again.raced, len(again.made)) == (0, 1)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1}', '{"schema":1,"source":"another","lowerings":3}'])
def test_a_choice_that_cannot_be_read_is_made_anew(world: Callable[..., World], tmp_path: Path, text: str) -> None:
    world({FUSED: 0.5}).choose()
    (path,) = (tmp_path / "opara").iterdir()
    path.write_text(text)
    again = world({UNFOLDED: 0.5})
    assert again.choose().runtime.generated.rewrites == UNFOLDED
    assert again.raced == 1


def test_off_by_option(world: Callable[..., World], tmp_path: Path) -> None:
    world({FUSED: 0.5}, remember=False).choose()
    assert not (tmp_path / "opara").exists()


def test_one_that_cannot_be_captured_is_left_out(world: Callable[..., World], caplog: pytest.LogCaptureFixture) -> None:
    here = world({FUSED: 0.5, BOTH: 0.7})
    here.failing = (FUSED,)
    kept = here.choose()
    assert kept.runtime.generated.rewrites == BOTH
    assert len(kept.lowerings) == 3
    assert "not tried with fuse_convolutions: RuntimeError: injected" in caplog.text


def test_nor_is_what_was_remembered(world: Callable[..., World]) -> None:
    world({FUSED: 0.5}).choose()
    again = world({})
    again.failing = (FUSED,)
    assert again.choose().runtime.generated.rewrites == ()


def test_what_the_first_raises_is_raised(world: Callable[..., World]) -> None:
    here = world({})
    here.failing = ((),)
    with pytest.raises(RuntimeError, match="injected"):
        here.choose()


def test_an_error_while_comparing_leaves_it_out(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> bool:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(alternatives, "agree", fail)
    assert world({FUSED: 0.5}).choose().runtime.generated.rewrites == ()
    assert "not tried with fuse_convolutions: OutOfMemoryError: injected" in caplog.text


def test_rounding_is_that_of_the_coarsest_type(lowered: Callable[..., Lowered]) -> None:
    """A model in bfloat16 whose result is float32 is no more exact than one whose result is not."""
    model = network().bfloat16()
    given: list[float] = []
    found = lowered(lambda x: model(x.bfloat16()).float(), IMAGE)
    (runtime,), (args,) = found.runtimes, found.arguments
    arguments = StaticArguments(runtime.program, runtime.graph, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alternatives, "agree", lambda one, other, rounding: given.append(rounding) or True)
        assert len(list(alternatives._agreeing(runtime, runtime.alternatives, arguments))) == 3
    assert set(given) == {alternatives.TOLERANCE["bfloat16"]}


def test_one_whose_results_differ_is_left_out(world: Callable[..., World], caplog: pytest.LogCaptureFixture) -> None:
    """Weights scaled by a batch norm overflow, which the convolution's result does not."""
    model, _ = a_choice()
    convolution, norm = model.layers[1], model.layers[2]  # type: ignore[index]
    convolution.weight.data.fill_(1e20)
    norm.running_mean.fill_(0), norm.running_var.fill_(1e-38), norm.weight.data.fill_(1e30)
    model.layers[0].weight.data.fill_(1e-32), model.layers[0].bias.data.zero_()  # type: ignore[index]
    convolution.bias.data.zero_()
    here = world({FUSED: 0.5, BOTH: 0.5, UNFOLDED: 0.7}, model)
    with caplog.at_level(logging.WARNING, logger="opara_backend"):
        kept = here.choose()
    assert kept.runtime.generated.rewrites == UNFOLDED
    assert "not tried with fuse_convolutions: its results differ" in caplog.text


# --- what counts as the same ---------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.complex64]
numbers = st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=20)


@given(numbers, st.sampled_from(DTYPES))
def test_a_tensor_agrees_with_itself_and_within_rounding(values: list[float], dtype: torch.dtype) -> None:
    one = torch.tensor(values, dtype=dtype)
    assert agree([one], [one.clone()], 1e-2)
    rounded = (
        (one.to(torch.complex64) * (1 + 1e-4)).to(dtype) if dtype.is_complex else (one.double() * 1.0001).to(dtype)
    )
    assert agree([one], [rounded], 1e-2)


@given(numbers, st.data(), st.sampled_from(["nan", "inf", "-inf"]))
def test_but_not_where_one_is_no_number(values: list[float], data: st.DataObject, text: str) -> None:
    one = torch.tensor(values)
    other = one.clone()
    other[data.draw(st.integers(0, len(values) - 1))] = float(text)
    assert not agree([one], [other], 1e-2)
    assert not agree([other], [one], 1e-2)
    assert agree([other], [other.clone()], 1e-2)


def test_nor_where_integers_or_sizes_or_types_differ() -> None:
    one = torch.arange(3)
    assert not agree([one], [one + 1], 1e-2)
    assert not agree([one], [one.int()], 1e-2)
    assert not agree([one.float()], [one.float()[:2]], 1e-2)
    assert not agree([one], [], 1e-2)
    assert not agree([one.float()], [one.float() * 1.1], 1e-2)
    assert agree([torch.empty(0), torch.zeros(3)], [torch.empty(0), torch.zeros(3)], 1e-2)
    assert not agree([torch.zeros(3)], [torch.full((3,), 1e-30)], 1e-2)
