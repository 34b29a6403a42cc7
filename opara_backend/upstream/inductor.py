"""What of Inductor this package calls and names: its front door, its IR and its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Seen 2.11, 2.13, 2.15. Without it: no typed check of Inductor's own option keys, nor their defaults.
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

# Seen 2.11, 2.13, 2.15. A line that is written if its time comes. Without it no lowered call can be told from text.
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
from torch._inductor.virtualized import V

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
    "SchedulerNode",
    "TritonKernel",
    "V",
    "WrapperLine",
    "cache_directory",
    "can_match_buffer_size",
    "check_inductor_option",
    "compile_fx",
    "compile_fx_inner",
    "has_ordered_effect",
    "inductor_config",
    "inductor_option_names",
    "is_cudnn_convolution",
    "list_mode_options",
    "lowerings",
]

# Seen 2.13, 2.15: `post_grad_custom_pre_pass` takes a list, too, and passes that are told whether the graph is for
# inference. 2.11 takes one pass.
TAKES_SEVERAL_PASSES = hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes")


def lowerings() -> dict[Any, Callable[..., Any]]:
    """What Inductor makes of each operator: functions from its boxes of tensors to others. Entries may be added.

    Seen 2.11, 2.13, 2.15. Without it products of vectors stay calls of libraries.
    """
    from torch._inductor.lowering import lowerings as found

    return found


def inductor_option_names() -> tuple[str, ...]:
    """Every configuration key of Inductor, dotted, sorted. Seen 2.11, 2.13, 2.15."""
    return tuple(sorted(inductor_config.get_config_copy()))


def check_inductor_option(key: str, value: Any) -> None:
    """Raise ValueError if `value` is not of the type Inductor declares for `key`. Seen 2.11, 2.13, 2.15."""
    declared = inductor_config.get_type(key)
    # Parametrised types (Optional, Literal, Callable) are left to Inductor, as torch.compile leaves them.
    if getattr(declared, "__origin__", None) is None and isinstance(declared, type) and not isinstance(value, declared):
        raise ValueError(
            f"Inductor option {key!r} takes a {declared.__name__}, got {value!r} of type {type(value).__name__}"
        )


def cache_directory() -> Path:
    """Where Inductor keeps what it compiled. Seen 2.13, 2.15; without it `cache` and `doctor` know no place."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def has_ordered_effect(operator: Any) -> bool:
    """True if `operator` is registered as doing something on the host whose order counts.

    Seen 2.11, 2.13, 2.15. Without it such operators, which share no tensor, could change places.
    """
    from torch._higher_order_ops import effects

    return isinstance(operator, torch._ops.OpOverload) and effects._get_effect(operator) is not None


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
