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
    """cuDNN's convolution of `x` with `weight` into `out`, under the settings that `aten.convolution` goes by."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    tf32 = x.dtype is torch.float32 and cudnn.allow_tf32
    torch.ops.aten.cudnn_convolution.out(
        x, weight, padding, stride, dilation, groups, cudnn.benchmark, deterministic, tf32, out=out
    )
