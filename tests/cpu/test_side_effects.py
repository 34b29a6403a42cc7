"""What a program does beside returning something: it happens once per call, in order, the first call included."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed._functional_collectives import all_reduce

from opara_backend.report.record import GraphRecord, collect
from tests.arguments import Args, normal, one, two

Agree = Callable[..., list[GraphRecord]]

# --- what a program writes --------------------------------------------------------------------------------------------


def test_arguments_are_written_once_per_call(agree: Agree) -> None:
    def function(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        x.add_(1)
        y["a"].mul_(x.sum(0))
        y["b"][1:3] = x[:2] @ x
        torch.sub(x, 1, out=y["c"])
        return (x @ x) + y["a"]

    def make(call: int) -> Args:
        return normal(call, 8, 8), {"a": normal(call, 8, 8), "b": normal(call, 4, 8), "c": torch.empty(8, 8).fill_(3)}

    agree(function, make)


def test_intermediates_are_written_in_place(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        a = x @ x
        b = a.view(4, 16)
        b += 1
        c = a.clone()
        a.relu_()[2] = 5
        c[:, 3].fill_(2).add_(b[0, :8])
        c.index_fill_(0, torch.tensor([1], device=x.device), 4).clamp_(max=6)
        return a @ c, b.sum(1), torch.zeros(8, 8, device=x.device).copy_(c).t_()

    agree(function, one(8, 8))


class State(nn.Module):
    """A counter, a history written by slice, a mean, and a bare tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", torch.zeros(4, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.linear = nn.Linear(8, 8)
        self.scale = torch.full((8,), 0.5)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x).relu()
        self.count += 1
        self.history.copy_(self.history.roll(1, 0))
        self.history[0] = y.mean(0)
        self.mean.lerp_(y.sum(0), 0.25)
        self.scale.mul_(1.5)
        return (y * self.scale) @ self.linear.weight, self.history.sum(1), self.count + 1


def test_state_of_a_module(agree: Agree) -> None:
    agree(State(), one(6, 8), calls=5)


def test_a_buffer_is_returned(agree: Agree) -> None:
    """The module's own memory comes out, so it shows later writes; `agree` holds outputs until the end."""

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sum", torch.zeros(8, 8))

        def forward(self, x: Tensor) -> Any:
            self.sum += x @ x
            return self.sum, self.sum.t()[:4], x.sin() @ self.sum

    agree(Returns(), one(8, 8))


def test_state_is_replaced_by_a_new_tensor(agree: Agree) -> None:
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            before, self.last = self.last, (x @ x).tanh()
            return before @ x + self.last.sum(0)

    agree(Replaces(), one(8, 8), calls=4, records=None)


def test_batch_norm_keeps_running_statistics(agree: Agree) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(72)).train()
    agree(model, lambda call: (normal(call, 4, 3, 5, 5) + call,), calls=4)
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cell_whose_state_is_fed_back(cell: type[nn.Module]) -> None:
    """Outputs come back as inputs of the next call, as eager's do."""
    model = cell(8, 16)
    compiled = torch.compile(model, backend="opara")
    with torch.inference_mode(), collect() as records:
        state = expected = None
        for call in range(4):
            state, expected = compiled(normal(call, 3, 8), state), model(normal(call, 3, 8), expected)
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    assert len(records) == 2, "one without a state, one with"
    assert all(r.plans and not r.fallbacks for r in records)


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_dropout_draws_eagers_numbers(agree: Agree) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 8), nn.Dropout(0.3)).train()
    agree(model, one(16, 8), options={"fallback_random": True}, seed=7)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor itself draws other numbers than eager on the CPU")
def test_order_of_random_draws_is_eagers(agree: Agree) -> None:
    """Branches that draw stay in program order on the one generator, whatever their streams."""

    def function(x: Tensor) -> Any:
        a = torch.rand_like(x) @ x
        b = torch.randn(8, 8, device=x.device) + x
        c = torch.bernoulli(x.sigmoid()) @ b
        drawn = torch.randint(0, 100, (5,), device=x.device)
        return a, b, c, drawn, x.softmax(1).multinomial(2), torch.randperm(6, device=x.device)

    agree(function, one(8, 8), calls=4, options={"fallback_random": True}, seed=3)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor itself draws other numbers than eager on the CPU")
