"""Inductor's caches hold our modules as they hold its own: found again by a new process, and never mixed up.

Each test runs a few fresh processes that share a fresh cache directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

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
HIT, MISS = [1, 0], [0, 1]


@pytest.fixture
def process(run_python: Run, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run PROCESS for a backend, in a cache directory all calls of one test share; what is always so is checked."""

    def run(backend: str, options: str = "{}", **environment: str) -> dict[str, Any]:
        found: dict[str, Any] = run_python(
            PROCESS, backend, options, cache=tmp_path / "cache", environment=tuple(environment.items())
        )
        assert found["right"]
        assert found["fallbacks"] == []
        assert found["planned"] == ([1] if backend == "opara" else [])
        return found

    return run


def test_second_process_finds_everything_even_under_other_options_of_ours(process: Callable[..., Any]) -> None:
    first = process("opara")
    assert first["aot"] == MISS
    assert first["fx"] == MISS
    assert first["streams"] > [1]
    second = process("opara")
    assert second["aot"] == HIT
    assert second["fx"][1] == 0
    assert second["kernels"] == first["kernels"]
    sequential = process("opara", '{"policy": "sequential", "max_captures": 3}')
    assert sequential["aot"] == HIT
    assert sequential["policies"] == ["sequential"]
    assert sequential["streams"] == [1]
    without_aot = process("opara", TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    assert without_aot["fx"] == HIT
    assert without_aot["kernels"] == first["kernels"]


@pytest.mark.parametrize("order", [("inductor", "opara"), ("opara", "inductor")], ids="-".join)
def test_stock_inductor_and_we_do_not_get_each_others_modules(process: Callable[..., Any], order: tuple[str, str]) -> None:
    for backend in order:
        found = process(backend)
        assert found["aot"] == MISS
        assert found["fx"] == MISS


def test_modules_travel_in_a_bundle(run_python: Run, tmp_path: Path) -> None:
    """torch.compiler.save_cache_artifacts on one machine, load_cache_artifacts on another."""
    path = tmp_path / "artifacts"
    save = PROCESS + f"\nfound = torch.compiler.save_cache_artifacts()\nopen({str(path)!r}, 'wb').write(found[0])\nprint(1)"
    load = f"import torch\ntorch.compiler.load_cache_artifacts(open({str(path)!r}, 'rb').read())\n" + PROCESS
    run_python(save, "opara", "{}", cache=tmp_path / "here")
    found = run_python(load, "opara", "{}", cache=tmp_path / "there")
    assert found["right"]
    assert found["planned"] == [1]
    assert found["aot"] == HIT


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


@pytest.mark.parametrize("given", ["config", "options"])
@pytest.mark.parametrize("name", ["a name", None], ids=["cached", "uncached"])
def test_the_users_own_pass_runs(given: str, name: str | None) -> None:
    users = Pass(f"{name} {given} {torch.rand(()).item()}" if name else None)
    cosine, sine_of_eye = torch.eye(4).cos(), torch.eye(4).sin()
    if given == "config":
        with torch._inductor.config.patch(post_grad_custom_post_pass=users):
            result, records = compiled_sine()
            assert torch._inductor.config.post_grad_custom_post_pass is users
    else:
        result, records = compiled_sine(post_grad_custom_post_pass=users)
    assert users.runs > 0
    torch.testing.assert_close(result, cosine)
    assert records[0].plans
    result, _ = compiled_sine()
    torch.testing.assert_close(result, sine_of_eye, msg="the pass is gone, its module must not be found")


def test_no_cache_at_all(agree: Agree) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        agree(sine, lambda call: (torch.randn(4, 4, generator=torch.Generator().manual_seed(call)),))
