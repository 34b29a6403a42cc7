"""Wrong options, strange tensors and graphs we cannot rewrite: the right error, or stock Inductor's result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.fallback import FallbackReason, OparaFallbackError
from opara_backend.kernel_graph import KernelGraph
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.sorting import Sorter, Unsupported
from opara_backend.report.record import GraphRecord, collect

Agree = Callable[..., list[GraphRecord]]


def square(x: Tensor) -> Tensor:
    return (x @ x).relu() @ x + x.sum(0)


def normal(call: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(call))


def causes(error: BaseException | None) -> list[BaseException]:
    """The exception and everything it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def no_caches() -> dict[str, Any]:
    """What is broken on purpose must not come from a cache, nor go there."""
    return {"force_disable_caches": True}


def counted() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["opara"])


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"streams": "8"}, ("'streams'", "type int", "'8' of type str")),
        ({"streams": True}, ("'streams'", "type int", "True of type bool")),
        ({"streams": 2.0}, ("'streams'", "type int", "2.0 of type float")),
        ({"streams": 0}, ("'streams'", "takes 1 to 128, got 0")),
        ({"streams": -1}, ("'streams'", "takes 1 to 128, got -1")),
        ({"streams": 129}, ("'streams'", "takes 1 to 128, got 129")),
        ({"max_captures": 0}, ("'max_captures'", "takes 1 to 4096, got 0")),
        ({"cuda_graph": 1}, ("'cuda_graph'", "type bool", "1 of type int")),
        ({"copy_outputs": None}, ("'copy_outputs'", "type bool", "None of type NoneType")),
        ({"policy": 3}, ("'policy'", "type str", "3 of type int")),
        ({"policy": "opera"}, ("'policy'", "got 'opera'; did you mean 'opara'?")),
        ({"policy": "sequentiel"}, ("did you mean 'sequential'?",)),
        ({"policy": ""}, ("'policy'", "takes one of ", "sequential", "got ''")),
        ({"launch_order": "programme"}, ("did you mean 'program'?",)),
        ({"fallback": "ignore"}, ("takes one of warn, error, got 'ignore'",)),
        ({"polcy": "opara"}, ("unknown option 'polcy'", "did you mean 'policy'?")),
        ({"max_autotone": True}, ("did you mean 'max_autotune'?",)),
        ({"": 1}, ("unknown option ''",)),
        ({"max_fusion_size": "many"}, ("'max_fusion_size'", "int", "'many' of type str")),
        ({"max_autotune": "yes"}, ("'max_autotune'", "bool", "'yes' of type str")),
    ],
    ids=str,
)
def test_wrong_option_is_a_value_error_that_helps(given: dict[str, Any], said: tuple[str, ...]) -> None:
    compiled = torch.compile(square, backend="opara", options=given)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(torch.eye(3))
    assert isinstance(caught.value.inner_exception, ValueError)
    assert [words for words in said if words not in str(caught.value)] == []


def test_nothing_of_a_wrong_option_stays_behind(agree: Agree) -> None:
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(square, backend="opara", options={"streams": 1, "max_fusion_size": 2, "oops": 1})(torch.eye(3))
    torch._dynamo.reset()
    (record,) = agree(square, lambda call: (normal(call, 4, 4),))
    assert record.options.streams > 1


def test_unknown_mode() -> None:
    compiled = torch.compile(square, backend="opara", mode="fastest")
    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"unknown mode 'fastest'.*max-autotune"),
    ):
        compiled(torch.eye(3))


def test_mode_and_options_together_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(square, backend="opara", mode="default", options={"policy": "opara"})


# --- the ladder -------------------------------------------------------------------------------------------------------


def test_error_on_request_names_the_reason() -> None:
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="opara", options={"fallback": "error"})
    disabled = torch._inductor.config.patch(no_caches())
    with (
        disabled,
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"training: .*torch\.no_grad\(\)") as caught,
    ):
        compiled(torch.ones(2, 4))
    (step,) = (e.fallback for e in causes(caught.value) if isinstance(e, OparaFallbackError))
    assert step.reason is FallbackReason.TRAINING
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(2, 4)), model(torch.ones(2, 4)))


@pytest.mark.parametrize("by", ["options", "config"])
def test_option_that_changes_the_kind_of_wrapper(by: str, caplog: pytest.LogCaptureFixture) -> None:
    given = {"cpp_wrapper": True}
    changed = {**no_caches(), **(given if by == "config" else {})}
    patched = torch._inductor.config.patch(changed)
    with torch.no_grad(), collect() as records, patched, caplog.at_level(logging.WARNING, "opara_backend"):
        compiled = torch.compile(square, backend="opara", options=given if by == "options" else None)
        for call in range(2):
            torch.testing.assert_close(compiled(normal(call, 4, 4)), square(normal(call, 4, 4)), rtol=1e-4, atol=1e-4)
    assert records == []
    assert counted() == {"unsupported_option": 1}
    assert "unsupported_option: cpp_wrapper" in caplog.text


