"""What a captured graph is called with: any layout, any address, tensors or not. The results are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from opara_backend.fallback import FallbackReason
from opara_backend.report.record import GraphRecord, collect

CALLS = 4


def agrees(function: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], **how: Any) -> list[GraphRecord]:
    """Call `function` compiled and eager on arguments made twice; outputs and arguments must agree after every call."""
    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True, **how)
        for n in range(CALLS):
            ours, theirs = make(n), make(n)
            torch.testing.assert_close(call(*ours), function(*theirs), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(_tensors(ours), _tensors(theirs), rtol=1e-4, atol=1e-4)
    return records


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def captured(records: list[GraphRecord]) -> bool:
    return bool(records) and all(r.plans and r.replays and not r.fallbacks for r in records)


def normal(n: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(n), device="cuda")


def mix(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y).relu() + torch.cat([x.sin()[:, :4] @ y[:4], y.cos()], 0).sum(0)


LAYOUTS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "transposed": lambda n: (normal(n, 32, 16).t(), normal(n, 32, 32)),
    "expanded": lambda n: (normal(n, 1, 32).expand(16, 32), normal(n, 32, 32)),
    "strided": lambda n: (normal(n, 32, 64)[::2, 1::2], normal(n, 32, 32)),
    "overlapping": lambda n: (normal(n, 60).as_strided((16, 32), (1, 1)), normal(n, 32, 32)),
    "misaligned by one element": lambda n: (normal(n, 16 * 32 + 1)[1:].view(16, 32), normal(n, 32, 32)),
    "misaligned by turns": lambda n: (normal(n, 16 * 32 + 9)[n : n + 512].view(16, 32), normal(n, 32, 32)),
    "pinned and moved": lambda n: (
        torch.full((16, 32), float(n)).pin_memory().to("cuda", non_blocking=True),
        normal(n, 32, 32),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    assert captured(agrees(mix, LAYOUTS[name]))


@pytest.mark.parametrize("name", ["transposed", "strided", "misaligned by one element"])
def test_layouts_written_in_place(name: str) -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        y[2:5] += x[1:4] @ y
        return (x @ y).relu()

    assert captured(agrees(write, LAYOUTS[name]))


def test_a_view_of_an_input_is_written() -> None:
    def write(x: Tensor, where: Tensor) -> Tensor:
        x[1:3].mul_(3)
        x.view(-1)[:5].zero_()
        x.index_copy_(0, where, x[4:6] + 1)
        return x.t() @ x

    assert captured(agrees(write, lambda n: (normal(n, 8, 8), torch.tensor([n % 8, (n + 3) % 8], device="cuda"))))


def test_the_same_tensor_twice_and_two_views_of_one() -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x @ y + y.sin()

    def twice(n: int) -> tuple[Tensor, Tensor]:
        x = normal(n, 8, 8)
        return x, x

    def overlapping(n: int) -> tuple[Tensor, Tensor]:
        x = normal(n, 10, 8)
        return x[:8], x[2:]

    assert captured(agrees(write, twice))
    assert captured(agrees(write, overlapping))


@pytest.mark.parametrize("copy_outputs", [True, False])
def test_outputs_of_the_last_call_are_arguments_of_the_next(copy_outputs: bool) -> None:
    def step(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([cache[1:], (x @ x).sum(0, keepdim=True).tanh()]), (cache @ x).relu()

    with torch.no_grad(), collect() as records:
        call = torch.compile(step, backend="opara", options={"copy_outputs": copy_outputs})
        ours = theirs = torch.zeros(4, 8, device="cuda")
        for n in range(6):
            x = normal(n, 8, 8)
            ours, found = call(x, ours)
            theirs, expected = step(x, theirs)
            torch.testing.assert_close((ours, found), (theirs, expected), rtol=1e-4, atol=1e-4)
    assert captured(records)


def test_a_cache_that_grows() -> None:
    """The output of each call is a longer input of the next (pytorch#184102)."""

    def step(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.cat([cache, x])
        return longer, (longer @ longer.t()).softmax(1).sum(0)

    with torch.no_grad():
        call = torch.compile(step, backend="opara", dynamic=True)
        for _ in range(3):
            ours = theirs = torch.zeros(2, 8, device="cuda")
            for n in range(8):
                x = normal(n, 1, 8)
                ours, found = call(x, ours)
                theirs, expected = step(x, theirs)
                torch.testing.assert_close((ours, found), (theirs, expected), rtol=1e-4, atol=1e-4)


def test_numbers_nothing_and_nested_containers() -> None:
    def function(tree: dict[str, Any], scale: float, times: int, nothing: None, word: str) -> Any:
        (a, b), rest = tree["pair"], tree["rest"]["x"]
        for _ in range(times):
            a = (a @ b).tanh()
        return {"a": a * scale, "b": [b.cumsum(1), nothing, rest.sum(0) + len(word)]}

    assert captured(
        agrees(
            function,
            lambda n: ({"pair": (normal(n, 8, 8), normal(n, 8, 8)), "rest": {"x": normal(n, 3)}}, 0.5, 2, None, "word"),
        )
    )


def test_numbers_that_change_with_every_call() -> None:
    def function(x: Tensor, times: int, scale: float) -> tuple[Tensor, Tensor]:
        return (x @ x) * times, (x.sin() * scale) @ x

    agrees(function, lambda n: (normal(n, 8, 8), n + 2, 0.25 * n), dynamic=True)


def test_a_scalar_on_the_cpu() -> None:
    """As a plain number where Inductor takes it so; else it steps down and says which operator."""
    records = agrees(lambda x, s: (x @ x) * s + x.cumsum(0), lambda n: (normal(n, 8, 8), torch.tensor(0.5 * n)))
    assert records
    assert all({f.reason for f in r.fallbacks} <= {FallbackReason.HOST_KERNEL} for r in records)


def test_a_scalar_on_the_cpu_that_comes_again_is_captured_with_its_value() -> None:
    def function(x: Tensor, s: Tensor) -> Tensor:
        return torch.cat([(x @ x) * s, x.sin() * s])

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True)
        for n in range(8):
            given = normal(n, 8, 8), torch.tensor(0.5 + n % 2)
            torch.testing.assert_close(call(*given), function(*given), rtol=1e-4, atol=1e-4)
    assert captured(records)
    assert [taken for record in records for _, taken in record.plans.values()] == [True, True]


def test_empty_and_single_elements() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return x @ y, x.sum(0), torch.cat([x, x + 1]), y.exp().sum()

    for rows in (0, 1):
        torch._dynamo.reset()
        assert captured(agrees(function, lambda n, r=rows: (normal(n, r, 4), normal(n, 4, 4))))
    torch._dynamo.reset()
    agrees(function, lambda n: (normal(n, n % 3, 4), normal(n, 4, 4)), dynamic=True)


def test_a_subclass_of_tensor() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).cuda()
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara")
        for n in range(CALLS):
            pair = TwoTensor(normal(n, 4, 8), normal(n + 9, 4, 8))
            found = call(pair)
            assert type(found) is TwoTensor
            torch.testing.assert_close(found.a, model(pair.a), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.b, model(pair.b), rtol=1e-4, atol=1e-4)
    assert captured(records)


