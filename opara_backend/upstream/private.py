"""The one door to PyTorch's private API: nothing that is not documented is imported anywhere else.

Each import says with which versions it was seen and what breaks without it.
Takes: an installed torch >= 2.11. Gives: what is behind the door, by its own name. Must not change: anything.
"""

from __future__ import annotations

# Seen 2.11, 2.13. Raised through a backend where Dynamo is to trace once more. Without it a graph whose rewrites are
# taken for the reason would be compiled twice.
from torch._dynamo.exc import RestartAnalysis

# Seen 2.11, 2.13, 2.15. Without them: no counters in `torch._dynamo.utils.counters`, which tools read.
from torch._dynamo.utils import counters

# Seen 2.11, 2.13, 2.15. AOTAutograd's settings. Without them a new process finds the first lowering of a graph, and not
# the others.
from torch._functorch import config as functorch_config

# Seen 2.13, 2.15. Puts artefacts into the log that TORCH_TRACE asks for and `tlparse` reads, and names the
# compilation they belong to. Without them: no artefacts, and graphs without a name in profiles.
from torch._guards import CompileContext

# Seen 2.11, 2.13, 2.15. Which operators do something on the host whose order counts. Without it such operators, which
# share no tensor, could change places.
from torch._higher_order_ops import effects

# Seen 2.11, 2.13, 2.15. Without it: no typed check of Inductor's own option keys, nor their defaults.
from torch._inductor import config as inductor_config
from torch._inductor import ir, list_mode_options

# Seen 2.11, 2.13, 2.15. Which code generator serves a device: without it our wrapper is never asked. And a line of a
# wrapper whose text is made when it is written: without it such lines are unknown.
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

# Seen 2.11, 2.13, 2.14. Decides whether images are laid out channels last. Without it depthwise convolutions stay calls
# of cuDNN.
from torch._inductor.graph import GraphLowering

# Seen 2.11, 2.13, 2.15. The layout of a buffer with memory of its own. Without it nothing is written in place.
from torch._inductor.ir import FixedLayout

# Seen 2.11, 2.13, 2.15. What Inductor makes of each operator. Without it products of vectors stay calls of libraries.
from torch._inductor.lowering import lowerings

# Seen 2.11, 2.13, 2.15. Without it `cache` and `doctor` know no place, and no schedule is remembered.
from torch._inductor.runtime.cache_dir_utils import cache_dir

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

# Without it: see `CompileContext`.
from torch._logging._internal import trace_structured

# Seen 2.11, 2.13, 2.15. Tensors without data, to ask what would be done with them. Without it convolutions allocate
# their outputs themselves.
from torch._subclasses.fake_tensor import FakeTensorMode

# Seen 2.11, 2.13, 2.15. Tells whether a storage is still held, by a view for instance, after its Python object is gone.
# Without it an output lent with copy_outputs=False could not be taken back.
from torch.multiprocessing.reductions import StorageWeakRef as WeakStorage

# Seen 2.11, 2.13. A function of every value in nested lists, tuples and dictionaries. Without it kernels have no counts
# of operations, and models of `report` no inputs but tensors.
from torch.utils._pytree import tree_map

__all__ = [
    "CachingAutotuner",
    "CompileContext",
    "CustomGraphPass",
    "DeferredLineBase",
    "FakeTensorMode",
    "FixedLayout",
    "ForeachKernelSchedulerNode",
    "FusedSchedulerNode",
    "GraphLowering",
    "IndentedBuffer",
    "PythonWrapperCodegen",
    "RestartAnalysis",
    "SchedulerNode",
    "TritonKernel",
    "V",
    "WeakStorage",
    "WrapperLine",
    "cache_dir",
    "can_match_buffer_size",
    "compile_fx",
    "compile_fx_inner",
    "counters",
    "device_codegens",
    "effects",
    "functorch_config",
    "inductor_config",
    "init_backend_registration",
    "ir",
    "list_mode_options",
    "lowerings",
    "ops",
    "trace_structured",
    "tree_map",
]
