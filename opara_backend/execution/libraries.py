"""Library calls of generated modules that no operator of torch's makes as they are needed.

Takes: tensors. Gives: outputs, filled or new. Must not change: anything but those.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)


def convolution_out(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: torch.Tensor,
) -> None:
    """cuDNN's convolution of `x` with `weight` into `out`, under the settings that `aten.convolution` goes by.

    Where cuDNN has been switched off since the choice fell on it, `aten.convolution` itself, and a copy.
    """
    cudnn = torch.backends.cudnn
    if not cudnn.enabled:
        unpadded = [0] * len(stride)
        out.copy_(torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, unpadded, groups))
        return
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    # Not `cudnn.allow_tf32`, which raises where the setting was made by operator; this one knows both ways.
    tf32 = x.dtype is torch.float32 and cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    torch.ops.aten.cudnn_convolution.out(
        x, weight, padding, stride, dilation, groups, cudnn.benchmark, deterministic, tf32, out=out
    )


def convolution_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """`relu(convolution(x, weight) + bias + residual)` of images `(n, c, h, w)`, as one kernel of cuDNN's on a GPU.

    In parts where cuDNN has been switched off, or is to be deterministic, which torch does not ask of fused kernels, or
    where it has none for these sizes and types, which is said once.
    """
    if x.is_cuda and has_fused_convolutions():
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1, bias, stride, padding, dilation, groups)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
                raise
            _say_once(f"cuDNN cannot compute {tuple(x.shape)} * {tuple(weight.shape)} in {x.dtype} as one: {error}")
    settings = (stride, padding, dilation, False, [0] * len(stride), groups)
    result: torch.Tensor = torch.ops.aten.convolution(x, weight, bias, *settings)
    return (result if residual is None else result.add_(residual)).relu_()


def has_fused_convolutions() -> bool:
    """True if torch's settings let cuDNN compute a convolution, bias and ReLU as one."""
    cudnn = torch.backends.cudnn
    return cudnn.enabled and not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())


@functools.lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    log.warning("%s; computed in parts: leave fuse_convolutions off for this model", message)
