"""Functions of the generated module, which Inductor calls like operators, are one kernel each.

Inductor makes them of matrix products on a GPU only (`tests/gpu/test_subgraphs.py`); here what it writes is made up.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opara_backend.kernel_graph import Buffer
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.sorting import Sorter
from opara_backend.lowering.subgraphs import is_kernel
from opara_backend.upstream import V


class ExternKernelOut:
    python_kernel_name = "extern_kernels.bmm_dtype"


class FallbackKernel:
    op_overload = torch.ops.aten.rand.default


class ComputedBuffer:
    pass


class Conditional:
    pass


class ExternKernel(ExternKernelOut):
    pass


class SubgraphBuffer:
    """Of a product of `buf1` with `arg1`, split along k."""

    origins = ()

    def __init__(self, *operations: Any) -> None:
        self.subgraph = SimpleNamespace(name="decompose_k_mm_4_split_1", operations=list(operations))

    def get_name(self) -> str:
        return "buf2"

    def get_device(self) -> torch.device:
        return torch.device("cuda:0")

    def get_dtype(self) -> torch.dtype:
        return torch.float16


LINES = (
    "decompose_k_mm_4_split_1_args = [buf1, reinterpret_tensor(arg1, (1024, 8), (1, 1024), 0)]",
    "(buf2,) = decompose_k_mm_4_split_1(decompose_k_mm_4_split_1_args)",
)


def test_a_product_in_parts_is_one_kernel() -> None:
    node = SubgraphBuffer(ExternKernel(), ComputedBuffer())
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
    ("operation", "expected"), [(ExternKernel(), True), (ComputedBuffer(), True), (Conditional(), False)]
)
def test_what_the_host_decides_inside_is_left_to_it(operation: Any, expected: bool) -> None:
    assert is_kernel(SubgraphBuffer(operation)) == expected
    assert not is_kernel(operation)
