"""Programs people write, small: what they return, what they write and what they keep is eager's, call after call.

`agree` (conftest) compares outputs, arguments, module state and outputs of earlier calls after every call, and checks
that the graph was lowered, scheduled and verified by us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opara_backend.report.record import GraphRecord, collect

Agree = Callable[..., list[GraphRecord]]
Args = tuple[Any, ...]


def normal(call: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(call), dtype=dtype)


def integers(call: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(call))


def one(*shape: int) -> Callable[[int], Args]:
    return lambda call: (normal(call, *shape),)


def two(*shape: int) -> Callable[[int], Args]:
    return lambda call: (normal(call, *shape), normal(call + 100, *shape))


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
    rows = torch.tensor([0, 3, 3, 1])
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
    summed = F.embedding_bag(ids.flatten(), table, torch.tensor([0, 3, 5]), mode="sum")
    rows = F.embedding(ids, table)
    edges = table[:, 0].sort().values
    return bags @ summed.t(), rows.sum(1), table.index_select(0, ids[0]), torch.bucketize(bags, edges)


def attention(x: Tensor, y: Tensor) -> Any:
    q, k, v = (t.view(2, 4, 2, 8).transpose(1, 2) for t in (x, y, x + y))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return causal.transpose(1, 2).reshape(2, 4, 16), masked @ v.mT


def constants(x: Tensor) -> Any:
    places = torch.arange(8) * 0.5
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    return (x * places) @ torch.eye(8), torch.linspace(0, 1, 8) + x.sum(0), table.repeat(4, 4) @ x, torch.full((3,), 7)


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
    matrix = x @ x.t() + 8 * torch.eye(8)
    lower = torch.linalg.cholesky(matrix)
    return torch.linalg.solve(matrix, y), lower, torch.linalg.eigvalsh(matrix), torch.linalg.svdvals(y), matrix.logdet()


def convolutions(x: Tensor, w: Tensor) -> Any:
    a = F.conv2d(x, w, padding=1)
    b, where = F.max_pool2d(a, 2, return_indices=True)
    c = F.interpolate(b, scale_factor=2.0, mode="bilinear")
    d = F.adaptive_avg_pool2d(F.conv_transpose2d(a, w), 2)
    return a.relu(), where, c + a, d, F.avg_pool2d(F.pad(a, (1, 1, 1, 1)), 3)


def empty_tensors(x: Tensor, nothing: Tensor) -> Any:
    return (
        nothing @ x, x[:0].relu(), torch.cat([x, nothing]) @ x, nothing.sum(), nothing.sum(0), x[3:3].mean(1) + 1, nothing
    )  # fmt: skip


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
    """They become symbols without a hint; the program is planned only if the host need not look."""

    def function(x: Tensor) -> Any:
        kept = x[x > 0]
        values, counts = torch.unique((x * 2).round(), return_counts=True)
        return kept * 2, (x > 0).nonzero() + 1, values, counts, kept.sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        agree(function, one(6, 6), planned=False)


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


# --- what a program writes ----------------------------------------------------------------------------------------


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
        c.index_fill_(0, torch.tensor([1]), 4).clamp_(max=6)
        return a @ c, b.sum(1), torch.zeros(8, 8).copy_(c).t_()

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


def rows_of(*sizes: int) -> Callable[[int], Args]:
    return lambda call: (normal(call, sizes[call % len(sizes)], 8), normal(call, 8, 8))


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
    assert [len(static.plans), len(dynamic.plans)] == [1, 3]


def test_numbers_among_the_arguments_become_symbols(agree: Agree) -> None:
    def function(x: Tensor, times: int) -> Any:
        return (x @ x) * times, torch.arange(times) + x.sum().long(), x.new_zeros(times, 2)

    agree(function, lambda call: (normal(call, 8, 8), call + 3), calls=4, dynamic=True)


def test_plans_of_many_shapes_are_bounded(agree: Agree) -> None:
    (record,) = agree(sized, lambda n: rows_of(*range(2, 9))(n), calls=14, dynamic=True, options={"max_captures": 2})
    assert len(record.plans) >= 2


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_dropout_draws_eagers_numbers(agree: Agree) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 8), nn.Dropout(0.3)).train()
    agree(model, one(16, 8), options={"fallback_random": True}, seed=7)


def test_order_of_random_draws_is_eagers(agree: Agree) -> None:
    """Branches that draw stay in program order on the one generator, whatever their streams."""

    def function(x: Tensor) -> Any:
        a = torch.rand_like(x) @ x
        b = torch.randn(8, 8) + x
        c = torch.bernoulli(x.sigmoid()) @ b
        return a, b, c, torch.randint(0, 100, (5,)), x.softmax(1).multinomial(2), torch.randperm(6)

    agree(function, one(8, 8), calls=4, options={"fallback_random": True}, seed=3)


def test_random_numbers_advance() -> None:
    compiled = torch.compile(lambda x: (torch.rand(4, 4) @ x, F.dropout(x, 0.5)), backend="opara")
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
        return (y @ x).relu() if y.sum() > 0 else (y.t() @ x).cumsum(1)

    agree(function, lambda call: (normal(call, 8, 8) + (-1) ** call,), calls=4, fullgraph=False, records=3)


def test_cond(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        y = (x @ x).tanh()
        return torch.cond(y.sum() > 0, lambda t: (t @ t).relu(), lambda t: t.sin() - 1, (y,)) @ x, y.sum(0)

    (record,) = agree(function, lambda call: (normal(call, 8, 8) + (-1) ** call,), calls=4, planned=False)
    assert not record.fallbacks
    assert not record.plans, "the host decides in the middle"


def test_while_loop(agree: Agree) -> None:
    def function(x: Tensor, limit: Tensor) -> Any:
        def more(i: Tensor, y: Tensor) -> Tensor:
            return i < limit

        def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, (y @ x).tanh()

        return torch.while_loop(more, step, (torch.zeros((), dtype=torch.int64), x + 1))

    agree(function, lambda call: (normal(call, 8, 8), torch.tensor(call + 1)), planned=False)


def test_item(agree: Agree) -> None:
    def function(x: Tensor) -> Any:
        biggest = (x @ x).argmax().item()
        return (x * biggest).cumsum(1) @ x, biggest

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        agree(function, one(8, 8), planned=False)


def test_item_as_a_size(agree: Agree) -> None:
    def function(x: Tensor, count: Tensor) -> Any:
        size = count.item()
        torch._check(size >= 2)
        torch._check(size <= 8)
        return torch.ones(size, 8) @ x, x.narrow(0, 0, size).sin() + 1

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        agree(function, lambda call: (normal(call, 8, 8), torch.tensor(call + 3)), planned=False)


# --- operators of the user's own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
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

    yield torch.ops.opara_tests


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
    with collect() as records:
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
    with collect() as records:
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


SETTINGS: tuple[dict[str, Any], ...] = (
    {"policy": "sequential"},
    {"policy": "opara"},
    {"policy": "opara", "launch_order": "program"},
    {"policy": "opara", "streams": 2},
    {"policy": "opara", "streams": 1},
)


def test_schedules_change_no_bit() -> None:
    torch.manual_seed(2)
    model = Branches().eval()
    results, schedules = [], []
    for setting in SETTINGS:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="opara", options=setting)
        with torch.inference_mode(), collect() as records:
            results.append([compiled(normal(call, 6, 16)) for call in range(3)])
        ((plan, _),) = records[0].plans.values()
        schedules.append(plan.schedule)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    sequential, opara, program, two_streams, one_stream = schedules
    assert sequential.streams == one_stream.streams == 1
    assert sequential.wait_count == one_stream.wait_count == 0
    assert opara.streams == program.streams >= 4
    assert two_streams.streams == 2
    in_order = tuple(range(len(sequential.order)))
    assert sequential.order == program.order == in_order
    assert opara.order != in_order


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


def test_inference_mode(agree: Agree) -> None:
    agree(Branches().eval(), one(4, 16), mode=torch.inference_mode)


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