def test_freezing_asked_for_too_late_is_said_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo reads the configuration while it traces; with the option alone parameters would be copied every call."""
    model = torch.nn.Linear(4, 4).eval()
    with torch.no_grad(), collect() as records, caplog.at_level(logging.WARNING, "opara_backend"):
        compiled = torch.compile(model, backend="opara", options={"freezing": True})
        torch.testing.assert_close(compiled(torch.ones(2, 4)), model(torch.ones(2, 4)))
    assert "set torch._inductor.config.freezing before the first call" in caplog.text
    assert len(records) == 1


def test_freezing_asked_for_in_time() -> None:
    """On a CPU frozen weights are laid out anew by libraries, and have no memory that torch can see."""
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3))
    model, x = convolutions.eval(), normal(0, 1, 3, 16, 16)
    with torch.no_grad(), collect() as records, torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, backend="opara")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    assert not [step for record in records for step in record.fallbacks]
    assert not any("batch_norm" in kernel.call for kernel in records[0].graph.kernels)


def refuse(*arguments: Any, **keywords: Any) -> Any:
    raise Unsupported("a line from the future")


def fail(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("a bug of ours")


BROKEN = [
    (Sorter, "sort", refuse, "a line from the future"),
    (Sorter, "sort", fail, "RuntimeError: a bug of ours"),
    (ProgramWriter, "launch", refuse, "a line from the future"),
    (ProgramWriter, "graph", fail, "RuntimeError: a bug of ours"),
    (ProgramWriter, "body", fail, "RuntimeError: a bug of ours"),
    (KernelGraph, "verify", fail, "RuntimeError: a bug of ours"),
    (KernelGraph, "to_json", fail, "RuntimeError: a bug of ours"),
]


@pytest.mark.parametrize(
    ("owner", "method", "broken", "said"), BROKEN, ids=[f"{m}-{b.__name__}" for _, m, b, _ in BROKEN]
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_what_we_cannot_lower_is_stock_inductors(
    owner: type,
    method: str,
    broken: Callable[..., Any],
    said: str,
    dynamic: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        values, order = (x @ x.t()).sort(dim=1)
        return torch.cat([values.relu(), x], 1), order + 1

    monkeypatch.setattr(owner, method, broken)
    with (
        torch._inductor.config.patch(no_caches()),
        torch.no_grad(),
        collect() as records,
        caplog.at_level(logging.WARNING, "opara_backend"),
    ):
        compiled = torch.compile(function, backend="opara", dynamic=dynamic)
        for call in range(3):
            x = normal(call, 5 + call * dynamic, 4)
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-4)
    assert records == []
    assert counted() == {"unsupported_lowering": 1}
    assert said in caplog.text


def test_error_on_request_when_lowering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sorter, "sort", refuse)
    compiled = torch.compile(square, backend="opara", options={"fallback": "error"})
    with (
        torch._inductor.config.patch(no_caches()),
        torch.no_grad(),
        pytest.raises(Exception, match="unsupported_lowering: a line from the future") as caught,
    ):
        compiled(torch.eye(3))
    assert any(isinstance(e, OparaFallbackError) for e in causes(caught.value))


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_pass_through_as_in_eager(agree: Agree) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model[3].weight[2] = torch.nan
        model[3].bias[4] = torch.inf

    def make(call: int) -> tuple[Tensor]:
        x = normal(call, 5, 8)
        x[call] = (torch.nan, torch.inf, -torch.inf)[call]
        return (x,)

    agree(model, make)


def outcome(function: Callable[..., Any], backend: str, arguments: tuple[Any, ...]) -> Any:
    """What calling twice gives: tensors as device, size and value, or the exception's type."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    found: list[Any] = []
    with torch.no_grad():
        for _ in range(2):
            try:
                result = compiled(*arguments)
            except Exception as error:
                found.append(type(error).__name__)
            else:
                value = "unknown" if result.device.type == "meta" else result.tolist()
                found.append((result.device.type, tuple(result.shape), value))
    return found


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


STRANGE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "all on meta": (square, (meta(4, 4),)),
    "meta and cpu apart": (lambda x, y: (x @ x) @ x + y.to("cpu").shape[0], (torch.eye(4), meta(4, 4))),
    "meta and cpu mixed": (lambda x, y: x @ y, (torch.eye(4), meta(4, 4))),
    "meta made inside": (
        lambda x: torch.empty(4, 4, device="meta") @ torch.empty(4, 4, device="meta"),
        (torch.eye(4),),
    ),
    "wrong sizes": (lambda x, y: x @ y, (torch.ones(2, 3), torch.ones(2, 3))),
    "wrong types": (lambda x, y: x @ y, (torch.eye(2), torch.eye(2).long())),
    "index out of range": (lambda x, i: (x[i] * 2).sum(0) @ x, (torch.eye(3), torch.tensor([1, 7]))),
    "a model on meta": (nn.Linear(4, 4, device="meta"), (torch.eye(4),)),
    "sparse": (lambda x, y: (x @ y).relu() + y, (torch.eye(3).to_sparse(), torch.eye(3))),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_tensors_meet_what_stock_inductor_does(name: str) -> None:
    function, arguments = STRANGE[name]
    assert outcome(function, "opara", arguments) == outcome(function, "inductor", arguments)


def test_calling_with_other_arguments_than_before() -> None:
    """Other types, dimensions, layouts and numbers of arguments: guards see to it, and we plan anew."""

    def function(x: Tensor, y: Tensor | None = None) -> Tensor:
        return (x @ x).relu() + (x if y is None else y)

    compiled = torch.compile(function, backend="opara")
    arguments: list[tuple[Tensor, ...]] = [
        (torch.eye(3),), (torch.eye(3).double(),), (torch.eye(3).t(),), (torch.eye(4)[:, ::2][::2],),
        (torch.eye(3), torch.ones(3)), (torch.eye(3), torch.eye(3)), (torch.ones(2, 3, 3),), (torch.eye(3),),
    ]  # fmt: skip
    with torch.no_grad(), collect() as records:
        for given in arguments * 2:
            torch.testing.assert_close(compiled(*given), function(*given))
    assert all(r.plans and not r.fallbacks for r in records)
