"""Operators that nobody but their author knows: they may keep what they are given, and share what no argument shows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opara_backend.kernel_graph import HIDDEN_STATE, KernelGraph
from opara_backend.lowering.kernels import is_custom
from opara_backend.report.record import collect
from tests.arguments import normal

Define = Callable[[str, Callable[..., Any]], Any]


@pytest.fixture
def define() -> Iterator[Define]:
    """Register an operator for the time of a test, by schema and function; its result is like its first argument."""
    library = torch.library.Library(f"opara_tests_{random.getrandbits(32):x}", "DEF")

    def operator(schema: str, compute: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", lambda x, *more: torch.empty_like(x), lib=library)
        return getattr(getattr(torch.ops, library.ns), name)

    yield operator
    library._destroy()


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Any:
    return torch.compile(function, backend="opara", fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_what_an_operator_keeps_stays_as_it_was(define: Define, dynamic: bool | None) -> None:
    """Everything else of the program runs after it, in memory that is planned."""
    kept: list[Tensor] = []
    keep = define("keep(Tensor x) -> Tensor", lambda x: kept.append(x) or x.clone())

    def function(x: Tensor) -> Tensor:
        y = keep((x @ x).sin())
        for _ in range(6):
            y = (y @ x).tanh()
        return y

    call = compiled(function, dynamic)
    with torch.no_grad(), collect() as records:
        for number in range(4):
            x = normal(number, 16, 16)
            torch.testing.assert_close(call(x), function(x))
            # Inductor may compute the two otherwise, but none may have been overwritten by what ran after it.
            torch.testing.assert_close(kept[-2], kept[-1])
        first = [tensor.clone() for tensor in kept]
        call(normal(9, 16, 16))
    torch.testing.assert_close(kept[: len(first)], first)
    ((plan, *_),) = records[0].plans.values()
    (given,) = (kernel.reads[0] for kernel in plan.graph.kernels if HIDDEN_STATE in kernel.reads)
    placed = {placement.buffer for placement in plan.memory.placements}
    assert placed, "the others are planned"
    assert given not in placed


@pytest.mark.parametrize("view", [False, True], ids=["argument", "view"])
def test_an_operator_returns_its_argument(define: Define, view: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's rules, which may only warn; Inductor gets it right, for it frees nothing that is still held."""
    monkeypatch.setattr(torch._functorch.config, "error_on_custom_op_aliasing", False, raising=False)
    same = define("same(Tensor x) -> Tensor", (lambda x: x.view_as(x)) if view else (lambda x: x))

    def function(x: Tensor) -> Any:
        y = same((x @ x).sin())
        z = (x + 1) @ x
        for _ in range(6):
            z = (z @ x).tanh()
        return y @ z, y

    call = compiled(function)
    with torch.no_grad():
        for number in range(4):
            x = normal(number, 16, 16)
            torch.testing.assert_close(call(x), function(x))


@pytest.mark.parametrize("order", ["program", "critical_path"])
def test_an_operator_keeps_what_it_was_given_until_the_next(define: Define, order: str) -> None:
    """It is gone before the last kernel that touches it in program order, which a schedule may run earlier."""
    last: list[Tensor] = []

    def mixed(x: Tensor) -> Tensor:
        result = x * 0.5 + (last.pop() if last else 0)
        last.append(x)
        return result

    mix = define("mix(Tensor x) -> Tensor", mixed)

    def function(x: Tensor) -> Any:
        y = (x @ x).sin()
        a = mix(y)
        b = mix((a + 1).tanh())
        z = (y.t() @ y).sin()
        for _ in range(6):
            z = (z @ x).tanh()
        return b, z

    call = torch.compile(
        function, backend="opara", fullgraph=True, options={"policy": "sequential", "launch_order": order}
    )
    with torch.no_grad():
        for number in range(4):
            x, found = normal(number, 16, 16), []
            for run in (call, function):
                last.clear()
                found.append(run(x))
            torch.testing.assert_close(*found)


