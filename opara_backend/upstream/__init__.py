"""The one door to PyTorch's private API.

Everything under `torch._inductor`, `torch._dynamo`, `torch._functorch` and `torch._C` that is not documented is
imported in this package and nowhere else, each with the versions it was seen in and what breaks without it. Here stands
what is used as it is; what needs a function has it in `dynamo`, `inductor`, `boxes` (of tensors that are lowered) or
`cuda`, and everybody asks here for that, too.
Takes: an installed torch >= 2.11. Importing this package imports Inductor (about a second), so nobody imports it
before something is compiled. Must not change: anything but for as long as a block runs.
"""

from __future__ import annotations

# Seen 2.11, 2.13. Raised through a backend where Dynamo is to trace once more. Without it a graph whose rewrites are
# taken for the reason would be compiled twice.
from torch._dynamo.exc import RestartAnalysis

# Seen 2.11, 2.13, 2.15. Without them: no counters in `torch._dynamo.utils.counters`, which tools read.
from torch._dynamo.utils import counters

# Seen 2.11, 2.13, 2.15. Without it: no typed check of Inductor's own option keys, nor their defaults.
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

# Seen 2.11, 2.13, 2.15. A line of a wrapper whose text is made when it is written. Without it such lines are unknown.
from torch._inductor.codegen.common import DeferredLineBase

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

# Seen 2.11, 2.13, 2.15. Tells whether a storage is still held, by a view for instance, after its Python object is gone.
# Without it an output lent with copy_outputs=False could not be taken back.
from torch.multiprocessing.reductions import StorageWeakRef as WeakStorage

# Seen 2.11, 2.13. A function of every value in nested lists, tuples and dictionaries. Without it kernels have no counts
# of operations, and models of `report` no inputs but tensors.
from torch.utils._pytree import tree_map

from opara_backend.upstream.boxes import (
    channels_last,
    contiguous,
    elementwise,
    extern_call,
    known_at_least,
    known_equal,
    laid_out_for_convolution,
    lowerings,
    prefers_channels_last,
    will_prefer_channels_last,
)
from opara_backend.upstream.cuda import (
    abandon_pool,
    clear_cublas_workspaces,
    clears_cublas_workspaces_by_stream,
    current_device,
    current_stream_key,
    forbid_access,
    is_capturing,
    is_cudnn_convolution,
    occupy,
    same_addresses,
    storage_over,
)
from opara_backend.upstream.dynamo import (
    break_behind,
    compiled_with,
    current_compile_id,
    forget_compiled,
    has_ordered_effect,
    own_output_strides,
    trace_artifact,
    without_autograd_cache,
)
from opara_backend.upstream.inductor import (
    TAKES_SEVERAL_PASSES,
    cache_directory,
    check_inductor_option,
    inductor_option_names,
    joining_kernels_by,
    waiting_whatever_ran_before,
    wrapper_codegen_for,
)

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
    "tree_map",
    "waiting_whatever_ran_before",
    "will_prefer_channels_last",
    "without_autograd_cache",
    "wrapper_codegen_for",
]
