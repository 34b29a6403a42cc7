"""Functions of the generated module, which Inductor calls like operators, are one kernel each.

Inductor splits matrix products on a GPU only (`tests/gpu/test_subgraphs.py`): what it writes of them is made up here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opara_backend.kernel_graph import Buffer
from opara_backend.lowering.inductor import OparaWrapperCodegen, lowering
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.sorting import Sorter
from opara_backend.lowering.subgraphs import is_kernel
from opara_backend.lowering.under_way import LoweringRequest
from opara_backend.report.record import collect
from opara_backend.upstream import PythonWrapperCodegen, V
from tests.arguments import normal


class Operation:
    """On a device, None for one that has several results."""

    def __init__(self, device: str | None = "cuda:0") -> None:
        self.device = device

    def get_device(self) -> torch.device | None:
        return torch.device(self.device) if self.device is not None else None


class ExternKernel(Operation):
    python_kernel_name = "extern_kernels.bmm_dtype"


class ExternKernelOut(ExternKernel):
    pass


class DeviceCopy(ExternKernelOut):
    pass


class ComputedBuffer(Operation):
    pass


class Conditional(Operation):
    pass


class NotThereYet(ExternKernel):
    """Of a version to come."""


class SubgraphBuffer:
    """Of a product of `buf1` with `arg1`, split along k."""

    origins = ()

    def __init__(self, *operations: Any, **inputs: Any) -> None:
        self.subgraph = SimpleNamespace(
            name="decompose_k_mm_4_split_1", operations=list(operations), graph_inputs={"size": 8, **inputs}
        )

    def get_name(self) -> str:
        return "buf2"

    def get_outputs(self) -> list[Any]:
        return [self]

    def get_device(self) -> torch.device:
        return torch.device("cuda:0")

    def get_dtype(self) -> torch.dtype:
        return torch.float16


LINES = (
    "decompose_k_mm_4_split_1_args = [buf1, reinterpret_tensor(arg1, (1024, 8), (1, 1024), 0)]",
    "(buf2,) = decompose_k_mm_4_split_1(decompose_k_mm_4_split_1_args)",
)


def test_a_product_in_parts_is_one_kernel() -> None:
    node = SubgraphBuffer(ExternKernelOut(), ComputedBuffer())
    inputs = [Buffer(name, "input", 64, "", "cuda:0") for name in ("buf1", "arg1")]
    writer = ProgramWriter(device="cuda:0", inputs=tuple(inputs), constants=(), symbols=())
    sorter = Sorter(writer, lambda line: SimpleNamespace(node=node))
    with V.set_graph_handler(SimpleNamespace(try_get_buffer=lambda name: None)):
        for line in LINES:
            sorter.sort(line, [line], 0, None)
    graph = writer.graph([])
    (kernel,) = graph.kernels
    assert (kernel.kind, kernel.call, kernel.host) == ("extern", "decompose_k_mm_4_split_1", False)
    assert set(kernel.reads) == {"buf1", "arg1"}
    assert kernel.writes == ("buf2",)
    assert graph.segments == (0,)
    text = "\n".join(writer.body())
    assert text.index(LINES[0]) < text.index(LINES[1])


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (ExternKernelOut(), True),
        (ComputedBuffer(), True),
        (ExternKernelOut(None), True),
        (ComputedBuffer("cpu"), False),
        (Conditional(), False),
        (NotThereYet(), False),
        (DeviceCopy(), False),
        (SubgraphBuffer(ExternKernelOut()), True),
        (SubgraphBuffer(Conditional()), False),
        (SubgraphBuffer(ExternKernelOut(), x=Operation("cuda:0")), True),
        (SubgraphBuffer(ExternKernelOut(), x=Operation("cpu")), False),
    ],
)
def test_what_the_host_does_inside_is_left_to_it(operation: Any, expected: bool) -> None:
    assert is_kernel(SubgraphBuffer(ComputedBuffer(), operation)) == expected


@pytest.mark.parametrize(("name", "ours"), [(None, True), ("benchmark_decompose_k_mm_4_split_1", False)])
def test_what_is_compiled_alone_to_be_timed_is_stock_inductors(
    name: str | None, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 times the ways to split a product in the thread that compiles; each came out as a graph of its own."""
    stock = object()
    monkeypatch.setattr(PythonWrapperCodegen, "create", staticmethod(lambda *_: stock))
    monkeypatch.setattr(OparaWrapperCodegen, "__init__", lambda self: None)
    with V.set_graph_handler(SimpleNamespace(name=name)), lowering(LoweringRequest(), ("cpu",)):
        made = OparaWrapperCodegen.create(False, None, None)
    assert (made is not stock) == ours


# --- regions ---------------------------------------------------------------------------------------------------------


@torch.compiler.nested_compile_region
def layer(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return (x @ w).relu() + 1, x.sum(0)


def layers(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    first, total = layer(x, w)
    second, _ = layer(first, w)
    return layer(second.tanh(), w)[0] @ w + total, first


@torch.compiler.nested_compile_region
def noise(x: Tensor) -> Tensor:
    return F.dropout(x @ x, 0.5)


@torch.compiler.nested_compile_region
def branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y @ y, lambda y: y - 1, (x,))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_region_is_a_kernel(dynamic: bool | None) -> None:
    with torch.no_grad(), collect() as records:
        compiled = torch.compile(layers, backend="opara", dynamic=dynamic)
        for size in (8, 8, 12):
            given = normal(size, size, size), normal(1, size, size)
            torch.testing.assert_close(compiled(*given), layers(*given), rtol=1e-4, atol=1e-3)
    for record in records:
        assert (record.graph.segments, record.fallbacks) == ((0,), [])
        regions = [kernel for kernel in record.graph.kernels if kernel.call.startswith("repeated_subgraph")]
        assert len(regions) == 3
        assert not any("rng" in kernel.writes for kernel in regions)


def test_a_region_that_draws_numbers_draws_new_ones() -> None:
    x = torch.ones(32, 32)
    with torch.no_grad(), collect() as records:
        compiled = torch.compile(lambda x: (noise(x), noise(x + 0.5)), backend="opara")
        drawn = [compiled(x)[0] for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    regions = [kernel for kernel in records[0].graph.kernels if "subgraph" in kernel.call]
    assert len(regions) == 2
    assert all("rng" in kernel.writes for kernel in regions)


def test_a_region_with_a_branch_is_left_to_the_host() -> None:
    with torch.no_grad(), collect() as records:
        compiled = torch.compile(lambda x: branch(branch(x) * 2), backend="opara")
        for x in (torch.ones(4, 4), -torch.ones(4, 4)):
            torch.testing.assert_close(compiled(x), branch(branch(x) * 2))
    assert all(len(record.graph.segments) > 1 for record in records)
