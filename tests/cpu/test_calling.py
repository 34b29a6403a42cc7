"""Ways to call a compiled model: from threads, with gradients, under other options. The results are always eager's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.counting import calls
from opara_backend.execution import runtime
from opara_backend.execution.runtime import Runtime
from opara_backend.report.record import GraphRecord, collect
from opara_backend.scheduling import policies
from opara_backend.scheduling.schedule import Schedule
from tests.arguments import normal, one, two

Agree = Callable[..., list[GraphRecord]]

# --- threads ----------------------------------------------------------------------------------------------------------


def hammer(work: Callable[[int], None], threads: int = 8) -> None:
    """Run `work(number)` in so many threads at once; raise what any of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            start.wait()
            with torch.no_grad():
                work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["one shape", "a shape per thread"])
def test_eight_threads_call_one_model(dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Softmax(1)).eval()
    compiled = torch.compile(model, backend="opara", dynamic=dynamic)
    with torch.no_grad(), collect() as records:
        compiled(normal(0, 6, 8))

    def work(number: int) -> None:
        for call in range(50):
            x = normal(100 * number + call, 4 + number if dynamic else 6, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)

    hammer(work)
    assert len(records) == 1
    assert len(records[0].plans) == (8 if dynamic else 1)


def test_eight_threads_keep_their_own_state() -> None:
    """Each thread writes its own arguments in place."""

    def function(x: Tensor, total: Tensor) -> Tensor:
        total.add_(x @ x)
        return total @ x.sin()

    compiled = torch.compile(function, backend="opara")
    with torch.no_grad():
        compiled(normal(0, 8, 8), torch.zeros(8, 8))

    def work(number: int) -> None:
        ours, theirs = torch.zeros(8, 8), torch.zeros(8, 8)
        for call in range(50):
            x = normal(100 * number + call, 8, 8)
            torch.testing.assert_close(compiled(x, ours), function(x, theirs), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    hammer(work)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_training_goes_to_stock_inductor_and_is_counted() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    twin = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="opara")
    steps = [(m, torch.optim.SGD(m.parameters(), 0.1)) for m in (compiled, twin)]
    losses: list[list[float]] = [[], []]
    with torch._inductor.config.patch(force_disable_caches=True), collect() as records:
        for _ in range(5):
            for (step, optimizer), found in zip(steps, losses, strict=True):
                loss = F.mse_loss(step(normal(0, 32, 8)), normal(1, 32, 1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert torch._dynamo.utils.counters["opara"]["training"] > 0
    assert records == []


def test_gradients_flow_to_an_input() -> None:
    compiled = torch.compile(lambda x: (x @ x).relu().sum(), backend="opara")
    ours, theirs = normal(0, 8, 8).requires_grad_(), normal(0, 8, 8).requires_grad_()
    compiled(ours).backward()
    (theirs @ theirs).relu().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_grad_mode_back_and_forth() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    compiled = torch.compile(model, backend="opara")
    with torch._inductor.config.patch(force_disable_caches=True), collect() as records:
        for call in range(6):
            x = normal(call, 5, 8)
            if call % 2:
                compiled(x).sum().backward()
                ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                model.zero_grad()
                model(x).sum().backward()
                torch.testing.assert_close(ours, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-4)
                model.zero_grad()
            else:
                with torch.no_grad() if call % 4 else torch.inference_mode():
                    actual = compiled(x)
                    assert not actual.requires_grad
                    torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)
    assert records
    assert all(r.plans for r in records)
    assert torch._dynamo.utils.counters["opara"]["training"] > 0


# --- options ----------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Four chains of different length that meet in a concatenation, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.chains = nn.ModuleList(
            nn.Sequential(*(m for _ in range(length) for m in (nn.Linear(16, 16), nn.Tanh())))
            for length in (1, 2, 3, 1)
        )
        self.join = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.join(torch.cat([chain(x) for chain in self.chains], 1)).relu()
        return x


