"""The one door to PyTorch's private API.

Everything under `torch._inductor`, `torch._dynamo`, `torch._functorch` and `torch._C` that is not documented is
imported here and nowhere else, each with the versions it was seen in and what breaks without it.
Takes: an installed torch >= 2.11. Importing this module imports Inductor (about a second), so nobody imports it
before something is compiled. Must not change: anything; `wrapper_codegen_for` restores what it replaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# Seen 2.11, 2.13. Raised through a backend where Dynamo is to trace once more. Without it a graph whose rewrites are
# taken for the reason would be compiled twice.
from torch._dynamo.exc import RestartAnalysis

# Seen 2.11, 2.13, 2.15. Without them: no counters in `torch._dynamo.utils.counters`, which tools read.
from torch._dynamo.utils import counters

# Seen 2.13, 2.15. Puts artefacts into the log that TORCH_TRACE asks for and `tlparse` reads, and names the
# compilation they belong to. Without them: no artefacts, and graphs without a name in profiles.
from torch._guards import CompileContext

# Seen 2.11, 2.13, 2.15. Without it: no typed check of Inductor's own option keys, nor their defaults.
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

# Seen 2.11, 2.13, 2.15. Which code generator serves a device. Without it our wrapper is never asked.
from torch._inductor.codegen.common import DeferredLineBase, device_codegens, init_backend_registration

# Seen 2.11, 2.13. Writes Triton kernels, and with `triton.enable_pdl` decides where they wait for what ran before.
# Without it that option would be unsafe on several streams.
from torch._inductor.codegen.triton import TritonKernel

# Seen 2.11, 2.13, 2.15. What every structured wrapper line is; its class's name tells what it does (`lowering.lines`).
# Without it no lowered call can be told from text.
# `can_match_buffer_size`: whether two buffers are alike enough to be one. Without it nothing is written in place.
from torch._inductor.codegen.wrapper import PythonWrapperCodegen, WrapperLine, can_match_buffer_size

# Seen 2.11, 2.13, 2.15. Inductor's front door, and the hook that sees each AOT graph. Without them: no lowering.
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

# Seen 2.11, 2.13, 2.15. A pass with a uuid() enters every cache key. Without it our generated modules and stock
# Inductor's would answer to the same key.
from torch._inductor.custom_graph_pass import CustomGraphPass

# Seen 2.11, 2.13, 2.15. The layout of a buffer with memory of its own. Without it nothing is written in place.
from torch._inductor.ir import FixedLayout

# Seen 2.11, 2.13, 2.15. Times the configurations of a Triton kernel when it is first launched, and keeps the best.
# Without it processes of `bench campaign` disturb each other at that, and stock and ours come to run other kernels.
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

# Seen 2.11, 2.13, 2.15. A computation among the parts of a fused kernel, such a kernel, and several joined in one.
# Without the first nothing is written in place, without all of them no small kernels are joined.
from torch._inductor.scheduler import ForeachKernelSchedulerNode, FusedSchedulerNode, SchedulerNode

# Seen 2.11, 2.13, 2.15. Text with indentation, which lines write themselves into.
from torch._inductor.utils import IndentedBuffer

# Seen 2.11, 2.13, 2.15. The graph being lowered. Without it: no buffers, sizes, constants.
from torch._inductor.virtualized import V, ops
from torch._logging._internal import trace_structured

# Seen 2.11, 2.13, 2.15. Tells whether a storage is still held, by a view for instance, after its Python object is gone.
# Without it an output lent with copy_outputs=False could not be taken back.
from torch.multiprocessing.reductions import StorageWeakRef as WeakStorage

__all__ = [
    "TAKES_SEVERAL_PASSES",
    "CachingAutotuner",
    "CustomGraphPass",
    "DeferredLineBase",
    "FixedLayout",
    "ForeachKernelSchedulerNode",
    "FusedSchedulerNode",
    "IndentedBuffer",
    "PythonWrapperCodegen",
    "RestartAnalysis",
    "SchedulerNode",
    "TritonKernel",
    "V",
    "WeakStorage",
    "WrapperLine",
    "abandon_pool",
    "break_behind",
    "cache_directory",
    "can_match_buffer_size",
    "channels_last",
    "check_inductor_option",
    "clear_cublas_workspaces",
    "clears_cublas_workspaces_by_stream",
    "compile_fx",
    "compile_fx_inner",
    "compiled_with",
    "contiguous",
    "counters",
    "current_compile_id",
    "current_device",
    "current_stream_key",
    "elementwise",
    "extern_call",
    "forbid_access",
    "forget_compiled",
    "has_ordered_effect",
    "inductor_config",
    "inductor_option_names",
    "is_capturing",
    "is_cudnn_convolution",
    "joining_kernels_by",
    "known_at_least",
    "known_equal",
    "laid_out_for_convolution",
    "list_mode_options",
    "lowerings",
    "occupy",
    "ops",
    "own_output_strides",
    "prefers_channels_last",
    "same_addresses",
    "storage_over",
    "trace_artifact",
    "waiting_whatever_ran_before",
    "will_prefer_channels_last",
    "without_autograd_cache",
    "wrapper_codegen_for",
]

# Seen 2.13, 2.15: `post_grad_custom_pre_pass` takes a list, too, and passes that are told whether the graph is for
# inference. 2.11 takes one pass.
TAKES_SEVERAL_PASSES = hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes")

_REGISTRATION = threading.RLock()


@contextlib.contextmanager
def wrapper_codegen_for(devices: tuple[str, ...], codegen: type) -> Iterator[None]:
    """Let `codegen` write the wrappers for `devices` while the block runs, then put back what was there.

    The registry is process-wide, so `codegen.create` must itself decide whether the asking thread is ours.
    """
    with _REGISTRATION:
        init_backend_registration()
        before = {device: device_codegens[device] for device in devices if device in device_codegens}
        try:
            for device, registered in before.items():
                device_codegens[device] = dataclasses.replace(registered, wrapper_codegen=codegen)
            yield
        finally:
            device_codegens.update(before)


def lowerings() -> dict[Any, Callable[..., Any]]:
    """What Inductor makes of each operator: functions from its boxes of tensors to others. Entries may be added.

    Seen 2.11, 2.13, 2.15. Without it products of vectors stay calls of libraries.
    """
    from torch._inductor.lowering import lowerings as found

    return found


def laid_out_for_convolution(operand: Any, result: Any) -> Any:
    """The box of an operand, laid out as Inductor lays out those of the convolution that has the box `result`.

    Seen 2.11, 2.13, 2.15 (torch/_inductor/kernel/conv.py). Without it a library copies its operands at every call.
    """
    from torch._inductor import ir

    operand.realize()
    if V.graph.layout_opt:
        return ir.ExternKernel.require_channels_last(operand)
    order = ir.get_stride_order(result.get_layout().stride, V.graph.sizevars.shape_env)
    return ir.ExternKernel.require_stride_order(operand, order)


def will_prefer_channels_last(graph: torch.fx.Graph) -> bool:
    """Whether `prefers_channels_last` will be true of an inference graph. Seen 2.11, 2.13, 2.14."""
    from torch._inductor.graph import GraphLowering

    return bool(GraphLowering.decide_layout_opt(SimpleNamespace(graph=graph), is_inference=True))


def prefers_channels_last() -> bool:
    """True if Inductor lays out the images of the graph that it lowers channels last. Seen 2.11, 2.13, 2.14."""
    return bool(V.graph.layout_opt)


def channels_last(image: Any) -> Any:
    """The box of an image, computed, and laid out channels last. Seen 2.11, 2.13, 2.14.

    Without it neighbouring threads would read what lies far apart.
    """
    from torch._inductor import ir

    image.realize()
    return ir.ExternKernel.require_channels_last(image)


def contiguous(operand: Any) -> Any:
    """The box of a tensor in a buffer, row after row. Seen 2.11, 2.13, 2.14.

    Without it Inductor computes it where it is read, or lays it out as what it is computed from.
    """
    from torch._inductor import ir

    operand.realize()
    return ir.ExternKernel.require_stride_order(operand, [*reversed(range(len(operand.get_size())))])


def elementwise(element: Callable[[Sequence[Any]], Any], like: Any) -> Any:
    """The box of a tensor as the one of the box `like`, whose elements `element` computes from their indices by `ops`.

    Computed once, whoever reads it. Seen 2.11, 2.13, 2.14. Without it depthwise convolutions stay calls of cuDNN.
    """
    from torch._inductor import ir

    box = ir.Pointwise.create(
        device=like.get_device(), dtype=like.get_dtype(), inner_fn=element, ranges=list(like.get_size())
    )
    box.realize()
    return box


def known_equal(one: Any, other: Any) -> bool:
    """True if two sizes are surely the same number; asks for no guard where they are symbols.

    Seen 2.11, 2.13, 2.15. Without it convolutions of dynamic sizes are not fused with a residual.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))