def test_uninitialised_memory_is_filled_in_place(agree: Agree) -> None:
    """Memory that is read, by an operator of the library that fills it, before any kernel wrote it."""

    def function(x: Tensor) -> Any:
        return (
            torch.empty(4, device=x.device).exponential_(),
            torch.empty_like(x).uniform_() @ x,
            x.clone().cauchy_() * 0 + x,
        )

    agree(function, one(8, 8), options={"fallback_random": True}, seed=3)


def test_random_numbers_advance() -> None:
    compiled = torch.compile(lambda x: (torch.rand(4, 4, device=x.device) @ x, F.dropout(x, 0.5)), backend="opara")
    with torch.no_grad(), collect() as records:
        x = torch.eye(4) + 1
        torch.manual_seed(5)
        first = [compiled(x) for _ in range(4)]
        torch.manual_seed(5)
        again = [compiled(x) for _ in range(4)]
    for i, outputs in enumerate(first):
        assert all(not torch.equal(outputs[0], other[0]) for other in first[:i])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert records[0].plans


# --- operators of the user's own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Any:
    """Operators that Inductor knows nothing about."""

    @torch.library.custom_op("opara_tests::halve", mutates_args=())
    def halve(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
        return x / by, x.sum(0)

    @halve.register_fake
    def _(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty(x.shape[1:])

    @torch.library.custom_op("opara_tests::bump", mutates_args=("x",))
    def bump(x: Tensor, y: Tensor) -> None:
        x.add_(y.sum())

    @torch.library.custom_op("opara_tests::bump_and_tell", mutates_args=("x", "z"))
    def bump_and_tell(x: Tensor, y: Tensor, z: list[Tensor]) -> Tensor:
        x.add_(1)
        for tensor in z:
            tensor.mul_(y)
        return x.sum(0)

    @bump_and_tell.register_fake
    def _(x: Tensor, y: Tensor, z: list[Tensor]) -> Tensor:
        return x.new_empty(x.shape[1:])

    @torch.library.custom_op("opara_tests::refuse", mutates_args=())
    def refuse(x: Tensor) -> Tensor:
        if x.min() < 0:
            raise ArithmeticError("negative")
        return x.sqrt()

    @refuse.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return torch.ops.opara_tests


def test_operators_with_ordered_effects_keep_their_order() -> None:
    """Order is their only dependency: none touches what another wrote."""
    said: list[int] = []

    @torch.library.custom_op("opara_tests::say", mutates_args=())
    def say(x: Tensor, number: int) -> Tensor:
        said.append(number)
        return x.clone()

    @say.register_fake
    def _(x: Tensor, number: int) -> Tensor:
        return torch.empty_like(x)

    _register_effectful_op("opara_tests::say", _EffectType.ORDERED)

    def function(x: Tensor) -> Any:
        ops = torch.ops.opara_tests
        return ops.say(x, 1) @ x, ops.say((x @ x) @ x, 2), ops.say(x + 1, 3).cumsum(0), ops.say(x, 4)

    compiled = torch.compile(function, backend="opara", fullgraph=True)
    with torch.no_grad():
        for call in range(3):
            compiled(normal(call, 8, 8))
    assert said == [1, 2, 3, 4] * 3


def test_collectives_are_made_in_program_order(tmp_path: Path) -> None:
    """On every rank in the same: what one sums is another's other tensor else. None waits for another's result."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:

        def function(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            group = torch.distributed.group.WORLD
            return all_reduce(x @ u, "sum", group) + 1, all_reduce(x @ v, "sum", group) + 1

        compiled = torch.compile(function, backend="opara", fullgraph=True)
        given = [normal(seed, 4, 4) for seed in range(3)]
        with torch.no_grad(), collect() as records:
            for found, expected in zip(compiled(*given), function(*given), strict=True):
                torch.testing.assert_close(found, expected)
        (graph,) = (record.graph for record in records)
    finally:
        torch.distributed.destroy_process_group()
    made = [index for index, kernel in enumerate(graph.kernels) if "all_reduce" in kernel.call]
    assert len(made) == 2
    assert made[0] in graph.predecessors(made[1])


@pytest.mark.skipif(not hasattr(torch._higher_order_ops, "print"), reason="this torch has no such operator")
def test_higher_order_operators_with_ordered_effects_keep_their_order(capfd: pytest.CaptureFixture[str]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = ((x @ x) @ x) @ x
        torch._higher_order_ops.print("said {}", 1)
        z = x + 1
        torch._higher_order_ops.print("said {}", 2)
        torch._higher_order_ops.print("said {}", 3)
        return y, z

    compiled = torch.compile(function, backend="opara", fullgraph=True)
    with torch.no_grad():
        for call in range(3):
            compiled(normal(call, 8, 8))
    assert [int(line.split()[1]) for line in capfd.readouterr().out.splitlines() if "said" in line] == [1, 2, 3] * 3


def test_operator_calls_the_compiled_model_it_is_part_of() -> None:
    """In a thread of its own: what should not happen is that it waits for itself."""

    @torch.library.custom_op("opara_tests::again", mutates_args=())
    def again(x: Tensor, times: int) -> Tensor:
        with torch.no_grad():
            return compiled(x * 0.5, times - 1) if times else x.clone()

    @again.register_fake
    def _(x: Tensor, times: int) -> Tensor:
        return torch.empty_like(x)

    def function(x: Tensor, times: int) -> Tensor:
        return torch.ops.opara_tests.again(x @ x, times) + x.cumsum(0)

    def expected(x: Tensor, times: int) -> Tensor:
        y = x @ x
        return (expected(y * 0.5, times - 1) if times else y) + x.cumsum(0)

    compiled = torch.compile(function, backend="opara", dynamic=True)
    x = normal(0, 4, 4)  # here: threads do not see the default device
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.extend(compiled(x, 3) for _ in range(4))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(240)
    assert len(found) == 4, "the call never came back"
    for result in found:
        torch.testing.assert_close(result, expected(x, 3), rtol=1e-4, atol=1e-5)


def test_pure_custom_operator(agree: Agree, library: Any) -> None:
    def function(x: Tensor) -> Any:
        half, total = library.halve(x @ x, 2.0)
        return half @ x, total + 1, library.halve(x, 4.0)[0]

    agree(function, one(8, 8))


def test_custom_operator_that_writes_its_arguments(agree: Agree, library: Any) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        a = x @ y
        b = a.sin()
        library.bump(a, y)
        c = a.cos()
        library.bump(y, c)
        told = library.bump_and_tell(c, a, [b, x])
        return a, b @ c, told, c.relu()

    agree(function, two(8, 8), calls=4)


def test_custom_operator_with_a_python_body_is_called_once_per_call() -> None:
    calls: list[float] = []

    @torch.library.custom_op("opara_tests::count", mutates_args=("x",))
    def count(x: Tensor) -> None:
        calls.append(x.sum().item())
        x.add_(1)

    def function(x: Tensor) -> Tensor:
        torch.ops.opara_tests.count(x)
        return x @ x

    compiled = torch.compile(function, backend="opara")
    with torch.no_grad():
        x = torch.zeros(2, 2)
        for _ in range(3):
            compiled(x)
    assert calls == [0.0, 4.0, 8.0]


def test_kernel_that_raises_leaves_the_model_usable(library: Any) -> None:
    def function(x: Tensor) -> Tensor:
        return (library.refuse(x.t().contiguous()) @ x).cumsum(0) + library.refuse(x + 1)

    compiled = torch.compile(function, backend="opara")
    good, bad = normal(0, 8, 8).abs(), normal(0, 8, 8)
    with torch.no_grad(), collect() as records:
        for x in (bad, good, bad, good, bad, good):
            if x is bad:
                with pytest.raises(ArithmeticError, match="negative"):
                    compiled(x)
            else:
                torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-4)
    assert records[0].plans
