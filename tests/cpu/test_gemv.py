"""Products of one row or one column as reductions: what they compute, which products they are, what they fuse with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils import flop_counter

import bench.models
from opara_backend.lowering import gemv
from opara_backend.report.record import GraphRecord, collect
from tests.agreement import Agree

ON = {"fuse_gemv": True}


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "DEVICES", ("cpu",))


def libraries(record: GraphRecord) -> list[str]:
    return [kernel.call for kernel in record.graph.kernels if kernel.kind != "cpp"]


def compiled(function: Callable[..., Any], *arguments: Tensor, **options: Any) -> tuple[Any, GraphRecord]:
    torch._dynamo.reset()
    with torch.no_grad(), collect() as records:
        result = torch.compile(function, backend="opara", options={**ON, **options})(*arguments)
    (record,) = records
    return result, record


def transposed(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these sizes that lies in memory as a linear layer's weights do, seen from the product."""
    return torch.randn(*sizes[:-2], sizes[-1], sizes[-2], dtype=dtype).mT


FUSED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "a row": (torch.mm, (torch.randn(1, 24), transposed(24, 40))),
    "a column": (torch.mm, (torch.randn(40, 24), torch.randn(24, 1))),
    "a row and a column": (torch.mm, (torch.randn(1, 24), torch.randn(24, 1))),
    "a row with a bias": (torch.addmm, (torch.randn(40), torch.randn(1, 24), transposed(24, 40))),
    "a column with a bias": (torch.addmm, (torch.randn(1), torch.randn(40, 24), torch.randn(24, 1))),
    "several": (torch.bmm, (torch.randn(3, 1, 24), transposed(3, 24, 40))),
    "nothing to sum": (torch.mm, (torch.randn(1, 0), torch.randn(40, 0).mT)),
    "no result": (torch.mm, (torch.randn(1, 24), torch.randn(0, 24).mT)),
    "padded, none of it read": (
        lambda x, w: torch.mm(pad(x, (0, 5)), pad(w, (0, 1, 0, 5)))[:, :-1],
        (torch.randn(1, 19), transposed(19, 7)),
    ),
    "padded where it is summed": (
        lambda x, w: torch.mm(pad(x, (0, 5)), pad(w, (0, 0, 0, 5))),
        (torch.randn(1, 19), transposed(19, 8)),
    ),
    "padded with a bias": (
        lambda b, x, w: torch.addmm(torch.cat([b, b.new_zeros(1)]), x, pad(w, (0, 1)))[:, :7],
        (torch.randn(7), torch.randn(1, 24), transposed(24, 7)),
    ),
    "several, padded": (
        lambda x, w: torch.bmm(pad(x, (0, 5)), pad(w, (0, 1, 0, 5, 0, 0)))[:, :, :7],
        (torch.randn(3, 1, 19), transposed(3, 19, 7)),
    ),
    "cut off": (
        lambda x, w: torch.mm(pad(x, (0, -5)), pad(w, (0, 0, 0, -5))),
        (torch.randn(1, 24), transposed(24, 8)),
    ),
    "a vector that is padded": (
        lambda x, w: torch.mm(pad(x, (0, 5)), w),
        (torch.randn(1, 19), transposed(24, 7)),
    ),
}
LEFT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "two rows": (torch.mm, (torch.randn(2, 24), transposed(24, 40))),
    "sums across rows": (torch.mm, (torch.randn(1, 24), torch.randn(24, 40))),
    "double precision": (torch.mm, (torch.randn(1, 24).double(), transposed(24, 40).double())),
    "padded, and all is read": (
        lambda b, x, w: torch.addmm(torch.cat([b, b]), x, pad(w, (0, 7))),
        (torch.randn(7), torch.randn(1, 24), transposed(24, 7)),
    ),
    "padded, and more is read": (
        lambda x, w: torch.mm(x, pad(w, (0, 9)))[:, 3:9],
        (torch.randn(1, 24), transposed(24, 7)),
    ),
    "padded in front": (
        lambda x, w: torch.mm(pad(x, (5, 0)), pad(w, (0, 0, 5, 0))),
        (torch.randn(1, 19), transposed(19, 8)),
    ),
    "padded with ones": (
        lambda x, w: torch.mm(pad(x, (0, 5), value=1.0), pad(w, (0, 0, 0, 5), value=1.0)),
        (torch.randn(1, 19), transposed(19, 8)),
    ),
    "a scaled bias": (
        functools.partial(torch.addmm, beta=0.5),
        (torch.randn(40), torch.randn(1, 24), transposed(24, 40)),
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_products_of_a_vector_are_fused_with_what_follows(case: str) -> None:
    operation, arguments = FUSED[case]
    result, record = compiled(lambda *tensors: operation(*tensors).relu() + 1, *arguments)
    torch.testing.assert_close(result, operation(*arguments).relu() + 1)
    assert libraries(record) == []


@pytest.mark.parametrize(
    ("case", "left", "right"),
    [
        ("padded, none of it read", (1, 19), (19, 7)),
        ("padded where it is summed", (1, 19), (19, 8)),
        ("padded with a bias", (1, 24), (24, 7)),
        ("several, padded", (3, 1, 19), (3, 19, 7)),
        ("a vector that is padded", (1, 24), (24, 7)),
    ],
)
def test_zeros_are_not_summed(
    monkeypatch: pytest.MonkeyPatch, case: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    """The operands are those that were padded; where only one was, it is as it is."""
    seen: list[tuple[tuple[int, ...], ...]] = []
    asked = gemv._reads_a_matrix_once
    monkeypatch.setattr(
        gemv, "_reads_a_matrix_once", lambda *of: (seen.append(tuple(tuple(t.shape) for t in of)), asked(*of))[1]
    )
    operation, operands = FUSED[case]
    compiled(lambda *tensors: operation(*tensors).relu() + len(case), *operands)
    assert seen == [(left, right)]


@pytest.mark.parametrize("end", [-1, 7], ids=["from the end", "from the start"])
def test_of_columns_of_any_number_nobody_asks_how_many(end: int) -> None:
    """One graph for all, whether zeros behind them are seen through or not."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, pad(weight.mT, (0, 1)))[:, :end].relu()

    torch._dynamo.reset()
    with torch.no_grad(), collect() as records:
        call = torch.compile(function, backend="opara", options=ON, dynamic=True)
        for rows in (7, 9, 12):
            x, weight = torch.randn(1, 19), torch.randn(rows, 19)
            torch._dynamo.mark_dynamic(weight, 0)
            torch.testing.assert_close(call(x, weight), function(x, weight))
    assert len(records) == 1


@pytest.mark.parametrize("case", LEFT)
def test_others_stay_calls_of_libraries(case: str) -> None:
    operation, arguments = LEFT[case]
    result, record = compiled(lambda *tensors: operation(*tensors).relu() + 1, *arguments)
    torch.testing.assert_close(result, operation(*arguments).relu() + 1)
    assert len(libraries(record)) == 1


def test_a_row_that_may_become_several_stays(agree: Agree) -> None:
    torch._dynamo.reset()
    model, rows = nn.Sequential(nn.Linear(24, 40), nn.ReLU()), torch.randn(9, 24)
    (record,) = agree(model, lambda call: (rows[: 3 + call],), options=ON, dynamic=True, planned=False)
    assert len(libraries(record)) == 1


def test_off_unless_asked_for() -> None:
    """And no cache takes one for the other."""
    operation, arguments = FUSED["a row"]
    for asked in (True, False, True):
        _, record = compiled(lambda *tensors: operation(*tensors).relu(), *arguments, fuse_gemv=asked)
        assert bool(libraries(record)) != asked


def test_what_many_outputs_read_is_computed_once() -> None:
    """Left to Inductor, the square root would be taken in every one of 40 sums."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x.sqrt().tanh(), weight)

    x, weight = torch.rand(1, 24), transposed(24, 40)
    result, record = compiled(function, x, weight)
    torch.testing.assert_close(result, function(x, weight))
    made = [buffer.layout for buffer in record.graph.buffers if buffer.kind == "intermediate"]
    assert "f32[1, 24]" in made


def test_counts_as_the_product_it_is() -> None:
    operation, arguments = FUSED["a row with a bias"]
    _, record = compiled(operation, *arguments)
    with flop_counter.FlopCounterMode(display=False) as counted:
        operation(*arguments)
    (kernel,) = record.graph.kernels
    assert kernel.flops is not None
    assert kernel.flops >= counted.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    bias, x, weight = torch.randn(64).to(dtype), torch.randn(1, 4096).to(dtype), transposed(4096, 64, dtype=dtype)
    exact = torch.addmm(bias.double(), x.double(), weight.double())
    result, _ = compiled(torch.addmm, bias, x, weight)
    assert result.dtype == dtype
    # Half a unit in the last place, and the float32 sum's own error.
    torch.testing.assert_close(result.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-3)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    summed=st.integers(0, 5),
    batch=st.one_of(st.none(), st.integers(0, 3)),
    bias=st.booleans(),
    one=st.booleans(),
)
def test_is_the_product(rows: int, columns: int, summed: int, batch: int | None, bias: bool, one: bool) -> None:
    rows, columns = (1, columns) if one else (rows, 1)
    many = () if batch is None else (batch,)
    left, right = torch.randn(*many, rows, summed), torch.randn(*many, summed, columns)
    added = torch.randn(columns) if bias else None
    torch.testing.assert_close(gemv.product(left, right, added), left @ right + (added if added is not None else 0))


@pytest.mark.parametrize("name", ["deepfm", "moe_decode", "two_tower"])
def test_models_at_batch_1_ask_no_library_for_products(name: str, agree: Agree) -> None:
    model = bench.models.get(name).reduced()
    inputs = model.inputs(1)
    (record,) = agree(model.build(), lambda call: tuple(t.clone() for t in inputs), options=ON, planned=False)
    assert [call for call in libraries(record) if "mm" in call] == []


def test_training_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten: list[int] = []
    monkeypatch.setattr(gemv, "fuse_gemv", lambda graph: rewritten.append(1) or 0)
    layer, x = nn.Linear(24, 40), torch.randn(1, 24)
    with torch._inductor.config.patch(force_disable_caches=True):
        call = torch.compile(layer, backend="opara", options=ON)
        call(x).sum().backward()
        assert rewritten == []
        with torch.no_grad():
            call(x)
        assert rewritten == [1]


def test_parts_whose_size_is_an_input() -> None:
    weight = torch.randn(24, 8)

    def function(x: Tensor, w: Tensor, width: int) -> list[Tensor]:
        return [part * 2 for part in torch.mm(x, w.mT).split(width, -1)]

    call = torch.compile(function, backend="opara", options=ON)
    with torch.no_grad():
        for width in (12, 8, 6):
            x = torch.randn(1, 8)
            torch.testing.assert_close(call(x, weight, width), function(x, weight, width), rtol=1e-4, atol=1e-4)


def test_parts_that_data_decides_the_number_of() -> None:
    def function(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
        found = chosen.nonzero().flatten()
        return torch.bmm(x[found], w[found].mT).view(-1, 40).chunk(2, -1)[0] * 2

    arguments = torch.randn(5, 1, 24), torch.randn(5, 40, 24), torch.tensor([1, 0, 1, 1, 0])
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(function, backend="opara", options=ON)(*arguments)
    torch.testing.assert_close(found, function(*arguments), rtol=1e-4, atol=1e-4)


def test_parts_that_are_returned_lie_where_eagers_do() -> None:
    weight = torch.randn(24, 8)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return torch.mm(x, weight.mT).chunk(2, -1)

    x = torch.randn(1, 8)
    with torch.no_grad():
        places = [
            [(part.storage_offset(), part.untyped_storage().nbytes()) for part in call(x)]
            for call in (function, torch.compile(function, backend="opara", options=ON))
        ]
    assert places[0] == places[1]


def test_memory_that_a_view_counts_on_is_left_as_it_is() -> None:
    layer = nn.Linear(8, 24)

    def function(x: Tensor) -> Tensor:
        first, second = layer(x).chunk(2, -1)
        return first.as_strided((1, 24), (24, 1), 0) * 1 + second.sum()

    x = torch.randn(1, 8)
    with torch.no_grad():
        found = torch.compile(function, backend="opara", options=ON)(x)
        torch.testing.assert_close(found, function(x), rtol=1e-4, atol=1e-4)
