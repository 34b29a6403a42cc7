"""What is left of a compiled model: nothing once it is gone, and nothing of a step that failed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend import fallback
from opara_backend.execution import candidates, cuda_graph, host, lane, race
from opara_backend.execution.runtime import Runtime
from opara_backend.fallback import FallbackReason
from opara_backend.report.record import collect
from opara_backend.scheduling.workspaces import is_product
from tests.soak import with_own_code


class Branches(nn.Module):
    def __init__(self, size: int = 512) -> None:
        super().__init__()
        self.chains = nn.ModuleList(nn.Sequential(nn.Linear(size, size), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x + i) for i, chain in enumerate(self.chains)], 1).softmax(1)


def settled() -> tuple[int, int]:
    """Bytes reserved and allocated once everything that can be freed is."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    stats = torch.cuda.memory_stats()
    return stats["reserved_bytes.all.current"], stats["allocated_bytes.all.current"]


@pytest.fixture
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps log records, as pytest does, keeps their tracebacks, and so what the frames of those hold."""
    monkeypatch.setattr(fallback.log, "log", lambda *args, **kwargs: None)


def left_over() -> list[tuple[Any, ...]]:
    """Segments the allocator still holds: pool, stream, bytes, bytes in use."""
    found: list[Any] = [
        (s["segment_pool_id"], s["stream"], s["total_size"], s["allocated_size"]) for s in torch.cuda.memory_snapshot()
    ]
    for tensor in [o for o in gc.get_objects() if isinstance(o, Tensor) and o.is_cuda]:
        for holder in gc.get_referrers(tensor):
            frame = getattr(holder, "f_code", None)
            outer = [type(h).__name__ + str(getattr(h, "f_code", ""))[:90] for h in gc.get_referrers(holder)][:4]
            found.append((tuple(tensor.shape), type(holder).__name__, str(frame)[:90], outer))
    return found


def use(calls: int = 3, **options: Any) -> None:
    """Compile, call and drop a model; its results are checked."""
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    with torch.inference_mode():
        call = torch.compile(model, backend="opara", options=options)
        for _ in range(calls):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)


def test_fifty_models_come_and_go() -> None:
    use()
    before = settled()
    for _ in range(50):
        use(candidates=2, search_seconds=0.0)
        torch._dynamo.reset()
    assert settled() <= before, left_over()


def test_the_model_is_freed_with_its_captures() -> None:
    use()
    before = settled()
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        for _ in range(3):
            call(x)
    del call, model, x
    assert settled() <= before, left_over()


def test_reset_then_call_again() -> None:
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        for _ in range(3):
            for _ in range(3):
                torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
            torch._dynamo.reset()
    assert len(records) == 3
    assert all(r.replays == 2 and not r.fallbacks for r in records)


def test_the_first_call_leaves_nothing_on_the_callers_stream() -> None:
    """cuBLAS would keep a workspace of 32 MiB there for a stream that only replays from then on."""
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        call = torch.compile(model, backend="opara", options={"candidates": 2})
        found = [call(x) for _ in range(3)]
    torch.cuda.synchronize()
    held = [s["total_size"] for s in torch.cuda.memory_snapshot() if s["stream"] == stream.cuda_stream]
    assert sum(held) <= 8 * 2**20, held  # outputs, and copies of the input
    with torch.inference_mode():
        torch.testing.assert_close(found, [model(x)] * 3, rtol=1e-3, atol=1e-4)


def test_dropped_models_that_python_has_not_collected_hold_no_graphs() -> None:
    """A class made for one model is part of a reference cycle, and with it all that was compiled for its code."""

    def used() -> None:
        model = with_own_code(Branches()).cuda().eval()
        x = torch.randn(8, 512, device="cuda")
        with torch.inference_mode():
            call = torch.compile(model, backend="opara", options={"candidates": 2, "search_seconds": 0.0})
            for _ in range(3):
                torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)

    used()
    before = settled()[0]
    gc.disable()
    try:
        held = []
        for _ in range(12):
            used()
            held.append(torch.cuda.memory_reserved() - before)
    finally:
        gc.enable()
    assert max(held[6:]) <= 1.5 * max(held[:3]), held


def failing(original: Callable[..., Any], late: bool) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        if late:
            original(*args, **kwargs)
        raise RuntimeError("injected")

    return fail


STEPS: dict[str, tuple[Any, str]] = {
    "static arguments": (lane, "StaticArguments"),
    "profile": (candidates, "profile_on_cuda"),
    "schedules": (Runtime, "schedules"),
    "plan": (Runtime, "plan"),
    "launches": (cuda_graph, "_launch_all"),
    "instantiation": (torch.cuda.CUDAGraph, "instantiate"),
    "search": (race, "seconds_per_replay"),
    "outputs": (lane, "OutputSpec"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_each_step(monkeypatch: pytest.MonkeyPatch, step: str, late: bool, nothing_logged: None) -> None:
    """Every call gives eager's result, the step down is counted once, and nothing is left behind."""
    use()
    before = settled()
    torch._dynamo.utils.counters.clear()
    owner, name = STEPS[step]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), late))
    use()
    assert not torch.cuda.is_current_stream_capturing()
    assert torch._dynamo.utils.counters["opara"][FallbackReason.CAPTURE_FAILED.value] == 1
    torch.randn(4, device="cuda")  # the generator is not stuck in capture
    assert settled() <= before, left_over()
    monkeypatch.undo()
    torch._dynamo.utils.counters.clear()
    use()
    assert not torch._dynamo.utils.counters["opara"]
    assert settled() <= before, left_over()


def test_a_fault_in_the_first_run_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain run is the call itself: its error is the user's to see, and the next call starts over."""
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        with monkeypatch.context() as patched:
            patched.setattr(host, "observe", failing(host.observe, late=True))
            with pytest.raises(RuntimeError, match="injected"):
                call(x)
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    assert records[0].replays == 2
    assert not records[0].fallbacks


def test_interrupted_in_mid_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is passed on, and the model is captured by the next call."""
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    original = cuda_graph._launch_all

    def interrupted(*args: Any) -> Any:
        original(*args)
        raise KeyboardInterrupt

    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        with monkeypatch.context() as patched:
            patched.setattr(cuda_graph, "_launch_all", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call(x)
        assert not torch.cuda.is_current_stream_capturing()
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    assert records[0].replays == 2


@pytest.mark.parametrize("extra", [0, 256])
def test_without_extra_memory_no_products_run_side_by_side(extra: int) -> None:
    """Four chains of products side by side would keep up to four of cuBLAS's workspaces."""
    model, x = Branches().cuda().eval(), torch.randn(8, 512, device="cuda")
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara", options={"extra_memory": extra, "merge_products": False})
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=1e-3, atol=1e-4)
    products = [k for k, kernel in enumerate(records[0].graph.kernels) if is_product(kernel)]
    assert len(products) == 4
    tried = [schedule for found in records[0].candidates.values() for schedule, _ in found]
    used = [len({schedule.stream[k] for k in products}) for schedule in tried]
    assert (max(used, default=1) > 1) == (extra > 0)
