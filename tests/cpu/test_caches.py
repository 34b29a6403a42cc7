"""Inductor's caches hold our modules as they hold its own: found again by a new process, and never mixed up.

Most tests run a fresh process over a cache directory that the tests share.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

from opara_backend import upstream
from opara_backend.report.record import GraphRecord, collect

Run = Callable[..., Any]
Agree = Callable[..., list[GraphRecord]]

# Compiles for a backend with options (arguments 1 and 2) and says what the caches did and who ran the graph.
PROCESS = """
import json, sys
import torch
from torch._dynamo.utils import counters
from opara_backend.report.record import collect

backend, options = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)).eval()
branch = torch.nn.Linear(8, 8)

def function(x):
    return model(x) @ branch(x).t(), x.sin()

compiled = torch.compile(function, backend=backend, options=options or None)
right = True
with torch.no_grad(), collect() as records:
    for call in range(3):
        x = torch.randn(4, 8)
        for actual, expected in zip(compiled(x), function(x)):
            right = right and torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
print(json.dumps({
    "right": right,
    "planned": [len(r.plans) for r in records],
    "fallbacks": [str(f) for r in records for f in r.fallbacks] + list(counters["opara"]),
    "kernels": [len(r.graph) for r in records],
    "policies": [r.options.policy for r in records],
    "streams": [plan.schedule.streams for r in records for plan, _ in r.plans.values()],
    "fx": [counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]],
    "aot": [counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]],
}))
"""
OPARA = '{"policy": "opara"}'
HIT, MISS = [1, 0], [0, 1]


@pytest.fixture(scope="module")
def process(run_python: Run) -> Callable[..., dict[str, Any]]:
    """Run PROCESS for a backend in a cache directory; what is always so is checked."""

    def run(cache: Path, backend: str, options: str = "{}", source: str = PROCESS, **variables: str) -> dict[str, Any]:
        found: dict[str, Any] = run_python(source, backend, options, cache=cache, environment=variables)
        assert found["right"]
        assert found["fallbacks"] == []
        assert found["planned"] == ([1] if backend == "opara" else [])
        return found

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor_cache")


@pytest.fixture(scope="module")
def first(process: Callable[..., dict[str, Any]], cache: Path) -> dict[str, Any]:
    """What the first process that used the cache saw; it also leaves a bundle of everything cached."""
    bundle = f"open({str(cache / 'bundle')!r}, 'wb').write(torch.compiler.save_cache_artifacts()[0])\n"
    return process(cache, "opara", OPARA, source=PROCESS.replace("print(", bundle + "print("))


def test_first_process_compiles(first: dict[str, Any]) -> None:
    assert first["aot"] == MISS
    assert first["fx"] == MISS
    assert first["streams"][0] > 1


def test_second_process_finds_everything_even_under_other_options_of_ours(
    first: dict[str, Any], process: Callable[..., dict[str, Any]], cache: Path
) -> None:
    second = process(cache, "opara", '{"policy": "sequential", "max_captures": 3}')
    assert second["aot"] == HIT
    assert second["fx"][1] == 0
    assert second["kernels"] == first["kernels"]
    assert second["policies"] == ["sequential"]
    assert second["streams"] == [1]


def test_graph_cache_hits_without_autograd_cache(
    first: dict[str, Any], process: Callable[..., dict[str, Any]], cache: Path
) -> None:
    second = process(cache, "opara", OPARA, TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    assert second["fx"] == HIT
    assert second["kernels"] == first["kernels"]
    assert second["streams"] == first["streams"]


def test_modules_travel_in_a_bundle(
    first: dict[str, Any], process: Callable[..., dict[str, Any]], cache: Path, tmp_path: Path
) -> None:
    """torch.compiler.save_cache_artifacts on one machine, load_cache_artifacts on another."""
    load = f"import torch\ntorch.compiler.load_cache_artifacts(open({str(cache / 'bundle')!r}, 'rb').read())\n"
    found = process(tmp_path, "opara", source=load + PROCESS)
    assert found["aot"] == HIT
    assert found["kernels"] == first["kernels"]


def test_stock_inductor_after_us_does_not_get_our_module(
    first: dict[str, Any], process: Callable[..., dict[str, Any]], cache: Path
) -> None:
    found = process(cache, "inductor")
    assert found["aot"] == MISS
    assert found["fx"] == MISS


def test_we_do_not_get_stock_inductors_module(process: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for backend in ("inductor", "opara"):
        found = process(tmp_path, backend)
        assert found["aot"] == MISS
        assert found["fx"] == MISS


# --- in this process --------------------------------------------------------------------------------------------------


class Pass(CustomGraphPass):  # type: ignore[misc]
    """A user's pass: turns sines into cosines, so that its work shows in the result."""

    def __init__(self, name: str | None) -> None:
        self.name, self.runs = name, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.runs += 1
        for node in graph.nodes:
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.aten.cos.default

    def uuid(self) -> Any:
        return self.name


