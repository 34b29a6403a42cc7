"""Programs people write, small: what they return is eager's, call after call.

`agree` (conftest) compares outputs, arguments, module state and outputs of earlier calls after every call, and checks
that the graph was lowered, scheduled and verified by us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opara_backend.execution import runtime
from opara_backend.report.record import GraphRecord, collect
from tests.arguments import Args, integers, normal, one, rows_of, two

Agree = Callable[..., list[GraphRecord]]

# --- pure functions: a name, what is computed, what it is fed ---------------------------------------------------------


class Structured(NamedTuple):
    sums: Tensor
    rest: dict[str, Any]


def structured_outputs(x: Tensor, y: Tensor) -> Structured:
    return Structured((x @ y).sum(0), {"sin": [x.sin().cumsum(0), None, 3], "number": 2.5, "pair": (x + y, x.shape[0])})


def nested_inputs(tree: dict[str, Any], scale: float, nothing: None, *, flag: bool = True) -> Any:
    (a, b), rest = tree["pair"], tree["rest"]["x"]
    return {"a": (a @ b).relu(), "b": [b.cumsum(1) * scale if flag and nothing is None else b, rest.sum(0) + 1]}


def several_results_of_one_operator(x: Tensor) -> Any:
    values, indices = x.topk(3, dim=1)
    ordered, order = x.sort(dim=1, descending=True, stable=True)
    largest, where = x.max(dim=0)
    variance, mean = torch.var_mean(x, dim=1)
    median = x.kthvalue(4, dim=1)
    return values, indices, ordered + 1, order, largest, where, variance, mean, median


def views(x: Tensor) -> Any:
    a = (x + 1).transpose(0, 1)
    b = (a @ x).reshape(4, 2, 8)[:, 1]
    c = b.unfold(1, 3, 2).permute(2, 0, 1)
    d = (x * 2).diagonal() + b.flatten()[:8]
    return (
        c.contiguous() * 2,
        d.flip(0),
        torch.as_strided(x.sin(), (3, 3), (8, 2)).roll(1, 0),
        b.squeeze().expand(2, -1, -1),
    )


def split_and_cat(x: Tensor, y: Tensor) -> Any:
    a, b, c = (x @ y).split([2, 5, 1], dim=1)
    d, e = y.sin().chunk(2, dim=1)
    whole = torch.cat([a.relu(), b @ b.t(), c.exp(), d * 2, e], dim=1)
    return torch.cat([whole @ whole.t(), torch.stack([d.sum(1), e.sum(1)], 1)], 1), torch.cat([x, x + 1])


def parts_of_a_cat_outlive_it(x: Tensor, y: Tensor) -> Any:
    """The whole is used up; parts, which are slices of its memory, are returned."""
    a, b = x.sin() * 2, (y.cos() + 1).relu()
    return a, b, torch.cat([a, b], 1) @ torch.cat([b, a], 0)


def cat_of_cats(x: Tensor, y: Tensor) -> Any:
    inner = torch.cat([x.relu(), (x @ y).tanh()], 1)
    outer = torch.cat([inner, torch.cat([y.sin(), y.cos()], 1)], 0)
    return outer @ outer.t(), inner.sum(0)


def cat_of_matrix_products(x: Tensor, y: Tensor) -> Any:
    whole = torch.cat([x @ y, y @ x, x.t() @ y.t()], 0)
    return whole.softmax(1) @ x, whole.amax(0)


def scatters(x: Tensor, y: Tensor) -> Any:
    rows = torch.tensor([0, 3, 3, 1], device=x.device)
    a = (x + 1).index_put((rows,), y[:4], accumulate=True)
    b = torch.zeros_like(x).scatter(1, (y * 4).long().abs() % 8, y.relu())
    c = torch.ones_like(x).scatter_add(0, (x * 4).long().abs() % 8, y @ x)
    d = x.clone().index_copy(0, rows[:2] + 1, y[:2])
    e = (x * 2).index_add(1, rows, y[:, :4])
    f = x.clone().scatter_reduce(0, (y * 4).long().abs() % 8, y, "amax")
    g = torch.where(x > 0, x, y).masked_fill(y > 1, 7.0)
    return a, b.sum(1), c, d @ e, f, g, x.masked_scatter(x > 0, y)


def lookups(table: Tensor, ids: Tensor) -> Any:
    bags = F.embedding_bag(ids, table, mode="mean")
    summed = F.embedding_bag(ids.flatten(), table, torch.tensor([0, 3, 5], device=ids.device), mode="sum")
    rows = F.embedding(ids, table)
    edges = table[:, 0].sort().values
    return bags @ summed.t(), rows.sum(1), table.index_select(0, ids[0]), torch.bucketize(bags, edges)


def attention(x: Tensor, y: Tensor) -> Any:
    q, k, v = (t.view(2, 4, 2, 8).transpose(1, 2) for t in (x, y, x + y))
    mask = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril()
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return causal.transpose(1, 2).reshape(2, 4, 16), masked @ v.mT


def constants(x: Tensor) -> Any:
    d = x.device
    places = torch.arange(8, device=d) * 0.5
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=d)
    even = torch.linspace(0, 1, 8, device=d)
    return (x * places) @ torch.eye(8, device=d), even + x.sum(0), table.repeat(4, 4) @ x, torch.full((3,), 7, device=d)


def numbers_of_every_type(x: Tensor, ids: Tensor, mask: Tensor) -> Any:
    a = (ids // 3) ^ (ids << 1)
    b = mask.logical_xor(x > 0)
    return (
        a.cumsum(0),
        b.any(1),
        (x.to(torch.float64) @ x.double()).float(),
        (ids.to(torch.uint8) + 250),
        b & mask.t(),
        ids % 3,
    )


def half_precision(x: Tensor, y: Tensor) -> Any:
    a, b = x.bfloat16(), y.half()
    return (a @ a).float().sum(), (b * 2).relu(), a.exp().to(torch.float32) * 0, b.cumsum(0).float() * 0


def complex_numbers(x: Tensor, y: Tensor) -> Any:
    z = torch.complex(x, y)
    spectrum = torch.fft.rfft(x, dim=1)
    return (
        z @ z.conj(),
        torch.view_as_real(z * 2j).sum(-1),
        spectrum.abs(),
        torch.fft.irfft(spectrum * 2, dim=1),
        z.angle(),
    )


def linear_algebra(x: Tensor, y: Tensor) -> Any:
    matrix = x @ x.t() + 8 * torch.eye(8, device=x.device)
    lower = torch.linalg.cholesky(matrix)
    return torch.linalg.solve(matrix, y), lower, torch.linalg.eigvalsh(matrix), torch.linalg.svdvals(y), matrix.logdet()


def convolutions(x: Tensor, w: Tensor) -> Any:
    a = F.conv2d(x, w, padding=1)
    b, where = F.max_pool2d(a, 2, return_indices=True)
    c = F.interpolate(b, scale_factor=2.0, mode="bilinear")
    d = F.adaptive_avg_pool2d(F.conv_transpose2d(a, w), 2)
    return a.relu(), where, c + a, d, F.avg_pool2d(F.pad(a, (1, 1, 1, 1)), 3)


def empty_tensors(x: Tensor, nothing: Tensor) -> Any:
    joined = torch.cat([x, nothing]) @ x
    return nothing @ x, x[:0].relu(), joined, nothing.sum(), nothing.sum(0), x[3:3].mean(1) + 1, nothing


def one_element(x: Tensor, y: Tensor) -> Any:
    return x * y, x.sum() + 1, (x.view(1, 1) @ y.view(1, 1)).squeeze(), x.expand(3, 2).cumsum(0), y.max(0)


def chosen_by_numbers(x: Tensor, times: int, scale: float, word: str, nothing: None) -> Any:
    for _ in range(times):
        x = (x @ x).tanh()
    return x * scale, len(word), nothing, times, scale


def reductions(x: Tensor) -> Any:
    y = x.cumsum(1)
    return (
        x.std(),
        y.softmax(0),
        y.logsumexp(1),
        x.prod(1),
        x.argmin(),
        x.norm(dim=0),
        y.cummax(0),
        x.median(),
        x.histc(4),
    )


PURE: dict[str, tuple[Callable[..., Any], Callable[[int], Args]]] = {
    "structured_outputs": (structured_outputs, two(8, 8)),
    "nested_inputs": (
        nested_inputs,
        lambda n: ({"pair": (normal(n, 4, 8), normal(n + 1, 8, 8)), "rest": {"x": normal(n + 2, 3)}}, 0.5, None),
    ),
    "several_results_of_one_operator": (several_results_of_one_operator, one(6, 8)),
    "views": (views, one(8, 8)),
    "split_and_cat": (split_and_cat, two(8, 8)),
    "parts_of_a_cat_outlive_it": (parts_of_a_cat_outlive_it, two(8, 8)),
    "cat_of_cats": (cat_of_cats, two(8, 8)),
    "cat_of_matrix_products": (cat_of_matrix_products, two(8, 8)),
    "scatters": (scatters, two(8, 8)),
    "lookups": (lookups, lambda n: (normal(n, 12, 8), integers(n, 12, 3, 4))),
    "attention": (attention, two(2, 4, 16)),
    "constants": (constants, one(8, 8)),
    "numbers_of_every_type": (
        numbers_of_every_type,
        lambda n: (normal(n, 6, 6), integers(n, 50, 6, 6), integers(n, 2, 6, 6).bool()),
    ),
    "half_precision": (half_precision, lambda n: (normal(n, 4, 4).round(), normal(n, 4, 4))),
    "complex_numbers": (complex_numbers, two(6, 6)),
    "linear_algebra": (linear_algebra, two(8, 8)),
    "convolutions": (convolutions, lambda n: (normal(n, 2, 3, 8, 8), normal(n, 4, 3, 3, 3))),
    "empty_tensors": (empty_tensors, lambda n: (normal(n, 4, 4), torch.zeros(0, 4))),
    "one_element": (one_element, two(1)),
    "chosen_by_numbers": (chosen_by_numbers, lambda n: (normal(n, 4, 4), 3, 1.5, "word", None)),
    "reductions": (reductions, one(6, 8)),
}


@pytest.mark.parametrize("name", PURE)
def test_pure_function(agree: Agree, name: str) -> None:
    function, make = PURE[name]
    agree(function, make)


def test_slices_of_a_concatenation_are_written_independently(agree: Agree) -> None:
    (record,) = agree(cat_of_matrix_products, two(8, 8))
    parts = [b for b in record.graph.buffers if b.part_of is not None]
    assert len(parts) == 3
    assert {b.part_of for b in parts} == {parts[0].part_of}
    writers = [i for i, k in enumerate(record.graph.kernels) if k.writes[0] in {b.name for b in parts}]
    assert [record.graph.predecessors(i) for i in writers] == [(), (), ()]
    reader = min(i for i in range(len(record.graph)) if i not in writers)
    assert record.graph.predecessors(reader) == tuple(writers)


def test_sizes_only_the_data_knows(agree: Agree) -> None:
    """The host must look at a result before it can go on, so there is no plan."""

    def function(x: Tensor) -> Any:
        kept = x[x > 0]
        values, counts = torch.unique((x * 2).round(), return_counts=True)
        return kept * 2, (x > 0).nonzero().sum(0), values, counts, kept.sum(), (x @ x).repeat_interleave(2, 0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (record,) = agree(function, one(6, 6), planned=False)
    assert len(record.graph.segments) > 1
    assert not record.plans


# --- arguments --------------------------------------------------------------------------------------------------------


def strided_inputs(call: int) -> Args:
    base = normal(call, 8, 8)
    return (
        normal(call, 1, 8).expand(8, 8), base.t(), normal(call, 4, 8, 8)[2], normal(call, 16, 16)[::2, 1::2],
        normal(call, 65)[1:].view(8, 8), normal(call, 15).as_strided((8, 8), (1, 1)),
    )  # fmt: skip


def test_strided_inputs(agree: Agree) -> None:
    def function(*tensors: Tensor) -> Any:
        first, *others = tensors
        for other in others:
            first = (first @ other).tanh()
        return first, sum(t.sum(0) for t in tensors)

    agree(function, strided_inputs)


def test_strided_inputs_are_written_in_place(agree: Agree) -> None:
    def function(turned: Tensor, picked: Tensor, shifted: Tensor) -> Tensor:
        turned.mul_(2)
        picked.add_(turned)
        shifted[2:5].copy_(turned[1:4] @ picked)
        return turned @ shifted

    def make(call: int) -> Args:
        _, turned, _, picked, shifted, _ = strided_inputs(call)
        return turned, picked, shifted

    agree(function, make)


def test_one_tensor_passed_twice(agree: Agree) -> None:
    def make(call: int) -> Args:
        x = normal(call, 8, 8)
        return x, x

    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x @ y + y.sin()

    agree(function, make)


def test_two_views_of_one_tensor(agree: Agree) -> None:
    """Writing through one must show in the other."""

    def make(call: int) -> Args:
        x = normal(call, 10, 8)
        return x[:8], x[2:]

    def function(x: Tensor, y: Tensor) -> Any:
        x.mul_(2)
        y.add_(x @ x)
        return x.sum(0), (x @ y).relu()

    agree(function, make)


def test_the_same_arguments_again_in_another_order(agree: Agree) -> None:
    tensors = [normal(n, 8, 8) for n in range(3)]

    def function(x: Tensor, y: Tensor) -> Any:
        return x @ y.sin(), (x - y).relu()

    agree(function, lambda call: (tensors[call % 3], tensors[(call + 1) % 3]), calls=4)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_share_memory_as_in_eager() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        a = x @ y
        return x, x.view(4, 16), y[2:4], a, a.t(), a[1], a, (a + 1).relu(), (a + 1).detach()

    compiled = torch.compile(function, backend="opara")
    with torch.no_grad(), collect() as records:
        for call in range(3):
            ours, theirs = two(8, 8)(call), two(8, 8)(call)
            actual, expected = compiled(*ours), function(*theirs)
            for tensors in (actual, expected):
                for position, tensor in enumerate(tensors):
                    tensor.mul_(position + 2)  # seen through every alias, argument or output
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert actual[0] is ours[0]
    assert [len(r.plans) for r in records] == [1]


def test_views_of_one_argument_share_its_memory() -> None:
    """Without a single kernel: nothing to schedule, and nothing may be copied."""
    compiled = torch.compile(lambda x: (x.t(), x[1:], x), backend="opara")
    with torch.no_grad():
        for _ in range(2):
            x = torch.zeros(4, 4)
            turned, rest, whole = compiled(x)
            turned[0, 1] = 7
            assert x[1, 0] == 7
            assert rest[0, 0] == 7
            assert whole is x


@pytest.mark.parametrize("program", [torch.real, torch.adjoint, lambda x: x[:0] + 1], ids=["same", "view", "empty"])
def test_graph_with_nothing_to_run_is_no_step_down(agree: Agree, program: Any) -> None:
    strict = {"fallback": "error"}
    agree(program, lambda n: (torch.full((3, 4), float(n)),), records=None, planned=False, options=strict)


def test_outputs_stay_valid_and_apart(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        a = (x @ x).tanh()
        return a, (a @ x).sum(0), torch.cat([a @ a, x @ a])

    compiled = torch.compile(function, backend="opara")
    with torch.no_grad(), collect() as records:
        held = [(compiled(normal(call, 8, 8)), function(normal(call, 8, 8))) for call in range(6)]
    for actual, expected in held:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    storages = [t.untyped_storage().data_ptr() for outputs, _ in held for t in outputs]
    assert len(set(storages)) == len(storages)
    assert records[0].plans


def test_output_is_fed_back_as_input() -> None:
    def function(x: Tensor, cache: Tensor) -> Any:
        return torch.cat([cache[1:], (x @ x).sum(0, keepdim=True)]), (cache @ x).relu()

    compiled = torch.compile(function, backend="opara")
    with torch.no_grad():
        ours = theirs = torch.zeros(4, 8)
        for call in range(5):
            ours, result = compiled(normal(call, 8, 8), ours)
            theirs, expected = function(normal(call, 8, 8), theirs)
            torch.testing.assert_close((ours, result), (theirs, expected), rtol=1e-4, atol=1e-4)


# --- shapes -----------------------------------------------------------------------------------------------------------


def sized(x: Tensor, y: Tensor) -> Any:
    return (x @ y).relu(), torch.cat([x.sin(), x @ y], 1).sum(1), x.view(-1, 2, 4).flatten(1) @ y, x.shape[0] * 2


def test_dynamic_shapes_are_lowered_once_and_planned_per_size(agree: Agree) -> None:
    (record,) = agree(sized, rows_of(3, 5, 9), calls=6, dynamic=True)
    assert len(record.plans) == 3
    assert record.graph.symbols
    sizes = [plan.memory.requested_bytes for plan, _ in record.plans.values()]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_second_size_makes_shapes_dynamic(agree: Agree) -> None:
    static, dynamic = agree(sized, rows_of(4, 6, 10, 3), calls=8, records=2)
    assert not static.graph.symbols
    assert dynamic.graph.symbols
    assert len(static.plans) == 1
    assert len(dynamic.plans) >= 3, "Dynamo may take the first size here as well"


def test_numbers_among_the_arguments_become_symbols(agree: Agree) -> None:
    def function(x: Tensor, times: int) -> Any:
        return (x @ x) * times, torch.arange(times, device=x.device) + x.sum().long(), x.new_zeros(times, 2)

    agree(function, lambda call: (normal(call, 8, 8), call % 2 + 3), calls=4, dynamic=True)


def test_plans_of_many_shapes_are_bounded(agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PLANS_KEPT", 2)  # as max_captures does on CUDA
    (record,) = agree(sized, rows_of(*range(2, 9)), calls=14, dynamic=True, options={"max_captures": 2})
    assert len(record.plans) == 2


# --- control flow and results the host looks at -----------------------------------------------------------------------


def test_graph_break(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        a = (x @ x).tanh()
        torch._dynamo.graph_break()
        return a @ x + a.sum(0), a.relu()

    agree(function, one(8, 8), fullgraph=False, records=2)


def test_branch_on_data_breaks_the_graph(agree: Agree) -> None:
    def function(x: Tensor) -> Tensor:
        y = (x @ x).cumsum(0)
        return (y @ x).relu() if x.sum() > 0 else (y.t() @ x).cumsum(1)

    agree(function, lambda call: (normal(call, 8, 8) + (-1) ** call,), calls=4, fullgraph=False, records=3)


def test_cond(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        y = (x @ x).tanh()
        return torch.cond(x.sum() > 0, lambda t: (t @ t).relu(), lambda t: t.sin() - 1, (y,)) @ x, y.sum(0)

    (record,) = agree(function, lambda call: (normal(call, 8, 8) + (-1) ** call,), calls=4, planned=False)
    assert not record.plans, "the host decides in the middle"


def test_while_loop(agree: Agree) -> None:
    def function(x: Tensor, limit: Tensor) -> Any:
        def more(i: Tensor, y: Tensor) -> Tensor:
            return i < limit

        def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, (y @ x).tanh()

        return torch.while_loop(more, step, (torch.zeros((), dtype=torch.int64, device=x.device), x + 1))

    agree(function, lambda call: (normal(call, 8, 8), torch.tensor(call + 1)), planned=False)


def test_item(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        biggest = (x @ x).argmax().item()
        return (x * biggest).cumsum(1) @ x, biggest

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        agree(function, one(8, 8), planned=False)


def test_checks_on_what_the_data_says_still_raise() -> None:
    """As stock Inductor, which knows the condition but not the user's words."""

    def function(x: Tensor, count: Tensor) -> Tensor:
        size = (count + 1).item()
        torch._check(size <= 5, lambda: "too many")
        return (x * size) @ x

    def outcomes(backend: str) -> list[str]:
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        found = []
        for count in (3, 6, 4, 9):
            try:
                compiled(normal(0, 8, 8), torch.tensor(count))
                found.append("fine")
            except RuntimeError as error:
                found.append(str(error))
        return found

    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad():
        stock = outcomes("inductor")
        assert [text == "fine" for text in stock] == [True, False, True, False]
        assert outcomes("opara") == stock


def test_item_as_a_size(agree: Agree) -> None:
    def function(x: Tensor, count: Tensor) -> Any:
        size = count.item()
        torch._check(size >= 2)
        torch._check(size <= 8)
        return torch.ones(size, 8, device=x.device) @ x, x.narrow(0, 0, size).sin() + 1

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        agree(function, lambda call: (normal(call, 8, 8), torch.tensor(call + 3)), planned=False)