def known_at_least(size: Any, least: int) -> bool:
    """True if a size surely is `least` or more, with no guard asked for. Seen 2.11, 2.13, 2.15."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size >= least))


def extern_call(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """The box of what a call of `operator` returns, which allocates it. Seen 2.11, 2.13, 2.15."""
    from torch._inductor import ir

    return ir.TensorBox.create(ir.FallbackKernel.create(operator, *args))


def break_behind(gm: torch.fx.GraphModule) -> tuple[str, str] | None:
    """Why Dynamo ended the graph `gm` before its function ended, and at which line (`file:line`); None if it did not.

    Seen 2.11, 2.13, 2.15. Without it reports do not say where graphs were broken.
    """
    found = getattr(gm, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return None
    line = f"{found.user_stack[-1].filename}:{found.user_stack[-1].lineno}" if found.user_stack else ""
    return str(found.reason), line


@contextlib.contextmanager
def waiting_whatever_ran_before() -> Iterator[None]:
    """Let kernels of programmatic dependent launch (`triton.enable_pdl`) wait before they touch any memory.

    Such a kernel may start before the one ahead of it in its stream has ended, and waits before it reads what that one
    wrote. Inductor takes that to be the kernel it generated last; a schedule may put any other there.
    Seen 2.11, 2.13; where kernels are written differently, nothing is changed.
    """
    original: Any = getattr(TritonKernel, "_handle_pdl_before_access", None)
    if original is None:
        yield
        return

    def wait_first(kernel: Any, *args: Any, **kwargs: Any) -> None:
        scheduler: Any = V.graph.scheduler
        if scheduler is None:
            return original(kernel, *args, **kwargs)
        last, scheduler.previous_node = scheduler.previous_node, None  # then Inductor can rule nothing out
        try:
            original(kernel, *args, **kwargs)
        finally:
            scheduler.previous_node = last

    with _REGISTRATION:
        TritonKernel._handle_pdl_before_access = wait_first
        try:
            yield
        finally:
            TritonKernel._handle_pdl_before_access = original


@contextlib.contextmanager
def joining_kernels_by(groups: Callable[[Any], list[list[Any]]], asked: Callable[[], bool]) -> Iterator[None]:
    """Let `groups` say which kernels of a scheduler are joined under `combo_kernels`, where `asked()` says so.

    Process-wide, so that `asked` must itself decide whether the asking thread is ours.
    Seen 2.11, 2.13, 2.15. Without it small kernels are not joined: Inductor's own choice joins large ones.
    """
    kind = ForeachKernelSchedulerNode
    with _REGISTRATION:
        original = kind.group_algorithm_for_combo_kernels
        kind.set_group_algorithm_for_combo_kernels(lambda nodes: groups(nodes) if asked() else original(nodes))
        try:
            yield
        finally:
            kind.set_group_algorithm_for_combo_kernels(original)


@contextlib.contextmanager
def own_output_strides() -> Iterator[None]:
    """Let what is compiled while the block runs tell nobody the strides of its outputs.

    Seen 2.11, 2.13, 2.15. Without it AOTAutograd is told twice, and refuses.
    """
    with torch._guards.TracingContext.report_output_strides():
        yield


def without_autograd_cache() -> Any:
    """A context in which AOTAutograd keeps and finds nothing; Inductor's own cache of graphs stays as it is.

    Seen 2.11, 2.13, 2.15. Without it a new process finds the first lowering of a graph, and not the others.
    """
    import torch._functorch.config as functorch_config

    return functorch_config.patch(enable_autograd_cache=False)


def inductor_option_names() -> tuple[str, ...]:
    """Every configuration key of Inductor, dotted, sorted. Seen 2.11, 2.13, 2.15."""
    return tuple(sorted(inductor_config.get_config_copy()))


def cache_directory() -> Path:
    """Where Inductor keeps what it compiled. Seen 2.13, 2.15; without it `cache` and `doctor` know no place."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def current_compile_id() -> Any:
    """What torch calls the compilation under way (`0/0`), or None."""
    return CompileContext.current_compile_id()