def test_only_what_moves_is_copied_and_in_one_launch() -> None:
    """Parameters are read in place; inputs of one type arrive in one grouped copy, the output leaves in one copy."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).cuda()

    def function(*xs: Tensor) -> Tensor:
        return model(sum(xs[1:], xs[0]))

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara")
        xs = [normal(n, 4, 8) for n in range(12)]
        for _ in range(2):
            call(*xs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            call(*xs)
    assert captured(records)
    names = [e.name for e in profiled.events()]
    assert sum("foreach_copy" in name for name in names) == 1
    assert names.count("aten::copy_") == names.count("aten::clone") == 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.float8_e4m3fn])
def test_types_that_grouped_copies_do_not_know(dtype: torch.dtype) -> None:
    """Through a graph that only reorders them, in and out."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x.view(torch.uint8), x.view(torch.uint8)]).view(dtype), (y @ y).relu()

    def make(n: int) -> tuple[Tensor, Tensor]:
        return torch.arange(n, n + 64, dtype=torch.uint8, device="cuda").view(dtype), normal(n, 8, 8)

    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", fullgraph=True)
        for n in range(CALLS):
            found, expected = call(*make(n)), function(*make(n))
            assert found[0].dtype == dtype
            assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
            torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert captured(records)


def test_complex_numbers_seen_as_pairs() -> None:
    """An output that views an argument, or nothing's single element, as another type."""
    for shape in ((), (3,), (0,)):
        torch._dynamo.reset()
        agrees(
            lambda z, x: (torch.view_as_real(z), torch.view_as_real(z * 2), x @ x),
            lambda n, s=shape: (torch.full(s, complex(n, 1), device="cuda"), normal(n, 8, 8)),
        )


def test_several_outputs_of_one_operator_some_empty() -> None:
    assert captured(agrees(lambda x, y: (*torch.svd(x), y @ y), lambda n: (normal(n, 0, 3), normal(n, 8, 8))))
