"""A rewrite of the graph that fails costs nobody their program: it is compiled without, and that is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend import backend, upstream
from opara_backend.lowering import gemv
from opara_backend.report.record import collect

COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gemv, "DEVICES", ("cpu",))
    monkeypatch.setattr(backend, "_on_cuda", lambda example_inputs: True)
    torch._dynamo.reset()
    COUNTERS.clear()
    with torch.no_grad(), upstream.inductor_config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected")


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="opara", fullgraph=True, options=options)


@pytest.mark.parametrize("where", ["the rewrite", "its lowering"])
def test_it_is_compiled_without(where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if where == "the rewrite":
        monkeypatch.setattr(gemv, "fuse_gemv", fail)
    else:
        monkeypatch.setitem(upstream.lowerings(), gemv.operator(), fail)
    model, x = nn.Linear(512, 256), torch.randn(1, 512)
    with collect() as records:
        torch.testing.assert_close(compiled(model)(x), model(x))
    (record,) = records
    assert record.rewrites == ()
    assert COUNTERS["opara"]["rewrite_failed"] == 1
    assert "injected" in caplog.text
    assert "fuse_gemv" in caplog.text


def test_or_refused_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "fuse_gemv", fail)
    with pytest.raises(Exception, match=r"rewrite_failed.*fuse_gemv.*injected"):
        compiled(nn.Linear(16, 8), fallback="error")(torch.randn(1, 16))


def test_a_step_down_that_is_to_be_an_error_is_no_failure_of_a_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would be lowered again, in vain."""
    times: list[bool] = []
    compile_fx = upstream.compile_fx

    def watched(*args: Any, **kwargs: Any) -> Any:
        times.append(True)
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(upstream, "compile_fx", watched)
    with torch.enable_grad(), pytest.raises(Exception, match="training"):
        compiled(nn.Linear(16, 8), fallback="error")(torch.randn(2, 16))
    assert times == [True]


def test_what_fails_all_the_same_is_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "compile_fx_inner", fail)
    with pytest.raises(Exception, match="injected"):
        compiled(nn.Linear(16, 8))(torch.randn(1, 16))
    assert "rewrite_failed" not in COUNTERS["opara"]


def test_tracing_once_more_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[bool] = []

    def restart(*args: Any, **kwargs: Any) -> Any:
        times.append(True)
        raise upstream.RestartAnalysis

    monkeypatch.setattr(upstream, "compile_fx", restart)
    with pytest.raises(upstream.RestartAnalysis):
        backend.opara(torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(2)])
    assert times == [True]


def test_a_number_that_must_be_a_constant_is_compiled_once_more_and_not_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo made it a tensor, and restarts through the backend."""
    model, compile_fx = nn.Linear(16, 8), upstream.compile_fx
    restarts: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return compile_fx(*args, **kwargs)
        except upstream.RestartAnalysis:
            restarts.append(True)
            raise

    def scaled(x: Tensor, factor: float) -> Tensor:
        return torch.full((2,), factor).sum() * model(x)

    monkeypatch.setattr(upstream, "compile_fx", watched)
    call = torch.compile(scaled, backend="opara", dynamic=True)
    for factor in (0.5, 0.75, 1.25):
        x = torch.randn(1, 16)
        torch.testing.assert_close(call(x, factor), scaled(x, factor))
    assert restarts == [True]
    assert "rewrite_failed" not in COUNTERS["opara"]
