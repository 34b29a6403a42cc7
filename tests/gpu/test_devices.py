"""What lies across devices: the CPU in the middle of a GPU graph, another GPU, a GPU that is full."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend import fallback
from opara_backend.execution import cuda_graph
from opara_backend.fallback import FallbackReason
from opara_backend.report.record import GraphRecord, collect


class Branches(nn.Module):
    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.chains = nn.ModuleList(nn.Sequential(nn.Linear(size, size), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x + i) for i, chain in enumerate(self.chains)], 1).softmax(1)


def reasons(records: list[GraphRecord]) -> list[FallbackReason]:
    return [f.reason for r in records for f in r.fallbacks]


def called(function: Callable[[Tensor], Any], **settings: bool) -> list[GraphRecord]:
    """What four calls of `function`, compiled with Dynamo's `settings`, leave on record; they agree with eager."""
    with torch._dynamo.config.patch(settings), torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True)
        for n in range(4):
            x = torch.randn(8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(n))
            torch.testing.assert_close(call(x), function(x), rtol=1e-3, atol=1e-3)
    return records


def test_item_in_the_middle() -> None:
    def function(x: Tensor) -> tuple[Tensor, int]:
        biggest = (x @ x).argmax().item()
        return (x * biggest).cumsum(1) @ x, biggest

    assert reasons(called(function, capture_scalar_outputs=True)) == [FallbackReason.HOST_DECISION]


def test_a_size_only_the_data_knows() -> None:
    def function(x: Tensor) -> Any:
        kept = x[x > 0]
        return kept.sum(), (x > 0).nonzero().sum(0), (x @ x).relu()

    assert reasons(called(function, capture_dynamic_output_shape_ops=True)) == [FallbackReason.HOST_DECISION]


def test_operators_on_the_cpu_in_the_middle() -> None:
    model = Branches(64).cuda().eval()

    def mixed(x: Tensor) -> Tensor:
        y = model(x)
        z = (y.cpu().double().sin() * 2).float()
        return model(x + z.cuda().sum()) + y

    with torch.inference_mode(), collect() as records:
        call = torch.compile(mixed, backend="opara", fullgraph=True)
        for _ in range(4):
            x = torch.randn(8, 64, device="cuda")
            torch.testing.assert_close(call(x), mixed(x), rtol=1e-3, atol=1e-4)
    assert set(reasons(records)) <= {FallbackReason.HOST_KERNEL}


@pytest.fixture
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps log records, as pytest does, keeps their tracebacks, and so what the frames of those hold."""
    monkeypatch.setattr(fallback.log, "log", lambda *args, **kwargs: None)


def test_out_of_memory_during_capture(monkeypatch: pytest.MonkeyPatch, nothing_logged: None) -> None:
    """Nothing of the capture stays, the model goes on uncaptured, and other models are captured as before."""
    model, x = Branches().cuda().eval(), torch.randn(8, 256, device="cuda")
    original = cuda_graph._launch_all

    def full(*args: Any) -> Any:
        original(*args)
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with torch.inference_mode():
        model(x)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        monkeypatch.setattr(cuda_graph, "_launch_all", full)
        with collect() as records:
            call = torch.compile(model, backend="opara")
            for _ in range(3):
                torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
        assert reasons(records) == [FallbackReason.OUT_OF_MEMORY]
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + 2**21  # the plan's arena
        monkeypatch.undo()
        torch._dynamo.reset()
        with collect() as records:
            other = torch.compile(model, backend="opara")
            for _ in range(2):
                torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-4)
        assert not reasons(records)


def test_a_gpu_that_is_really_full() -> None:
    """Memory for one plain run, but not for a capture beside it."""

    def function(x: Tensor) -> Tensor:
        y = (x @ x).relu()
        return (torch.cat([y @ y, y.tanh() @ x], 0).softmax(1) @ x).sum(0)

    x = torch.randn(4096, 4096, device="cuda")  # 64 MiB
    expected = function(x)
    call = torch.compile(function, backend="opara")
    total = torch.cuda.get_device_properties(0).total_memory
    with torch.no_grad(), collect() as records:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
        try:
            for _ in range(3):
                torch.testing.assert_close(call(x), expected, rtol=1e-2, atol=1e-2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        torch.testing.assert_close(call(x), expected, rtol=1e-2, atol=1e-2)
    assert set(reasons(records)) <= {FallbackReason.OUT_OF_MEMORY}


def peak_of_first_call(backend: str, function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes above those of `x` at the highest point of the first call, tuned and compiled before."""
    options = {"cuda_graph": False} if backend == "opara" else None  # a capture would clear the library's workspaces
    with torch.no_grad():
        torch._dynamo.reset()
        torch.compile(function, backend=backend, options=options)(x)
        torch._dynamo.reset()
        call = torch.compile(function, backend=backend, options=options)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def test_a_plain_run_needs_no_more_memory_than_stock_inductor() -> None:
    """Buffers are there from the first kernel that touches them to the last."""

    def chain(x: Tensor) -> Tensor:
        for _ in range(8):
            x = torch.cat([(x @ x).relu().cumsum(0)[:512], x.softmax(1)[512:]], 0)
        return x

    x = torch.randn(1024, 1024, device="cuda")
    ours, stock = (peak_of_first_call(backend, chain, x) for backend in ("opara", "inductor"))
    assert ours <= 1.5 * stock


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
def test_a_device_other_than_the_current_one() -> None:
    model, x = Branches().to("cuda:1").eval(), torch.randn(8, 256, device="cuda:1")
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        for _ in range(3):
            found = call(x)
            assert found.device == torch.device("cuda:1")
            torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
    assert not records[0].fallbacks
    assert records[0].replays == 2
    assert torch.cuda.current_device() == 0


@needs_two
def test_two_models_on_two_devices_from_two_threads() -> None:
    models = [Branches().to(f"cuda:{i}").eval() for i in range(2)]
    calls = [torch.compile(m, backend="opara") for m in models]
    with torch.inference_mode():
        for step in range(50):
            for index in range(2):
                x = torch.randn(8, 256, device=f"cuda:{index}")
                torch.testing.assert_close(calls[index](x), models[index](x), rtol=1e-3, atol=1e-4)
            assert torch.cuda.current_device() == 0, step


@needs_two
def test_a_model_moves_to_another_device() -> None:
    model, x = Branches().cuda().eval(), torch.randn(8, 256, device="cuda")
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            model.to(device)
            x = x.to(device)
            for _ in range(3):
                found = call(x)
                assert found.device == torch.device(device)
                torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)


@needs_two
def test_a_graph_over_two_devices_is_not_captured() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x @ x).to("cuda:1").relu() @ y

    x, y = torch.randn(8, 8, device="cuda:0"), torch.randn(8, 8, device="cuda:1")
    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara")
        for _ in range(3):
            torch.testing.assert_close(call(x, y), function(x, y), rtol=1e-3, atol=1e-4)
    assert not any(captured for r in records for _, captured in r.plans.values())


def test_linear_algebra_that_cannot_be_captured_breaks_nobody_else() -> None:
    """A library that fails in capture leaves an error behind, which the next kernel of anyone would report."""
    a = torch.randn(5, 5, device="cuda")
    a = a + a.T
    with torch.no_grad(), collect() as records:
        call = torch.compile(torch.linalg.eigvalsh, backend="opara")
        for _ in range(3):
            torch.testing.assert_close(call(a), torch.linalg.eigvalsh(a), rtol=1e-3, atol=1e-4)
    assert set(reasons(records)) <= {FallbackReason.CAPTURE_FAILED}
