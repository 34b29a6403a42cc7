"""Callers that do not wait for each other: threads, streams, event loops, other models."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.execution import cuda_graph
from opara_backend.execution.streams import private_streams
from opara_backend.fallback import FallbackReason
from opara_backend.report.record import collect

THREADS, CALLS = 16, 1000


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chains = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x + i) for i, chain in enumerate(self.chains)], 1).softmax(1)


@pytest.fixture
def model() -> nn.Module:
    return Model().cuda().eval()


def wrong(found: Tensor, expected: Tensor) -> Tensor:
    """Number of elements off, without waiting for the GPU."""
    return ((found - expected).abs() > 1e-4).sum()


@pytest.mark.parametrize("copy_inputs", [True, False], ids=["own inputs", "one input"])
def test_sixteen_threads_with_streams_of_their_own(model: nn.Module, copy_inputs: bool) -> None:
    """Results are checked on each thread's stream, so that nothing but the backend orders the calls."""
    errors: list[str] = []
    start = threading.Barrier(THREADS)
    shared = torch.randn(8, 32, device="cuda")
    own = [[torch.randn(8, 32, device="cuda") for _ in range(4)] for _ in range(THREADS)]

    def work(index: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                inputs = own[index] if copy_inputs else [shared] * 4
                expected = [model(x) for x in inputs]
                off = torch.zeros((), dtype=torch.int64, device="cuda")
                start.wait()
                for step in range(CALLS):
                    off += wrong(call(inputs[step % 4]), expected[step % 4])
                if int(off):
                    errors.append(f"thread {index}: {int(off)} elements off")
        except BaseException as error:
            errors.append(f"thread {index}: {error!r}")

    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara")
        call(shared)
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert records[0].replays == THREADS * CALLS


def test_captures_in_many_threads_at_once() -> None:
    """Eight models, new shapes all the time: captures, plain runs and replays of all threads are interleaved."""
    errors: list[str] = []
    start = threading.Barrier(8)
    models = [Model().cuda().eval() for _ in range(8)]
    with torch.no_grad(), collect() as records:
        calls = [torch.compile(m, backend="opara", dynamic=True, options={"candidates": 3}) for m in models]
        for call in calls:  # torch itself refuses calls of compiled code while another thread traces
            call(torch.randn(7, 32, device="cuda"))
    torch.cuda.synchronize()

    def work(index: int) -> None:
        numbers = torch.Generator("cuda").manual_seed(index)
        try:
            start.wait()
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for step in range(120):
                    x = torch.randn(2 + step % 12, 32, device="cuda", generator=numbers)
                    if int(wrong(calls[index](x), models[index](x))):
                        errors.append(f"thread {index}, step {step}")
        except BaseException as error:
            errors.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sum(r.replays for r in records) > 100
    assert {f.reason for r in records for f in r.fallbacks} <= {FallbackReason.CAPTURE_LIMIT}


def test_captures_are_made_on_streams_nobody_is_given() -> None:
    """torch deals out 32 streams by turns: a caller's stream may be any of them."""
    dealt = {torch.cuda.Stream().cuda_stream for _ in range(100)}
    private = private_streams(torch.device("cuda", 0), 8)
    assert len({s.cuda_stream for s in private}) == 8
    assert not dealt & {s.cuda_stream for s in private}
    assert private == private_streams(torch.device("cuda", 0), 8)


def test_the_first_call_comes_from_many_threads_at_once(model: nn.Module) -> None:
    """Its kernels are tuned, profiled and captured once, and everybody gets a result."""
    x = torch.randn(8, 32, device="cuda")
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", dynamic=True)
        call(torch.randn(5, 32, device="cuda"))
        expected = model(x)
    start = threading.Barrier(8)

    def first(_: int) -> bool:
        with torch.no_grad():
            start.wait()
            return all(torch.allclose(call(x), expected, rtol=1e-3, atol=1e-4) for _ in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(first, range(8)))
    assert len(records) == 1
    assert len(records[0].plans) == 1


def test_a_call_waits_for_the_one_before_on_another_stream(model: nn.Module) -> None:
    """Both read the same static input: the second may not overwrite it while the first still waits for the GPU."""
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        a, b = torch.randn(8, 32, device="cuda"), torch.randn(8, 32, device="cuda")
        call(a)
        torch.cuda.synchronize()
        one, two = torch.cuda.Stream(), torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(one):
                torch.cuda._sleep(2_000_000)  # about a millisecond
                first = call(a)
            with torch.cuda.stream(two):
                second = call(b)
            torch.cuda.synchronize()
            torch.testing.assert_close(first, model(a), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(second, model(b), rtol=1e-3, atol=1e-4)


def test_two_models_by_turns() -> None:
    models = [Model().cuda().eval() for _ in range(2)]
    with torch.inference_mode():
        calls = [torch.compile(m, backend="opara") for m in models]
        outputs = []
        for step in range(40):
            x = torch.randn(8, 32, device="cuda")
            outputs.append((calls[step % 2](x), models[step % 2](x)))
    for found, expected in outputs:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_event_loop_with_a_thread_pool(model: nn.Module) -> None:
    call = torch.compile(model, backend="opara")

    def infer(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return call(x)

    async def serve(inputs: list[Tensor]) -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(infer, x) for x in inputs))

    inputs = [torch.randn(8, 32, device="cuda") for _ in range(200)]
    infer(inputs[0])  # torch refuses calls while another thread traces, and says that it is FX
    for x, found in zip(inputs, asyncio.run(serve(inputs)), strict=True):
        torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)