def test_an_operator_keeps_the_memory_alone(define: Define) -> None:
    kept: list[tuple[torch.UntypedStorage, Tensor]] = []
    keep = define("keep_memory(Tensor x) -> Tensor", lambda x: kept.append((x.untyped_storage(), x.clone())) or x + 0)

    def function(x: Tensor) -> Tensor:
        y = keep((x @ x)[:7].sin())
        for _ in range(6):
            x = (x @ x).tanh()
        return y @ x

    call = compiled(function)
    with torch.no_grad():
        for number in range(4):
            call(normal(number, 16, 16))
    for storage, value in kept:
        torch.testing.assert_close(torch.empty(0).set_(storage).view(7, 16), value)


def test_an_operator_keeps_a_slice_of_a_concatenation(define: Define) -> None:
    kept: list[Tensor] = []
    keep = define("keep_part(Tensor x) -> Tensor", lambda x: kept.append(x[:, 3:5]) or x.clone())

    def function(x: Tensor) -> Tensor:
        y = keep(torch.cat([(x @ x).sin(), (x @ x + 1).cos(), x @ x], 1))[:, :16]
        for _ in range(6):
            y = (y @ x).tanh()
        return y

    call = compiled(function)
    with torch.no_grad():
        for number in range(3):
            x = normal(number, 16, 16)
            torch.testing.assert_close(call(x), function(x))
            torch.testing.assert_close(kept[-2], kept[-1])


def test_what_an_operator_does_not_keep_is_planned(define: Define) -> None:
    """Also where it is given a view, and where it writes."""
    halve = define("halve(Tensor x) -> Tensor", lambda x: x * 0.5)

    def function(x: Tensor) -> Tensor:
        for _ in range(4):
            x = halve((x @ x).sin().t()) + x
        return x

    call = compiled(function)
    with torch.no_grad(), collect() as records:
        for number in range(3):
            x = normal(number, 16, 16)
            torch.testing.assert_close(call(x), function(x))
    ((plan, *_),) = records[0].plans.values()
    placed = {placement.buffer for placement in plan.memory.placements}
    given = {kernel.reads[0] for kernel in plan.graph.kernels if HIDDEN_STATE in kernel.reads}
    assert len(given) == 4
    assert given <= placed


def test_operators_keep_their_order(define: Define) -> None:
    """They need nothing of each other; what they say, and the numbers they draw, come in the program's order."""
    said: list[tuple[int, float]] = []
    say = define("say(Tensor x, int number) -> Tensor", lambda x, n: said.append((n, torch.rand(()).item())) or x + 0)

    def function(x: Tensor) -> Any:
        return say(((x @ x) @ x) @ x, 1), say(x, 2), x.cumsum(0), say((x @ x) @ x, 3), say(x + 1, 4)

    call = torch.compile(function, backend="opara", fullgraph=True, options={"fallback_random": True})
    with torch.no_grad(), collect() as records:
        for number in range(3):
            x, heard = normal(number, 8, 8), []
            for run in (call, function):
                torch.manual_seed(number)
                said.clear()
                heard.append((run(x), [*said]))
            torch.testing.assert_close(heard[0][0], heard[1][0])
            assert [number for number, _ in heard[0][1]] == [1, 2, 3, 4]
            assert heard[0][1] == heard[1][1]
    graph: KernelGraph = records[0].graph
    assert graph.buffer(HIDDEN_STATE).kind == "state"


def test_torchs_own_operators_share_nothing_hidden() -> None:
    def function(x: Tensor) -> Tensor:
        return x.cumsum(0) @ torch.linalg.inv(x + 20 * torch.eye(8)) + x.sort().values

    with torch.no_grad(), collect() as records:
        compiled(function)(normal(0, 8, 8))
    assert not any(HIDDEN_STATE in kernel.writes for kernel in records[0].graph.kernels)


@pytest.mark.parametrize(
    ("callee", "expected"),
    [
        ("torch.ops.aten.sort.stable", False),
        ("torch.ops.prims.device_put.default", False),
        ("torch.ops.mkldnn._linear_pointwise.default", False),
        ("torch.ops.opara_backend.gemv.default", False),
        ("torch.ops.torchvision.nms.default", False),
        ("extern_kernels.mm", False),
        ("aten.set_.source_Tensor", False),
        ("convolution_out", False),
        ("torch.ops.aten_like.sort.default", True),
        ("torch.ops.vllm.attention.default", True),
    ],
)
def test_custom_operators_are_told_by_their_namespace(callee: str, expected: bool) -> None:
    assert is_custom(callee) is expected
