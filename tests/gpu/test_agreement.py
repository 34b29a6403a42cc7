"""Real models and small programs on the GPU: captured on streams, equal to eager, in fp32 and fp16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import models
from opara_backend.report.record import GraphRecord, collect

TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2}  # relative L2; eager and Inductor may both use tf32


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().double()]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in flat(part)]


def assert_agrees(found: Any, expected: Any, dtype: torch.dtype) -> None:
    for f, e in zip(flat(found), flat(expected), strict=True):
        assert f.shape == e.shape
        assert float((f - e).norm()) <= TOLERANCE[dtype] * max(float(e.norm()), 1e-6)


def assert_captured(records: list[GraphRecord], *, streams: int = 1) -> None:
    assert records
    for record in records:
        assert not record.fallbacks, [str(f) for f in record.fallbacks]
        assert record.plans
        assert all(captured for _, captured in record.plans.values())
    assert max(plan.schedule.streams for r in records for plan, _ in r.plans.values()) >= streams


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.cuda().to(dtype) if value.is_floating_point() else value.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "deepfm", "bert_base", "t5_small", "moe_decode"])
def test_model(name: str, dtype: torch.dtype) -> None:
    entry = models.get(name)
    model = entry.build().cuda().to(dtype).eval()
    first = tuple(cast(x, dtype) for x in entry.inputs(1))
    other = tuple(x * 0.5 if x.is_floating_point() else x for x in first)
    with torch.inference_mode(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options={"policy": "opara"})
        for inputs in (first, first, other, first):
            assert_agrees(call(*inputs), model(*inputs), dtype)
    assert_captured(records, streams=2)


class SeveralOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 16), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, b = self.left(x).relu(), self.right(x).sigmoid()
        values, indices = torch.topk(b, 4)
        return a, values, indices, b.view(-1)[:10], a.t()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor], scale: float) -> dict[str, Any]:
        a = self.one(pair[0]) + named["x"] * scale
        return {"sum": a.tanh(), "rest": [self.two(pair[1]).relu(), named["y"].cumsum(0)]}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        self.count += 1
        self.cache.index_copy_(0, self.count.remainder(4).view(1), x[:1])
        out.mul_(2).add_(x)
        y = x.clone()
        y[:, 2:4].relu_()
        y += self.norm(x)
        return y * self.cache.sum()


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        torch._dynamo.graph_break()
        return self.two(x).relu() + self.one(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
class TestPrograms:
    def check(self, module: nn.Module, arguments: list[tuple[Any, ...]], dtype: torch.dtype, **how: Any) -> Any:
        module = module.cuda().to(dtype).eval()
        with torch.no_grad(), collect() as records:
            call = torch.compile(module, backend="opara", **how)
            for inputs in arguments:
                for _ in range(3):
                    assert_agrees(call(*inputs), module(*inputs), dtype)
        return records

    def test_several_outputs(self, dtype: torch.dtype) -> None:
        inputs = [(torch.randn(n, 32, device="cuda", dtype=dtype),) for n in (4, 4)]
        assert_captured(self.check(SeveralOutputs(), inputs, dtype))

    def test_tuple_and_dict_inputs(self, dtype: torch.dtype) -> None:
        a, b, x, y = (torch.randn(4, 8, device="cuda", dtype=dtype) for _ in range(4))
        assert_captured(self.check(Nested(), [((a, b), {"x": x, "y": y}, 0.5)], dtype))

    def test_graph_break(self, dtype: torch.dtype) -> None:
        records = self.check(Broken(), [(torch.randn(4, 8, device="cuda", dtype=dtype),)], dtype)
        assert len(records) == 2
        assert_captured(records)

    def test_dynamic_sizes_share_one_lowering(self, dtype: torch.dtype) -> None:
        inputs = [(torch.randn(n, 32, device="cuda", dtype=dtype),) for n in (4, 7, 12)]
        records = self.check(SeveralOutputs(), inputs, dtype, dynamic=True)
        assert len(records) == 1
        assert len(records[0].plans) == 3
        assert_captured(records)

    def test_state_is_written_once_per_call(self, dtype: torch.dtype) -> None:
        ours, twin = InPlace().cuda().to(dtype), InPlace().cuda().to(dtype)
        with torch.no_grad(), collect() as records:
            call = torch.compile(ours, backend="opara")
            for _ in range(6):
                x = torch.randn(4, 8, device="cuda", dtype=dtype)
                mine, eager = torch.ones_like(x), torch.ones_like(x)
                assert_agrees(call(x, mine), twin(x, eager), dtype)
                assert_agrees(mine, eager, dtype)
                for (name, found), (_, expected) in zip(ours.named_buffers(), twin.named_buffers(), strict=True):
                    assert found.dtype == expected.dtype, name
                    assert_agrees(found, expected, dtype)
        assert_captured(records)
