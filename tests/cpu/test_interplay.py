"""The rest of PyTorch around a compiled model: as under stock Inductor.

Everything is made on the default device, so that tests/gpu can run the same on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from opara_backend.report.record import GraphRecord, collect
from tests.arguments import normal, one

Agree = Callable[..., list[GraphRecord]]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(x).relu(), self.right(x).tanh()], 1))


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str) -> None:
    """Entered around the compiled model, or by the model itself; and the calls without it keep full precision."""
    model = Branches().eval()
    device = torch.get_default_device().type

    def inside(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(x)

    def outside(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return function(x)

    call = torch.compile(inside if where == "inside" else model, backend="opara")
    with torch.no_grad():
        for n in range(4):
            x = normal(n, 4, 16)
            found = call(x) if where == "inside" else outside(call, x)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found, outside(model, x), rtol=3e-2, atol=3e-2)
            if where == "outside":
                full = call(x)
                assert full.dtype == torch.float32
                torch.testing.assert_close(full, model(x), rtol=1e-4, atol=1e-4)


def test_profiler_sees_calls_and_changes_none() -> None:
    model = Branches().eval()
    call = torch.compile(model, backend="opara")
    with torch.inference_mode(), collect() as records:
        call(normal(0, 4, 16))
        with torch.profiler.profile() as profiled:
            for n in range(3):
                torch.testing.assert_close(call(normal(n, 4, 16)), model(normal(n, 4, 16)), rtol=1e-4, atol=1e-4)
        call(normal(0, 4, 16))
    assert len(list(profiled.events())) > 3
    assert not records[0].fallbacks


def test_first_call_under_the_profiler() -> None:
    model = Branches().eval()
    call = torch.compile(model, backend="opara")
    with torch.inference_mode(), torch.profiler.profile():
        for n in range(3):
            torch.testing.assert_close(call(normal(n, 4, 16)), model(normal(n, 4, 16)), rtol=1e-4, atol=1e-4)


def test_checkpoint_in_evaluation(agree: Agree) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Branches()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False) + x

    agree(Checkpointed().eval(), one(4, 16))


def test_hooks_on_activations() -> None:
    """Registered before compiling; each runs once per call, on the values of that call."""
    ours, twin = Branches().eval(), Branches().eval()
    twin.load_state_dict(ours.state_dict())
    for model in (ours, twin):
        model.seen = []
        model.left.register_forward_hook(lambda m, args, out: out * 2)
        model.right.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        model.join.register_forward_hook(lambda m, args, out, model=model: model.seen.append(out.sum()))
    call = torch.compile(ours, backend="opara")
    with torch.no_grad():
        for n in range(4):
            torch.testing.assert_close(call(normal(n, 4, 16)), twin(normal(n, 4, 16)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.seen, twin.seen, rtol=1e-4, atol=1e-4)


def test_flex_attention() -> None:
    """A score of one's own and a mask of blocks."""

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def near(score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        return score - 0.1 * (q - k).abs()

    mask = create_block_mask(causal, None, None, 128, 128, device=torch.get_default_device().type)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flex_attention(q, k, v, score_mod=near, block_mask=mask).cumsum(2), q.sin() @ k.mT

    if torch.get_default_device().type == "cpu" and os.environ.get("TORCHINDUCTOR_VEC_ISA_OK") == "0":
        pytest.skip("Inductor's attention for the CPU needs vectors: TORCHINDUCTOR_VEC_ISA_OK=1 tox -e test")
    call = torch.compile(attend, backend="opara", fullgraph=True)
    stock = torch.compile(attend, backend="inductor", fullgraph=True)
    with torch.no_grad():
        for n in range(3):
            q, k, v = (normal(3 * n + i, 1, 2, 128, 32) for i in range(3))
            torch.testing.assert_close(call(q, k, v), stock(q, k, v), rtol=1e-3, atol=1e-3)


def test_one_model_inside_another(agree: Agree) -> None:
    """A part that was compiled for itself, called from a whole that is compiled too."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Branches()
            self.part.compile(backend="opara")
            self.other = Branches()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.part(x)) + x

    whole = Whole().eval()
    call = torch.compile(whole, backend="opara")
    with torch.no_grad():
        for n in range(3):
            x = normal(n, 4, 16)
            expected = whole.other(whole.part.forward(x)) + x
            torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-4)


def test_export_then_compile() -> None:
    model = Branches().eval()
    exported = torch.export.export(model, (normal(0, 4, 16),)).module()
    call = torch.compile(exported, backend="opara")
    with torch.no_grad():
        for n in range(3):
            torch.testing.assert_close(call(normal(n, 4, 16)), model(normal(n, 4, 16)), rtol=1e-4, atol=1e-4)


def test_vmap(agree: Agree) -> None:
    weight = normal(5, 16, 16)
    agree(lambda x: torch.vmap(lambda row: (weight @ row).relu() + row.cumsum(0))(x) @ weight, one(4, 16))
