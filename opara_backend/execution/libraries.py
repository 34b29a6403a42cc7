"""Library calls of generated modules that no operator of torch's makes as they are needed.

Takes: tensors. Gives: nothing; outputs are filled. Must not change: anything but those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
