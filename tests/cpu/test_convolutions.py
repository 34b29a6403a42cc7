"""cuDNN's convolutions fill buffers of the program's; who computes one is decided where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from opara_backend import upstream
from opara_backend.execution.libraries import convolution_out
from opara_backend.kernel_graph import Buffer
from opara_backend.lowering.convolutions import with_out
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.sorting import Sorter
from opara_backend.upstream import FixedLayout, V

GPU = torch.device("cuda:0")
TEXT = (
    "buf1 = extern_kernels.convolution(buf0, reinterpret_tensor(arg1, (8, 4, 3, 3), (36, 9, 3, 1), 0), stride=(1, 1), "
    "padding=(1, 1), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1, bias=None)"
)


class Operand:
    def __init__(self, *size: Any) -> None:
        self.size = size

    def get_size(self) -> tuple[Any, ...]:
        return self.size

    def get_stride(self) -> tuple[int, ...]:
        return tuple(torch.empty(self.size, device="meta").stride())

    def get_dtype(self) -> torch.dtype:
        return torch.float16

    def get_device(self) -> torch.device:
        return GPU


class Symbolic(Operand):
    def get_stride(self) -> tuple[int, ...]:
        return (144, 36, 6, 1)


class ExternKernelAlloc(Operand):
    python_kernel_name = "extern_kernels.convolution"
    origins = ()

    def __init__(self, *inputs: Operand) -> None:
        super().__init__(1, 8, 6, 6)
        self.inputs = inputs

    def get_name(self) -> str:
        return "buf1"

    def get_outputs(self) -> list[Any]:
        return [self]

    def get_output_spec(self) -> FixedLayout:
        return FixedLayout(GPU, torch.float16, [1, 8, 6, 6])


class ExternKernelAllocLine:
    def __init__(self, node: Any) -> None:
        self.node = node


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> ExternKernelAlloc:
    monkeypatch.setattr(upstream, "is_cudnn_convolution", lambda x, weight, **settings: not settings["transposed"])
    return ExternKernelAlloc(Operand(1, 4, 6, 6), Operand(8, 4, 3, 3))


def test_the_output_is_a_buffer_like_any_other(node: ExternKernelAlloc) -> None:
    inputs = tuple(Buffer(name, "input", 64, "", "cuda:0") for name in ("buf0", "arg1"))
    writer = ProgramWriter(device="cuda:0", inputs=inputs, constants=(), symbols=())
    wrapper = SimpleNamespace(make_buffer_allocation=lambda made: f"{made.get_name()} = alloc('buf1')")
    graph = SimpleNamespace(wrapper_code=wrapper, get_allocation_storage_size=lambda made: 288)
    with V.set_graph_handler(graph):
        Sorter(writer, lambda line: None).sort(ExternKernelAllocLine(node), [TEXT], 0, None)
    found = writer.graph([])
    (kernel,) = found.kernels
    assert (set(kernel.reads), kernel.writes) == ({"buf0", "arg1"}, ("buf1",))
    (made,) = (b for b in found.buffers if b.name == "buf1")
    assert (made.planned, made.nbytes) == (True, 576)
    text = "\n".join(writer.body())
    assert text.index("buf1 = alloc('buf1')") < text.index("convolution_out(buf0,")


@pytest.mark.parametrize(
    "edit",
    [
        ("transposed=False", "transposed=True"),
        ("bias=None", "bias=arg2"),
        ("buf1 = ", ""),
        (", bias=None", ""),
        ("buf1", "hook(); buf1"),
    ],
    ids=["transposed", "with a bias", "bound to nothing", "an argument less", "with another statement"],
)
def test_what_is_not_plainly_cudnns_stays_as_it_is(node: ExternKernelAlloc, edit: tuple[str, str]) -> None:
    assert with_out(node, TEXT) is not None
    assert with_out(node, TEXT.replace(*edit)) is None


def test_sizes_that_may_ask_for_another_library(node: ExternKernelAlloc) -> None:
    node.inputs = (Operand(1, 4, 6), node.inputs[1])
    assert with_out(node, TEXT) is None
    node.inputs = (Symbolic(sympy.Symbol("s0"), 4, 6, 6), node.inputs[1])
    assert with_out(node, TEXT) is None


# --- when it is called -----------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def called(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What cuDNN is asked to do."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.ops.aten.cudnn_convolution, "out", lambda *args, out: seen.append(args))
    x, w = torch.ones(1, 4, 6, 6, dtype=dtype), torch.ones(8, 4, 3, 3, dtype=dtype)
    convolution_out(x, w, **SETTINGS, out=torch.empty(1, 8, 6, 6, dtype=dtype))
    (found,) = seen
    return found


@pytest.fixture
def tf32() -> Iterator[None]:
    """The setting may be changed in the test: by operator, or for all."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before  # of every operator


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_where_it_was_allowed_by_operator(tf32: None, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    """`cudnn.allow_tf32` raises then."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    assert called(monkeypatch)[-1] == allowed
    assert called(monkeypatch, torch.float16)[-1] is False


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_where_it_was_allowed_the_old_way(tf32: None, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    assert called(monkeypatch)[-1] == allowed


def test_without_cudnn_it_is_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of a library is made when a graph is lowered, and is in caches; the switch may be turned later."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    x, w, out = torch.randn(1, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.empty(1, 8, 6, 6)
    convolution_out(x, w, **SETTINGS, out=out)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, w, padding=1))