def planned_by(model: nn.Module, options: dict[str, Any]) -> tuple[list[Tensor], Schedule]:
    """Outputs of three calls under `options`, and the schedule that made them."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="opara", options=options)
    with torch.inference_mode(), collect() as records:
        outputs = [compiled(normal(call, 6, 16)) for call in range(3)]
    ((plan, _),) = records[0].plans.values()
    return outputs, plan.schedule


def test_no_policy_order_or_width_changes_a_bit() -> None:
    torch.manual_seed(2)
    model = Branches().eval()
    expected, schedule = planned_by(model, {"policy": "sequential", "launch_order": "program"})
    in_order = tuple(range(len(schedule.order)))
    assert (schedule.streams, schedule.wait_count, schedule.order) == (1, 0, in_order)
    seen = {schedule}
    for options in [
        *({"policy": p, "launch_order": o} for p in policies.policy_names() for o in policies.order_names()),
        {"policy": "opara", "streams": 1},
        {"policy": "opara", "streams": 2},
        {"policy": "auto"},
        {},
    ]:
        outputs, schedule = planned_by(model, options)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0, msg=lambda text, o=options: f"{o}: {text}")
        assert schedule.streams <= options.get("streams", 8)
        seen.add(schedule)
    assert len(seen) > 5, "they are no different"


def test_branches_run_on_several_streams_and_out_of_program_order() -> None:
    model = Branches().eval()
    _, by_turns = planned_by(model, {"policy": "opara"})
    _, as_written = planned_by(model, {"policy": "opara", "launch_order": "program"})
    _, narrow = planned_by(model, {"policy": "opara", "streams": 2})
    assert by_turns.streams >= 4
    assert as_written.streams >= 4
    assert narrow.streams == 2
    assert as_written.order == tuple(range(len(as_written.order)))
    assert by_turns.order != as_written.order
    assert by_turns.wait_count > 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"triton.cudagraphs": True}},
        {"options": {"freezing": True}},
        {"options": {"size_asserts": True, "allow_buffer_reuse": True, "inplace_buffers": True}},
        {"options": {"cuda_graph": False, "copy_outputs": False, "max_captures": 1}},
        {"options": {"max_fusion_size": 1, "epilogue_fusion": False}},
    ],
    ids=str,
)
def test_modes_and_options_of_inductor(chosen: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 16), nn.Softmax(1)).eval()
    compiled = torch.compile(model, backend="opara", **chosen)
    with torch.no_grad(), collect() as records:
        for call in range(3):
            x = normal(call, 5, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert [len(r.plans) for r in records] == [1]
    assert records[0].fallbacks == []


def test_nan_asserts_are_kept_if_asked_for() -> None:
    """Whoever sets this debugging option of Inductor wants the error, not the speed."""
    compiled = torch.compile(lambda x: (x @ x).log() @ x, backend="opara", options={"nan_asserts": True})
    with torch.no_grad():
        compiled(torch.ones(4, 4))
        with pytest.raises(AssertionError):
            compiled(-torch.ones(4, 3) @ torch.ones(3, 4).tril())


def test_inference_mode(agree: Agree) -> None:
    agree(Branches().eval(), one(4, 16), mode=torch.inference_mode)


def test_grad_mode_with_nothing_to_differentiate(agree: Agree) -> None:
    agree(lambda x, y: ((x @ y).relu() @ y, x.cumsum(0) @ y), two(8, 8), mode=torch.enable_grad)


def test_parameters_changed_between_calls_are_seen(agree: Agree) -> None:
    model = Branches().eval()
    twin = Branches().eval()
    compiled = torch.compile(model, backend="opara")
    with torch.no_grad(), collect() as records:
        for call in range(3):
            torch.manual_seed(call)
            new = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
            model.load_state_dict(new)
            twin.load_state_dict(new)
            x = normal(call, 6, 16)
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
        model.join.weight = nn.Parameter(torch.ones(16, 64))
        twin.join.weight = nn.Parameter(torch.ones(16, 64))
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    assert all(r.plans for r in records)


def test_two_models_compiled_from_one_module_are_apart() -> None:
    model = Branches().eval()
    with torch.no_grad(), collect() as records:
        for policy in ("opara", "sequential"):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="opara", options={"policy": policy})
            torch.testing.assert_close(compiled(normal(0, 6, 16)), model(normal(0, 6, 16)), rtol=1e-4, atol=1e-4)
    assert [r.options.policy for r in records] == ["opara", "sequential"]
    assert len({id(r.graph) for r in records}) == 2


def test_of_many_shapes_the_first_that_come_back_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PLANS_KEPT", 2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    compiled = torch.compile(model, backend="opara", dynamic=True)
    with torch.no_grad(), collect() as records:
        for size in (5, 6, 7, 7, 5, 6, 6):
            compiled(torch.ones(size, 8))
    (record,) = records
    assert sorted(number for key in record.plans for number in key if isinstance(number, int)) == [5, 7]
    assert (record.replays, record.other_calls) == (0, 7)


# --- what a call costs ------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Many parameters, one kernel or two."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *self.parts])


def test_torch_calls_no_function_for_each_parameter_on_the_way_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrappers of AOTAutograd and Inductor are asked for nothing that makes them look at arguments one by one."""
    found, result = [], (torch.ones(3),)

    def answer(self: Runtime, args: list[Tensor]) -> tuple[Tensor, ...]:
        args.clear()
        return result

    with torch.no_grad():
        for count in (10, 200):
            torch._dynamo.reset()
            call = partial(torch.compile(Weights(count).eval(), backend="opara"), normal(0, 3))
            call()
            with monkeypatch.context() as replaced:
                replaced.setattr(Runtime, "__call__", answer)
                assert call() is result[0]
                found.append(calls(call))
    assert found[0] == found[1]
