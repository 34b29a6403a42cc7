"""Kernels of the user's own inside a captured graph: Triton, and operators that launch what they like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opara_backend.report.record import collect

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def scaled_sum(x, y, out, scale, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(x + at, mask=inside) + scale * tl.load(y + at, mask=inside)
    tl.store(out + at, total, mask=inside)


@triton.jit
def increment(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < count) + 1, mask=at < count)


def test_triton_kernels() -> None:
    """One that writes a new tensor and one that writes its argument in place, beside kernels of Inductor's."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        scaled_sum[(triton.cdiv(x.numel(), 64),)](x, y, out, 0.5, x.numel(), BLOCK=64)
        z = (x @ y).relu()
        increment[(triton.cdiv(z.numel(), 64),)](z, z.numel(), BLOCK=64)
        return out @ z, z.cumsum(0)

    def expected(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = (x @ y).relu() + 1
        return (x + 0.5 * y) @ z, z.cumsum(0)

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True)
        for n in range(4):
            x, y = (torch.randn(16, 16, device="cuda", generator=_seeded(2 * n + i)) for i in range(2))
            torch.testing.assert_close(call(x, y), expected(x, y), rtol=1e-3, atol=1e-3)
    assert records[0].replays == 3
    assert not records[0].fallbacks


def test_a_custom_operator_that_launches_a_triton_kernel() -> None:
    @torch.library.custom_op("opara_gpu_tests::bump", mutates_args=("x",))
    def bump(x: Tensor) -> None:
        increment[(triton.cdiv(x.numel(), 64),)](x, x.numel(), BLOCK=64)

    def function(x: Tensor, y: Tensor) -> Tensor:
        z = x @ y
        bump(z)
        return z.relu() @ y

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True)
        for n in range(4):
            x, y = (torch.randn(16, 16, device="cuda", generator=_seeded(2 * n + i)) for i in range(2))
            torch.testing.assert_close(call(x, y), ((x @ y) + 1).relu() @ y, rtol=1e-3, atol=1e-3)
    assert records[0].replays == 3


def test_a_custom_operator_with_streams_of_its_own() -> None:
    """It forks a stream and joins it again, which capture must follow (pytorch#180396)."""

    @torch.library.custom_op("opara_gpu_tests::forked", mutates_args=())
    def forked(x: Tensor) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            half = x * 0.5
        torch.cuda.current_stream().wait_stream(side)
        return half + 1

    @forked.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (forked(x @ y) @ y).relu() + (y @ x).tanh()

    def expected(x: Tensor, y: Tensor) -> Tensor:
        return (((x @ y) * 0.5 + 1) @ y).relu() + (y @ x).tanh()

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True)
        for n in range(4):
            x, y = (torch.randn(16, 16, device="cuda", generator=_seeded(2 * n + i)) for i in range(2))
            torch.testing.assert_close(call(x, y), expected(x, y), rtol=1e-3, atol=1e-3)
    assert records[0].replays == 3


def test_calls_inside_a_graph_of_the_users_own() -> None:
    """Somebody else captures: our kernels go into their graph, one by one."""
    weight = torch.randn(16, 16, device="cuda")
    with torch.no_grad():
        call = torch.compile(lambda x: (x @ weight).relu() @ weight, backend="opara")
        x = torch.randn(16, 16, device="cuda")
        for _ in range(3):
            call(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(x)
        for n in range(3):
            x.copy_(torch.randn(16, 16, device="cuda", generator=_seeded(n)))
            graph.replay()
            torch.testing.assert_close(found, (x @ weight).relu() @ weight, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(call(x), found, rtol=1e-3, atol=1e-3)


def _seeded(n: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(n)


def test_custom_operators_share_what_no_argument_shows() -> None:
    """One writes a workspace that another reads, and keeps its argument until the other has read that, too."""
    workspace, kept = torch.zeros(64, 64, device="cuda"), list[Tensor]()

    @torch.library.custom_op("opara_gpu_tests::put", mutates_args=())
    def put(x: Tensor) -> Tensor:
        workspace.copy_(x)
        kept.append(x)
        return x * 2

    @torch.library.custom_op("opara_gpu_tests::get", mutates_args=())
    def get(x: Tensor) -> Tensor:
        return x + workspace + kept.pop()

    for operator in (put, get):
        operator.register_fake(torch.empty_like)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = put(((x @ x).sin() @ x).cos())
        second = get((x + 1).tanh())
        third = put((x - 1).tanh())
        fourth = get(((x @ x).cos() @ x).sin())
        y = x
        for _ in range(6):
            y = (y @ x).tanh()
        return first, second, third, fourth, y

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True, options={"remember": False})
        for n in range(5):
            x = torch.randn(64, 64, device="cuda", generator=_seeded(n)) / 8
            torch.testing.assert_close(call(x), function(x), rtol=1e-3, atol=1e-3)
    assert records[0].replays == 4
    assert not records[0].fallbacks
