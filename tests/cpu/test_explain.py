"""`opara_backend.explain` on the CPU: what it says of models that branch, fall back, break, train, change shape."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import opara_backend
import opara_backend.report.explain as explaining
from opara_backend.execution.runtime import Runtime
from opara_backend.report.model import Report
from opara_backend.report.record import collect


class Branches(nn.Module):
    """Two towers of different depth over one input, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.right = nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1).softmax(1)


X = torch.linspace(-1, 1, 64).reshape(4, 16)


def test_a_model_that_branches() -> None:
    model = Branches().eval()
    report = opara_backend.explain(model, X, options={"streams": 2})
    (graph,) = report.graphs
    (shape,) = graph.shapes
    assert (report.model, graph.device, report.options) == ("Branches", "cpu", (("streams", "2"),))
    assert (shape.state, shape.estimated, shape.streams) == ("in order", True, 2)
    assert "estimated for NVIDIA H200" in str(report)
    modules = {kernel.module for kernel in shape.kernels}
    assert {"left.2", "right"} <= modules
    assert all("test_explain.py:" in kernel.source for kernel in shape.kernels if kernel.module)
    assert all(kernel.host_seconds is not None and kernel.host_seconds > 0 for kernel in shape.kernels)
    assert shape.waits
    assert all(wait.hazards for wait in shape.waits)
    assert shape.memory is not None
    assert shape.bound is not None
    assert [line.kind for line in shape.timelines] == ["plan", "sequential"]
    assert graph.stages.compile >= graph.stages.lowering >= 0
    assert graph.stages.first_run > 0 < graph.stages.plan
    assert ("left.0", "Linear") in report.modules
    assert report.fallbacks == graph.fallbacks == ()
    assert Report.from_json(report.to_json()) == report


def test_a_compiled_model_is_explained_as_it_was_compiled_and_left_alone() -> None:
    model = Branches().eval()
    compiled = torch.compile(model, backend="opara", options={"policy": "sequential"})
    with torch.no_grad():
        expected = compiled(X)
        report = opara_backend.explain(compiled, X)
        assert report.shapes()[0].policy.startswith("sequential")
        assert report.model == "Branches"
        with torch.compiler.set_stance("fail_on_recompile"):  # what was compiled before still is
            assert torch.equal(compiled(X), expected)
    with pytest.raises(ValueError, match="options= is for models that are not compiled"):
        opara_backend.explain(compiled, X, options={"streams": 2})


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Runtime]] = []
    begin = Runtime.__init__

    def remembered(self: Runtime, *args: Any) -> None:
        begin(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Runtime, "__init__", remembered)
    before = set(vars(explaining))
    opara_backend.explain(Branches().eval(), X)
    gc.collect()
    assert [runtime() for runtime in made] == [None]
    assert set(vars(explaining)) == before


def test_functions_and_models_compiled_in_place() -> None:
    def function(x: Tensor, *, scale: float) -> Tensor:
        return torch.sin(x) @ x.T * scale

    report = opara_backend.explain(function, X, scale=2.0)
    assert report.model == "function"
    assert len(report.graphs) == 1
    model = Branches().eval()
    model.compile(backend="opara", options={"policy": "wavefront"})
    with torch.no_grad():
        report = opara_backend.explain(model, X)
    assert report.model == "Branches"
    assert report.shapes()[0].policy.startswith("wavefront")


def test_training_is_reported() -> None:
    compiled = torch.compile(Branches(), backend="opara")
    report = opara_backend.explain(compiled, X)
    assert report.graphs == ()
    assert {step.reason for step in report.fallbacks} == {"training"}
    assert "no_grad" in str(report)
    assert Report.from_json(report.to_json()) == report


def test_what_the_host_decides_is_reported_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos() * 2, (x @ x.T,))

    with caplog.at_level(logging.WARNING):
        report = opara_backend.explain(Decides(), X)
    (graph,) = report.graphs
    assert len(graph.segments) > 1
    (step,) = graph.fallbacks
    assert step.reason == "host_decision"
    assert "test_explain.py:" in step.source
    assert graph.shapes[0].state == "unplanned"
    assert "host_decision" in str(report)
    assert "segments" in str(report)


def test_every_graph_of_a_broken_model() -> None:
    def broken(x: Tensor) -> Tensor:
        y = torch.sin(x) @ x.T
        scale = y.sum().item()  # the graph ends here
        return torch.cos(y) * scale

    report = opara_backend.explain(broken, X)
    assert len(report.graphs) == 2
    assert all(graph.shapes for graph in report.graphs)
    assert len(report.to_mermaid(1)) > 20