def trace_artifact(name: str, document: Callable[[], Any], compile_id: Any = None) -> None:
    """Put `document`, plain data, into the structured log of the compilation; nothing is made if nobody listens."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(document(), indent=1),
        expect_trace_id=False,
        compile_id=compile_id,
    )


def has_ordered_effect(operator: Any) -> bool:
    """True if `operator` is registered as doing something on the host whose order counts.

    Seen 2.11, 2.13, 2.15. Without it such operators, which share no tensor, could change places.
    """
    from torch._higher_order_ops import effects

    return isinstance(operator, torch._ops.OpOverload) and effects._get_effect(operator) is not None


def clear_cublas_workspaces(streams: Sequence[torch.cuda.Stream] | None = None) -> None:
    """Forget the workspaces cuBLAS keeps for `streams`, so that the next call allocates its own (pytorch#193402).

    Without `streams`, and where torch cannot tell streams apart, those of all streams and threads are forgotten, also
    while they are in use.
    Seen 2.11, 2.13, 2.15. Without it a captured graph may read a workspace somebody else frees.
    """
    clear = _clear_cublas_workspaces_of_one_stream()
    if clear is None or streams is None:
        torch._C._cuda_clearCublasWorkspaces()
        return
    for stream in streams:
        clear(stream.cuda_stream)


def clears_cublas_workspaces_by_stream() -> bool:
    """True if `clear_cublas_workspaces` leaves other streams alone."""
    return _clear_cublas_workspaces_of_one_stream() is not None


@functools.cache
def _clear_cublas_workspaces_of_one_stream() -> Callable[[int], None] | None:
    """`at::cuda::clearCublasWorkspacesForStream`, which Python cannot reach otherwise; takes a `cudaStream_t`.

    Declared in 2.13's headers; 2.11 has none (pytorch#175276). Without it other threads' workspaces go with ours.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        found: Any = library._ZN2at4cuda30clearCublasWorkspacesForStreamEP11CUstream_st
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p], None
    return found


