"""Graphs lowered for an H200 where there is none: Inductor writes its code for CUDA, no kernel is compiled or run.

Takes: a model on the CPU and its inputs. Gives: what this backend makes of the graph, parameters and inputs on CUDA.
Tensors are fake, so nothing is computed. Works with builds of torch for the CPU, too. Inductor is told what it would
ask the device, and its matching of patterns, which traces them on the device, is left out: attention stays as a model
writes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._decomp import get_decompositions
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.backends.compiler import GPUTarget

from opara_backend import backend, upstream
from opara_backend.kernel_graph import KernelGraph
from opara_backend.lowering.inductor import OparaWrapperCodegen
from opara_backend.lowering.program import ProgramWriter

H200 = SimpleNamespace(
    **{"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"total_memory": 141 << 30, "L2_cache_size": 60 << 20, "regs_per_multiprocessor": 65536, "gcnArchName": ""},
    **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "shared_memory_per_block": 49152},
    **{"shared_memory_per_block_optin": 232448, "shared_memory_per_multiprocessor": 233472, "uuid": ""},
)
SETTINGS = {"force_disable_caches": True, "joint_graph_constant_folding": False}


@dataclass(frozen=True)
class Lowered:
    """A graph of this backend for CUDA, and the text of the module that Inductor wrote."""

    graph: KernelGraph
    text: str

    def calls(self, kind: str) -> list[str]:
        """What its kernels of one kind call."""
        return [kernel.call for kernel in self.graph.kernels if kernel.kind == kind]


class _Written(BaseException):
    """The module's text is there, and goes no further."""


class _Driver:
    """What Triton is asked of the GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


def lowered(model: Callable[..., Any], *inputs: Any, **options: Any) -> Lowered:
    """What `model` is lowered to on CUDA, no rung of the ladder allowed."""
    gm, arguments, static = _traced(model, inputs)
    graphs: list[KernelGraph] = []
    texts: list[str] = []
    attempts: list[bool] = []
    written = ProgramWriter.graph

    def graph(self: ProgramWriter, *given: Any) -> KernelGraph:
        graphs.append(written(self, *given))
        return graphs[-1]

    def stop(self: Any, *_: Any) -> None:
        code = self.codegen()
        text = code[0] if isinstance(code, tuple) else code
        texts.append(getattr(text, "value", text))
        raise _Written

    def refuse(self: Any, lines: Any, code: Any, why: str) -> None:
        raise AssertionError(f"left to Inductor: {why}")

    def compile_graph(*given: Any, **more: Any) -> Any:
        attempts.append(True)
        return compiled(*given, **{**more, "static_input_idxs": static})  # as it is said of a graph of Dynamo's

    compiled = backend._compile_graph
    with (
        _as_if_there_was_one(),
        mock.patch.object(backend, "_compile_graph", compile_graph),
        mock.patch.object(ProgramWriter, "graph", graph),
        mock.patch.object(OparaWrapperCodegen, "leave_to_inductor", refuse),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        upstream.inductor_config.patch(SETTINGS),
    ):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given = [_on_cuda(value, mode) for value in arguments]
        for name, value in [*gm.named_buffers()]:
            setattr(gm, name, _on_cuda(value, mode))
        with (
            contextlib.suppress(_Written),
            torch.no_grad(),
            torch._guards.tracing(torch._guards.TracingContext(mode)),
        ):
            backend.compiled(gm, given, None, {"fallback": "error", **options})
    assert attempts == [True], "with the rewrites that were asked for, or it would have been compiled without"
    (found,), (text,) = graphs, texts
    return Lowered(found, text)


def _traced(model: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[torch.fx.GraphModule, list[Any], list[int]]:
    """The graph that Dynamo gives a backend, made for CUDA, its arguments, and which are parameters or buffers."""
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(gm: torch.fx.GraphModule, arguments: list[Any]) -> Any:
        found.append((gm, arguments))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    ((dynamo, arguments),) = found
    # As ATen's operators, which reach fake tensors on any device; torch's Python functions ask for the device before,
    # and so do some operators, which are taken apart.
    aten = torch.ops.aten
    table = get_decompositions([aten.index_select.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        gm = make_fx(dynamo, table, "fake", _allow_non_fake_inputs=True)(*arguments)
    for node in gm.graph.nodes:
        node.args, node.kwargs = torch.utils._pytree.tree_map(_elsewhere, (node.args, node.kwargs))
    gm.recompile()
    names = [node.name for node in dynamo.graph.nodes if node.op == "placeholder"]
    return gm, arguments, [place for place, name in enumerate(names) if "parameters_" in name or "buffers_" in name]


def _elsewhere(value: Any) -> Any:
    return torch.device("cuda", 0) if isinstance(value, torch.device) or value == "cpu" else value


def _on_cuda(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")


def _layout(image: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
    """Of a convolution's result, as cuDNN has it: channels last if either tensor is. Elsewhere it never is."""
    suggested = (torch._prims_common.suggest_memory_format(t) for t in (image, weight) if t.dim() == 4)
    return torch.channels_last if torch.channels_last in suggested else torch.contiguous_format


@contextlib.contextmanager
def _as_if_there_was_one() -> Iterator[None]:
    """Whoever asks for the GPU in the block is told of an H200."""
    from torch._inductor import scheduler, utils

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_properties": lambda *_: H200,
        "_get_device_properties": lambda *_: H200,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    with contextlib.ExitStack() as patched:
        for name, answer in answers.items():
            patched.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        patched.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _layout))
        for module in (scheduler, utils, torch.utils._triton):
            if hasattr(module, "has_triton"):
                patched.enter_context(mock.patch.object(module, "has_triton", return_value=True))
        for module in (joint_graph, post_grad):
            patched.enter_context(mock.patch.object(module, "lazy_init", return_value=None))
        before = dict(vars(triton.runtime.driver))  # which of them keeps the driver in use differs between versions
        triton.runtime.driver.set_active(_Driver())
        try:
            yield
        finally:
            vars(triton.runtime.driver).clear()
            vars(triton.runtime.driver).update(before)