def test_dynamic_shapes() -> None:
    compiled = torch.compile(Branches().eval(), backend="opara", dynamic=True)
    with torch.no_grad():
        report = opara_backend.explain(compiled, X)
    (graph,) = report.graphs
    assert graph.symbols
    assert "4" in graph.shapes[0].shape
    assert "dynamic sizes" in str(report)


def test_files(tmp_path: Path) -> None:
    report = opara_backend.explain(Branches().eval(), X)
    assert "</html>" in report.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert report.save_trace(tmp_path / "trace.json").stat().st_size > 500
    assert Report.from_json(report.save_json(tmp_path / "report.json").read_text(encoding="utf-8")) == report


class Tagger(nn.Module):
    """A recurrent layer, which Dynamo does not trace unless it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.tag = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tag(self.read(x)[0])


def test_what_dynamo_did_not_trace_is_said_with_its_advice() -> None:
    model, x = Tagger().eval(), X.reshape(2, 2, 16)
    report = opara_backend.explain(model, x)
    assert any("RNN" in note and "allow_rnn=True" in note for note in report.notes)
    assert "allow_rnn" in str(report)
    with torch._dynamo.config.patch(allow_rnn=True):
        told = opara_backend.explain(model, x)
    (graph,) = told.graphs
    assert graph.shapes[0].kernels
    assert told.notes == ()


def test_breaks_are_counted_for_this_call_alone() -> None:
    def broken(x: Tensor) -> Tensor:
        y = (x @ x.t()).relu()
        torch._dynamo.graph_break()
        return y.softmax(1)

    for _ in range(2):
        report = opara_backend.explain(broken, X)
        assert len(report.graphs) == 2
        (note,) = report.notes
        assert note.startswith(f"Dynamo broke the graph at {__file__}:{broken.__code__.co_firstlineno + 2}: ")
    assert opara_backend.explain(lambda x: x.relu(), X).notes == ()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x).relu() + self.right(x).tanh()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_graphs_that_are_alike_keep_their_own_names() -> None:
    """Inductor's cache takes them for the same, which they are, but for where they come from."""
    for _ in range(2):
        report = opara_backend.explain(Twice().eval(), X)
        modules = [{k.module.partition(".")[0] for s in g.shapes for k in s.kernels} for g in report.graphs]
        assert modules == [{"first"}, {"second"}]
    with torch.no_grad(), collect() as records:
        torch.compile(Twice().eval(), backend="opara")(X)
    for record, own in zip(records, ("first", "second"), strict=True):  # out of the cache or not: never the other's
        assert {k.module.partition(".")[0] for k in record.graph.kernels} <= {own, ""}


def test_what_was_explained_before_is_not_compiled_again() -> None:
    for _ in range(2):
        torch._dynamo.utils.counters.clear()
        opara_backend.explain(Twice().eval(), X)
    seen = torch._dynamo.utils.counters
    assert seen["inductor"]["fxgraph_cache_miss"] + seen["aot_autograd"]["autograd_cache_miss"] == 0
    assert seen["inductor"]["fxgraph_cache_hit"] + seen["aot_autograd"]["autograd_cache_hit"] >= 2


def test_a_wrong_option_is_told_before_anything_is_traced() -> None:
    with pytest.raises(ValueError, match="did you mean 'streams'"):
        opara_backend.explain(lambda x: x.relu(), X, options={"stream": 2})


def test_a_model_in_training_mode_is_noted() -> None:
    (note,) = opara_backend.explain(nn.Sequential(nn.Linear(16, 4), nn.Dropout()), X).notes
    assert "training mode" in note


def test_records_of_graphs_that_are_called_again() -> None:
    compiled = torch.compile(Block().eval(), backend="opara")
    with torch.no_grad():
        compiled(X)
        with collect() as records:
            for _ in range(2):
                compiled(X)
    (record,) = records
    assert record.plans


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def encode(self, x: Tensor) -> Tensor:
        return self.project(x).relu() @ x.t()


def test_a_method_names_modules_as_its_model_does() -> None:
    (graph,) = opara_backend.explain(Encoding().eval().encode, X).graphs
    assert {k.module for s in graph.shapes for k in s.kernels} == {"project", ""}