def test_other_threads_draw_numbers_while_one_captures(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the model draws none itself; and the numbers drawn are those of the one generator, none twice."""
    original, drawn, errors = cuda_graph._launch_all, [], []

    def draw() -> None:
        try:
            drawn.append(torch.rand(8, device="cuda"))
        except RuntimeError as error:
            errors.append(str(error))

    def launch(*args: Any) -> Any:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        return original(*args)

    monkeypatch.setattr(cuda_graph, "_launch_all", launch)
    torch.manual_seed(5)
    with torch.inference_mode():
        call = torch.compile(model, backend="opara")
        call(torch.ones(8, 32, device="cuda"))
        call(torch.ones(8, 32, device="cuda"))
    assert not errors
    assert drawn
    torch.manual_seed(5)
    for found in drawn:
        torch.testing.assert_close(found, torch.rand(8, device="cuda"), rtol=0, atol=0)


GEMMS_BESIDE_CAPTURES = """
import threading
import torch
from torch import nn
from opara_backend.report.record import collect

THREADS, CAPTURES = 12, 40
rows = [torch.randn(64, 8192, device="cuda", dtype=torch.half) for _ in range(THREADS)]
columns = [torch.randn(8192, 64, device="cuda", dtype=torch.half) for _ in range(THREADS)]
errors, over = [], threading.Event()

def multiply(index):
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            expected = rows[index] @ columns[index]
            while not over.is_set():
                for _ in range(20):
                    found = rows[index] @ columns[index]
                assert float((found - expected).abs().max()) <= 2.0
    except Exception as error:
        errors.append(repr(error))
        over.set()

model = nn.ModuleList(nn.Linear(64, 64) for _ in range(4)).cuda()
x = torch.randn(8, 64, device="cuda")
with torch.inference_mode(), collect() as records:
    call = torch.compile(lambda x: torch.cat([part(x).relu() for part in model], 1), backend="opara")
    call(x)
    threads = [threading.Thread(target=multiply, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for _ in range(CAPTURES):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        call(x), call(x)
        if over.is_set():
            break
    over.set()
    for thread in threads:
        thread.join()
assert not errors, errors[0]
print(sum(record.replays for record in records) >= CAPTURES // 2)
"""


def test_gemms_of_other_threads_keep_their_workspaces_while_this_one_captures() -> None:
    """A process of its own: a GEMM whose workspace was given back to the device leaves CUDA unusable."""
    done = subprocess.run([sys.executable, "-c", GEMMS_BESIDE_CAPTURES], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "True"
