"""State after n calls is eager's after n calls, though profiling, search and capture ran the kernels often."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import models
from opara_backend.execution import cuda_graph
from opara_backend.report.record import collect


class Decoder(nn.Module):
    """One step of attention over a static cache: writes the slot `at`, reads all slots up to it, counts its calls."""

    def __init__(self, size: int = 64, slots: int = 16) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.register_buffer("keys", torch.zeros(1, slots, size))
        self.register_buffer("values", torch.zeros(1, slots, size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        self.keys.index_copy_(1, at, k)
        self.values.index_copy_(1, at, v)
        self.calls += 1
        seen = torch.arange(self.keys.shape[1], device=x.device) <= at
        return self.out(F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen[None, None, :]))


def same_state(ours: nn.Module, twin: nn.Module) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=1e-4)


def test_a_static_cache() -> None:
    ours = Decoder().cuda().eval()
    twin = copy.deepcopy(ours)
    with torch.inference_mode(), collect() as records:
        call = torch.compile(ours, backend="opara", fullgraph=True)
        for step in range(12):
            x, at = torch.randn(1, 1, 64, device="cuda"), torch.tensor([step], device="cuda")
            torch.testing.assert_close(call(x, at), twin(x, at), rtol=1e-3, atol=1e-4)
            same_state(ours, twin)
    assert int(ours.calls) == 12
    assert records[0].replays == 11


def test_a_cache_given_with_the_call() -> None:
    def step(x: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        cache.index_copy_(0, at, (x @ x.t())[:1])
        return cache.cumsum(0) @ x[: cache.shape[1]]

    ours, theirs = torch.zeros(16, 8, device="cuda"), torch.zeros(16, 8, device="cuda")
    with torch.no_grad():
        call = torch.compile(step, backend="opara")
        for n in range(10):
            x, at = torch.randn(8, 8, device="cuda"), torch.tensor([n], device="cuda")
            torch.testing.assert_close(call(x, ours, at), step(x, theirs, at), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_decode_steps_of_a_model() -> None:
    """The Llama-like step of the benchmark set, its cache compared after every token."""
    entry = models.get("llama_decode").reduced()
    ours = entry.build().cuda().eval()
    twin = copy.deepcopy(ours)
    inputs: tuple[Any, ...] = tuple(x.cuda() for x in entry.inputs(1))
    with torch.inference_mode():
        call = torch.compile(ours, backend="opara")
        for _ in range(5):
            torch.testing.assert_close(call(*inputs), twin(*inputs), rtol=1e-3, atol=1e-3)
            same_state(ours, twin)


def test_batch_norm_in_training_mode() -> None:
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).cuda()
    twin = copy.deepcopy(ours)
    with torch.no_grad(), collect() as records:
        call = torch.compile(ours.train(), backend="opara")
        for n in range(5):
            x = torch.randn(4, 3, 8, 8, device="cuda") * (n + 1)
            torch.testing.assert_close(call(x), twin.train()(x), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(dict(ours.state_dict()), dict(twin.state_dict()), rtol=1e-2, atol=1e-3)
    assert records[0].replays == 4


def test_samples_follow_the_distribution_and_never_repeat() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], device="cuda")

    def draw(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.multinomial(x, 20_000, replacement=True), torch.rand_like(x), F.dropout(torch.ones_like(x), 0.5)

    with torch.no_grad(), collect() as records:
        call = torch.compile(draw, backend="opara")
        calls = [call(weights) for _ in range(6)]
    for n, (sampled, uniform, dropped) in enumerate(calls):
        found = torch.bincount(sampled, minlength=4) / sampled.numel()
        torch.testing.assert_close(found, weights, rtol=0, atol=0.02)
        assert set(dropped.tolist()) <= {0.0, 2.0}
        assert all(not torch.equal(sampled, other[0]) for other in calls[:n])
        assert all(not torch.equal(uniform, other[1]) for other in calls[:n])
    assert not records[0].fallbacks


def test_a_seed_repeats_the_same_numbers() -> None:
    x = torch.ones(1000, device="cuda")
    with torch.no_grad():
        call = torch.compile(lambda t: (F.dropout(t, 0.5), torch.rand_like(t) + t), backend="opara")
        call(x)
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append([call(x) for _ in range(4)])
        torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("draws", [False, True])
def test_a_capture_that_fails_takes_no_seed_from_graphs_made_before(
    draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(64, 64, device="cuda")

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    def four() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [call(x) for _ in range(4)]

    with torch.no_grad():
        call = torch.compile(lambda t: F.dropout(t, 0.5) @ t, backend="opara")
        call(x)
        expected = four()
        monkeypatch.setattr(cuda_graph, "_launch_all", fail)
        other = torch.compile(lambda t: (torch.rand_like(t) if draws else t.sin()) @ t, backend="opara")
        other(x)
        assert torch._dynamo.utils.counters["opara"]["capture_failed"] >= 1
        torch.testing.assert_close(four(), expected, rtol=0, atol=0)
        torch.manual_seed(3)
        numbers = torch.rand(8, device="cuda")
        four()
        assert not torch.equal(torch.rand(8, device="cuda"), numbers), "calls and eager draw from one generator"


def test_eager_numbers_are_not_disturbed() -> None:
    """A model that draws nothing leaves the generator alone, however often its kernels are run while searching."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).cuda().eval()
    torch.manual_seed(1)
    expected = torch.rand(4, device="cuda")
    torch.manual_seed(1)
    with torch.no_grad():
        call = torch.compile(model, backend="opara")
        for _ in range(3):
            call(torch.ones(2, 8, device="cuda"))
    torch.testing.assert_close(torch.rand(4, device="cuda"), expected, rtol=0, atol=0)
