"""What is foretold of the allocator's memory is what it takes: `scheduling.segments`, `scheduling.workspaces`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.execution import candidates, race
from opara_backend.scheduling.segments import Pool
from opara_backend.scheduling.workspaces import Pools, allocations

MIB = 1 << 20


def reserved(pool: Sequence[int]) -> int:
    """Bytes of all segments in a memory pool."""
    segments: Any = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))


@pytest.mark.parametrize("seed", range(8))
def test_segments_are_cut_as_the_allocator_cuts_them(seed: int) -> None:
    rng = random.Random(seed)
    pool, ours = torch.cuda.MemPool(), Pool()
    held: list[tuple[Tensor, Any]] = []
    with torch.cuda.use_mem_pool(pool):
        for _ in range(80):
            if held and rng.random() < 0.45:
                tensor, block = held.pop(rng.randrange(len(held)))
                del tensor
                ours.free(block)
            else:
                nbytes = rng.randrange(1, rng.choice((4096, MIB, 4 * MIB, 12 * MIB, 40 * MIB)))
                held.append((torch.empty(nbytes, dtype=torch.uint8, device="cuda"), ours.allocate(nbytes)))
            assert reserved(pool.id) == ours.reserved
        held.clear()


class Inception(nn.Module):
    """Branches of fused convolutions, whose results cuDNN allocates, and a product in the end."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()

        def convolution(size: int) -> nn.Module:
            inner = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
            return nn.Sequential(inner, nn.BatchNorm2d(channels), nn.ReLU())

        self.branches = nn.ModuleList(nn.Sequential(*(convolution(s) for s in (1, 3, size))) for size in (1, 3, 5))
        self.head = nn.Linear(3 * channels, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([branch(x) for branch in self.branches], 1).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("extra", [0, 256])
def test_a_captured_graph_takes_what_was_foretold(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, extra: int
) -> None:
    """And the candidates of a heat, each in the pool that goes with them, behind what those before it have left."""
    model, x = Inception().cuda().to(dtype).eval(), torch.randn(8, 64, 56, 56, device="cuda", dtype=dtype)
    capture, pools = race.capture_plan, dict[Any, Pools]()
    taken: list[tuple[bool, Any, int, int]] = []
    streams: list[int] = []  # on which anything was allocated so far
    one_by_one: list[int] = []  # bytes that the allocator would reserve, left alone

    def capture_plan(program: Any, plan: Any, arguments: Any, memory: Any, probe: Any = None) -> Any:
        captured = capture(program, plan, arguments, memory, probe)
        kernels, asked = allocations(plan.graph, memory.needed), (plan.schedule, plan.memory.releases)
        pools[captured.pool] = kernels.captured(*asked, pools.get(captured.pool, Pools()), plan.segments)
        foretold = pools[captured.pool].reserved
        taken.append((memory.candidates, captured.pool, foretold, reserved(captured.pool)))
        streams.append(len(pools[captured.pool].of))
        if not memory.candidates:
            assert foretold == sum((plan.pool or {}).values())
            one_by_one.append(kernels.captured(*asked, Pools()).reserved)
        return captured

    for module in (candidates, race):
        monkeypatch.setattr(module, "capture_plan", capture_plan)
    with torch.inference_mode():
        call = torch.compile(model, backend="opara", options={"extra_memory": extra, "remember": False})
        for _ in range(3):
            torch.testing.assert_close(call(x), model(x), rtol=2e-2, atol=2e-2)
    assert len({pool for _, pool, _, _ in taken}) >= 2
    for (_, _, foretold, found), count in zip(taken, streams, strict=True):
        assert foretold <= found <= foretold + 4 * MIB * count
    apart, _, foretold, _ = taken[-1]
    assert not apart, "the last is captured for good"
    assert foretold >= 32 * MIB, "cuBLAS's workspace, and more"
    assert foretold <= one_by_one[0]
    assert len(one_by_one) == 1