def is_cudnn_convolution(
    x: tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device],
    weight: tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device],
    **settings: Any,
) -> bool:
    """True if cuDNN computes a convolution without bias of such operands (size, stride, dtype, device).

    Seen 2.11, 2.13, 2.15. Without it convolutions allocate their outputs themselves.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        operands = [torch.empty_strided(s, t, dtype=d, device=on) for s, t, d, on in (x, weight)]
        found = torch._C._select_conv_backend(*operands, bias=None, bias_sizes=None, **settings)
    return bool(found == torch._C._ConvBackend.Cudnn)  # type: ignore[attr-defined]


# Seen 2.11, 2.13, in builds with CUDA. The index of the current device, and whether the current stream is being
# captured. Without them every call goes through functions of Python that first ask whether CUDA is initialised.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)

# Seen 2.11, 2.13, 2.14, in builds with CUDA. What tells the current stream of a CUDA device, named by its index, from
# its others; None where torch does not say. Without it every call makes an object of the stream, to compare it.
current_stream_key: Callable[[int], Any] = getattr(torch._C, "_cuda_getCurrentStream", lambda index: None)


def _same_addresses(tensors: list[Any], addresses: list[int], positions: list[int]) -> bool:
    found = map(torch.Tensor.data_ptr, map(tensors.__getitem__, positions))
    return all(map(operator.eq, found, map(addresses.__getitem__, positions)))


# Seen 2.11, 2.13, in builds with CUDA: whether the tensor at each of `positions` lies at the address that stands there
# in `addresses`. Without it C iterators do as much, of 287 in 27 us, not 23, on a GPU's host.
same_addresses: Callable[[list[Any], list[int], list[int]], bool] = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", _same_addresses
)


def occupy(seconds: float) -> None:
    """Keep the current CUDA stream busy for about so long, on one multiprocessor. At 2 GHz: no GPU is much faster.

    Seen 2.11, 2.13. Without it the replays of small graphs are timed no faster than the host launches them.
    """
    if (sleep := getattr(torch.cuda, "_sleep", None)) is not None:
        sleep(round(2e9 * seconds))


def storage_over(address: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """A storage over memory that somebody else owns and frees.

    Seen 2.11, 2.13, 2.15. Without it outputs that are not copied could not be told from the memory they lie in.
    """
    storage: Any = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return storage


def forbid_access(storage: WeakStorage, message: str) -> None:
    """From now on whoever asks for the data behind `storage` gets a RuntimeError that says `message`.

    Seen 2.11, 2.13, 2.15, in builds with CUDA. Without it an overwritten output reads wrong.
    """
    held = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    if held is not None:
        torch._C._set_storage_data_ptr_access_error_msg(held._cdata, message)


def abandon_pool(device: torch.device, pool: tuple[int, int]) -> None:
    """End a failed capture's claim on memory pool `pool`, which `CUDAGraph.reset` gives back only after a success.

    Seen 2.11, 2.13, 2.15. Without it what a failed capture allocated is never freed (pytorch#190348).
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):  # it failed further on, when the first was done
            end(index, pool)