def sine(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin() @ x, (x @ x).relu()


def compiled_sine(**options: Any) -> tuple[Tensor, list[GraphRecord]]:
    torch._dynamo.reset()
    with torch.no_grad(), collect() as records:
        compiled = torch.compile(sine, backend="opara", options=options or None)
        compiled(torch.eye(4))
        return compiled(torch.eye(4))[0], records


@pytest.mark.parametrize("place", ["post_grad_custom_pre_pass", "post_grad_custom_post_pass"])
@pytest.mark.parametrize("given", ["config", "options"])
@pytest.mark.parametrize("name", ["a name", None], ids=["cached", "uncached"])
def test_the_users_own_pass_runs(place: str, given: str, name: str | None) -> None:
    users = Pass(f"{name} {uuid.uuid4()}" if name else None)
    cosine, sine_of_eye = torch.eye(4).cos(), torch.eye(4).sin()
    if given == "config":
        with torch._inductor.config.patch({place: users}):
            result, records = compiled_sine()
            assert getattr(torch._inductor.config, place) is users
    else:
        result, records = compiled_sine(**{place: users})
    assert users.runs > 0
    torch.testing.assert_close(result, cosine)
    assert records[0].plans
    result, _ = compiled_sine()
    torch.testing.assert_close(result, sine_of_eye, msg="the pass is gone, its module must not be found")


@pytest.mark.skipif(not upstream.TAKES_SEVERAL_PASSES, reason="this torch takes one pass")
def test_several_passes_of_the_users_run_and_are_told_what_they_ask_for() -> None:
    asked: list[bool] = []

    class Aware(torch._inductor.custom_graph_pass.CustomInferenceAwareGraphPass):  # type: ignore[misc]
        def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None:
            asked.append(is_inference)

        def uuid(self) -> Any:
            return f"aware {uuid.uuid4()}"

    users = [Aware(), Pass(f"one of two {uuid.uuid4()}")]
    result, records = compiled_sine(post_grad_custom_pre_pass=users)
    torch.testing.assert_close(result, torch.eye(4).cos())
    assert asked == [True]
    assert len(users) == 2, "the user's own list is not written to"
    assert records[0].plans


TRAINING: tuple[dict[str, Any], bool, str] = ({"max_captures": 5}, True, "training")
WRAPPER: tuple[dict[str, Any], bool, str] = ({"cpp_wrapper": True}, False, "unsupported_option")


@pytest.mark.parametrize(("options", "train", "reason"), [TRAINING, WRAPPER], ids=["training", "option"])
def test_steps_down_are_counted_and_refused_when_a_cache_answers(
    options: dict[str, Any], train: bool, reason: str
) -> None:
    """AOTAutograd's cache answers before the graph reaches us; the user must hear the same as the first time."""
    counters = torch._dynamo.utils.counters

    def compile_and_call(**more: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(nn.Linear(4, 4), backend="opara", options={**options, **more})
        with torch.set_grad_enabled(train):
            result = compiled(torch.ones(2, 4))
        if train:
            result.sum().backward()

    with fresh_cache():
        compile_and_call()
        assert counters["opara"][reason] > 0
        assert counters["aot_autograd"]["autograd_cache_hit"] == 0
        compile_and_call()
        assert counters["opara"][reason] > 0
        with pytest.raises(Exception, match=reason):
            compile_and_call(fallback="error")


def test_no_cache_at_all(agree: Agree) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        agree(sine, lambda call: (torch.randn(4, 4, generator=torch.Generator().manual_seed(call)),))