def test_breaks_for_one_reason_are_one_note() -> None:
    def broken(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x.relu() @ x.t()
        print("here")
        y = x.sin()
        print("and here")
        return y.softmax(1)

    (note,) = opara_backend.explain(broken, torch.eye(4)).notes
    first = broken.__code__.co_firstlineno
    assert note.startswith(f"Dynamo broke the graph at {__file__}:{first + 3}, {__file__}:{first + 5}: ")
    assert "print" in note


def test_no_kernel_is_said_to_come_from_a_line_of_this_package() -> None:
    """A module of torch's has no line of the user's: then none is named, not that of the call by `explain`."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval()
    report = opara_backend.explain(model, torch.randn(4, 8))
    assert not any(
        "opara_backend" in kernel.source
        for graph in report.graphs
        for shape in graph.shapes
        for kernel in shape.kernels
    )


class Counts(nn.Module):
    """Counts its calls, in place and not, and writes over what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1))
        self.register_buffer("other", torch.zeros(1), persistent=False)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor, more: dict[str, list[Tensor]]) -> Tensor:
        self.place += 1
        self.other = self.other + 1
        more["seen"][0].copy_(x)
        return self.norm(x.add_(1)) * self.place


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_calls_write_is_put_back(mode: Any, compiled: bool) -> None:
    """Whoever looks at a model that decodes must not move its cache on."""
    with mode():
        model = Counts()
        x, seen = X.clone(), torch.full_like(X, torch.nan)
        held = {name: buffer.clone() for name, buffer in model.named_buffers()}
        objects = {name: id(buffer) for name, buffer in model.named_buffers()}
        opara_backend.explain(torch.compile(model, backend="opara") if compiled else model, x, {"seen": [seen]})
        assert torch.equal(x, X)
        assert seen.isnan().all()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, held[name]), name
            assert id(buffer) == objects[name], name
    assert "other" not in model.state_dict()


NAN = torch.tensor([torch.nan])
UNUSUAL = {
    "expanded, with NaN": lambda: torch.tensor([[1.0], [torch.nan]]).expand(2, 3),
    "all one element": lambda: NAN.clone().expand(4, 2),
    "windows that overlap": lambda: torch.tensor([1.0, torch.nan, 3.0, 4.0]).unfold(0, 2, 1),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "every other column": lambda: torch.arange(8.0).reshape(2, 4)[:, ::2],
    "half complex": lambda: torch.tensor([1 + 2j, torch.nan], dtype=torch.complex32),
    "double complex": lambda: torch.tensor([1 + 2j, torch.nan], dtype=torch.complex128).expand(2, 2),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative zero": lambda: torch.tensor([-0.0]),
    "one byte": lambda: torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "a subclass": lambda: torch.tensor([[torch.nan]]).as_subclass(Named).expand(2, 2),
    "a number": lambda: torch.tensor(torch.nan),
    "empty": lambda: torch.empty(0, 3),
    "empty and half complex": lambda: torch.empty(0, 3, dtype=torch.complex32),
}


class Named(Tensor):
    """A class that says more than torch's, and holds no more."""


class Writes(nn.Module):
    """Writes zeros over the memory behind its buffer and its input, where that is asked for."""

    def __init__(self, held: Tensor, writes: bool) -> None:
        super().__init__()
        self.register_buffer("held", held)
        self.writes = writes

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.writes:
            zero(self.held, x)
        return y + 1


@torch._dynamo.disable
def zero(*tensors: Tensor) -> None:
    for tensor in tensors:
        memory(tensor).zero_()


def memory(tensor: Tensor) -> Tensor:
    """The bytes of all the memory that `tensor` lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", UNUSUAL)
def test_tensors_that_cannot_be_compared_or_copied_to_are_put_back(name: str, writes: bool) -> None:
    """Bit for bit, and only their own: what lies between their elements is another tensor's."""
    held, x = UNUSUAL[name](), UNUSUAL[name]()
    before, between = memory(x).clone(), name == "every other column"
    versions = held._version, x._version
    opara_backend.explain(Writes(held, writes), x, torch.ones(3))
    for tensor in (held, x):
        if writes and between:
            assert memory(tensor).view(torch.float32).tolist() == [0, 0, 2, 0, 4, 0, 6, 0]
        else:
            assert torch.equal(memory(tensor), before)
    if not writes:
        assert (held._version, x._version) == versions, "written all the same"


@pytest.mark.parametrize("given", ["two in one", "nested", "sparse"])
def test_tensors_that_are_not_plain_are_no_error(given: str) -> None:
    """Neither those that hold others, nor those that know no comparison."""
    x = {
        "two in one": lambda: TwoTensor(torch.zeros(3), torch.ones(3)),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": lambda: torch.eye(4).to_sparse(),
    }[given]()
    assert opara_backend.explain(lambda x, y: y + 1, x, torch.ones(3)).graphs


def test_and_put_back_where_explaining_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Counts(), X.clone()
    monkeypatch.setattr(explaining, "_report", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opara_backend.explain(model, x, {"seen": [torch.zeros_like(X)]})
    assert torch.equal(x, X)
    assert model.place == 0


def test_inputs_that_are_no_plain_tensors_are_left() -> None:
    x = torch.eye(4).to_sparse()
    assert opara_backend.explain(lambda x: x.to_dense() + 1, x).notes is not None
    assert torch.equal(x.to_dense(), torch.eye(4))
