"""Convolutions of patches as products: the same sizes, strides and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opara_backend.lowering import patches
from tests.agreement import Agree

ON = {"unfold_patches": True}


@pytest.fixture(autouse=True)
def also_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "DEVICES", ("cpu",))
    monkeypatch.setattr(patches, "SUMMED", 1)


class Followed(nn.Module):
    """A convolution, and what reads its result: by strides, as a view, and as a sequence of patches."""

    def __init__(self, kind: type[nn.Module], **arguments: Any) -> None:
        super().__init__()
        self.layer = kind(4, 6, **arguments)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        return y, y.flatten(2).mT.relu(), y.relu() + 1


PATCHES: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "square": (nn.Conv2d, {"kernel_size": 4, "stride": 4}, (1, 4, 12, 8)),
    "several images": (nn.Conv2d, {"kernel_size": 2, "stride": 2}, (3, 4, 4, 6)),
    "oblong": (nn.Conv2d, {"kernel_size": (2, 3), "stride": (2, 3)}, (2, 4, 4, 9)),
    "no bias": (nn.Conv2d, {"kernel_size": 4, "stride": 4, "bias": False}, (1, 4, 8, 8)),
    "one dimension": (nn.Conv1d, {"kernel_size": 5, "stride": 5}, (2, 4, 20)),
    "three dimensions": (nn.Conv3d, {"kernel_size": (1, 2, 2), "stride": (1, 2, 2)}, (2, 4, 3, 4, 4)),
}
OTHERS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "overlapping": (nn.Conv2d, {"kernel_size": 4, "stride": 2}, (1, 4, 12, 8)),
    "with gaps": (nn.Conv2d, {"kernel_size": 2, "stride": 4}, (1, 4, 12, 8)),
    "padded": (nn.Conv2d, {"kernel_size": 4, "stride": 4, "padding": 2}, (1, 4, 12, 8)),
    "dilated": (nn.Conv2d, {"kernel_size": 2, "stride": 2, "dilation": 2}, (1, 4, 12, 8)),
    "in groups": (nn.Conv2d, {"kernel_size": 4, "stride": 4, "groups": 2}, (1, 4, 12, 8)),
    "with a margin": (nn.Conv2d, {"kernel_size": 4, "stride": 4}, (1, 4, 13, 8)),
    "of one pixel": (nn.Conv2d, {"kernel_size": 1, "stride": 1}, (1, 4, 12, 8)),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2}, (1, 4, 4, 4)),
    "double precision": (nn.Conv2d, {"kernel_size": 4, "stride": 4, "dtype": torch.float64}, (1, 4, 12, 8)),
}


def convolutions(records: list[Any]) -> int:
    (record,) = records
    return sum("convolution" in kernel.call and "extern" in kernel.call for kernel in record.graph.kernels)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", PATCHES)
def test_patches_are_multiplied(case: str, last: bool, agree: Agree) -> None:
    kind, arguments, shape = PATCHES[case]
    model, images = Followed(kind, **arguments), torch.randn(3, *shape)
    if last and len(shape) == 4:
        model, images = model.to(memory_format=torch.channels_last), torch.randn(3, *shape).permute(0, 1, 3, 4, 2)
        images = images.contiguous().permute(0, 1, 4, 2, 3)
    found = agree(model, lambda call: (images[call],), options=ON)
    assert convolutions(found) == 0


def test_weights_are_read_where_they_are(agree: Agree) -> None:
    """Channels last too: their order is that of the rows then, and no copy is made at every call."""
    images = torch.randn(3, 1, 4, 12, 8)
    for kept in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        model = Followed(nn.Conv2d, kernel_size=4, stride=4).to(memory_format=kept)
        (record,) = agree(model, lambda call: (images[call],), options=ON)
        (product,) = (kernel for kernel in record.graph.kernels if "mm" in kernel.call)
        inputs = {buffer.name for buffer in record.graph.buffers if buffer.kind == "input"}
        assert len(inputs & set(product.reads)) == 2, "weights and bias"


@pytest.mark.parametrize("case", OTHERS)
def test_other_convolutions_stay(case: str, agree: Agree) -> None:
    kind, arguments, shape = OTHERS[case]
    model = Followed(kind, **arguments)
    images = torch.randn(3, *shape, dtype=arguments.get("dtype", torch.float32))
    found = agree(model, lambda call: (images[call],), options=ON)
    assert convolutions(found) == 1


def test_small_patches_and_unknown_sizes_stay(agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Followed(nn.Conv2d, kernel_size=2, stride=2), torch.randn(3, 5, 4, 8, 8)
    sized = [images[n, : 2 + n] for n in range(3)]
    assert convolutions(agree(model, lambda call: (sized[call % 3],), calls=6, options=ON, dynamic=True)) == 1
    monkeypatch.setattr(patches, "SUMMED", 128)
    torch._dynamo.reset()
    assert convolutions(agree(model, lambda call: (images[call],), options=ON)) == 1