def compiled_with(compiled: Any) -> tuple[Any, dict[str, Any], bool | None] | None:
    """What `torch.compile` was given to make `compiled`: the callable, `mode` and `options`, `dynamic`.

    None if it is not compiled. Seen 2.11, 2.13, 2.15. Without it reports use default options.
    """
    compiled = getattr(compiled, "_compiled_call_impl", None) or compiled  # `module.compile()`
    if isinstance(compiled, torch.nn.Module):
        original = getattr(compiled, "_orig_mod", None)
        contexts = [getattr(compiled, "dynamo_ctx", None)]
    else:
        original = getattr(compiled, "_torchdynamo_orig_callable", None)
        contexts = [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ()]
    if original is None:
        return None
    for context in contexts:
        backend: Any = getattr(context, "callback", None)
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        if hasattr(backend, "compiler_fn"):
            return original, dict(backend.kwargs), backend.dynamic
    return original, {}, None


def forget_compiled(function: Any) -> None:
    """Drop what Dynamo compiled for the code of `function`.

    Seen 2.11, 2.13, 2.15. Without it what `explain` compiled, captured graphs included, lives as long as the process.
    """
    torch._dynamo.eval_frame.reset_code(function.__code__)


def check_inductor_option(key: str, value: Any) -> None:
    """Raise ValueError if `value` is not of the type Inductor declares for `key`. Seen 2.11, 2.13, 2.15."""
    declared = inductor_config.get_type(key)
    # Parametrised types (Optional, Literal, Callable) are left to Inductor, as torch.compile leaves them.
    if getattr(declared, "__origin__", None) is None and isinstance(declared, type) and not isinstance(value, declared):
        raise ValueError(
            f"Inductor option {key!r} takes a {declared.__name__}, got {value!r} of type {type(value).__name__}"
        )
