"""What graphs become on CUDA, seen without a GPU: each line of Inductor's is understood, rewrites leave fewer calls.

Of the benchmark's models those that a build of torch for the CPU can trace for CUDA: none that writes to its inputs,
and not the BiLSTM, whose cells are one operator on CUDA alone.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

from bench import models
from bench.models.encoder import Block
from bench.models.inception import Branches, Conv
from opara_backend.lowering.joining import MOST
from tests.lowered_for_cuda import Lowered, lowered
from tests.rewrites import only

MODELS = ("bert_base", "deepfm", "dlrm", "googlenet", "resnet50", "squeezenet", "two_tower")


@functools.cache
def of_model(name: str, plain: bool) -> Lowered:
    """A reduced model at batch 1 in float16, with the rewrites that are on by default, or none."""
    entry = models.get(name).reduced()
    inputs = (x.half() if x.is_floating_point() else x for x in entry.inputs(1))
    return lowered(entry.build().half().eval(), *inputs, **(only() if plain else {}))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "rewritten"])
@pytest.mark.parametrize("name", MODELS)
def test_every_line_is_understood(name: str, plain: bool) -> None:
    found = of_model(name, plain)
    found.graph.verify()
    assert found.graph.device == "cuda:0"
    assert len(found.graph.segments) == 1, "the host decides nothing in between"
    assert not any(kernel.host for kernel in found.graph.kernels)
    kinds = {kernel.kind for kernel in found.graph.kernels}
    assert kinds <= {"triton", "extern"}
    assert "triton" in kinds
    assert found.text.count(".run(") == len(found.calls("triton")), "each launch is a kernel"


@pytest.mark.parametrize("name", MODELS)
def test_rewrites_leave_fewer_calls_of_libraries_or_kernels(name: str) -> None:
    """Where weights are folded there may be more kernels, which wait for nothing."""
    plain, rewritten = of_model(name, True), of_model(name, False)
    calls = [len(found.calls("extern")) for found in (rewritten, plain)]
    kernels = [len(found.graph) for found in (rewritten, plain)]
    assert calls[0] <= calls[1]
    assert calls[0] < calls[1] or kernels[0] < kernels[1]


@pytest.mark.parametrize(("name", "calls"), [("deepfm", 0), ("two_tower", 0), ("dlrm", 1)])
def test_recommenders_need_no_library_at_batch_1(name: str, calls: int) -> None:
    """But for the products of all pairs in a DLRM."""
    assert len(of_model(name, True).calls("extern")) > 4
    assert len(of_model(name, False).calls("extern")) == calls


def products(found: Lowered) -> int:
    return sum(call.rpartition(".")[2] in ("mm", "addmm") for call in found.calls("extern"))


def test_query_key_and_value_are_one_product() -> None:
    block, x = Block(256, 4, pre_norm=False, eps=1e-6).half().eval(), torch.randn(1, 128, 256).half()
    assert products(lowered(block, x, **only())) == 6
    assert products(lowered(block, x)) == 4


def test_convolutions_are_fused_or_merged_but_none_is_computed_twice() -> None:
    branches = Branches(Conv(32, 16, 1), nn.Sequential(Conv(32, 24, 1), Conv(24, 32, 3)), nn.Sequential(Conv(32, 8, 1)))
    model = nn.Sequential(Conv(3, 32, 3), branches, nn.Conv2d(56, 8, 1)).half().eval()
    x = torch.randn(2, 3, 40, 40).half()

    def convolutions(**options: bool) -> tuple[int, int, int]:
        """How many calls there are, how many of them are fused, and the operations of all."""
        kernels = lowered(model, x, **options).graph.kernels
        found = [k for k in kernels if k.kind == "extern" and "convolution" in k.call]
        return len(found), sum("convolution_relu" in k.call for k in found), sum(k.flops or 0 for k in found)

    count, fused, needed = convolutions(**only())
    assert (count, fused) == (6, 0)
    assert needed > 0
    for rewrites, expected in (
        (("merge_convolutions",), (4, 0)),
        (("fuse_convolutions",), (6, 2)),  # ReLUs that end in the concatenation stay apart
        (("fuse_convolutions", "merge_convolutions"), (5, 2)),
    ):
        count, fused, operations = convolutions(**only(*rewrites))
        assert (count, fused) == expected
        assert operations <= 1.03 * needed, "of one, 7 per cent"


@pytest.mark.parametrize(("dtype", "channels", "fused"), [("float32", 32, 1), ("float32", 384, 2), ("float16", 32, 2)])
def test_residuals_are_left_where_cudnn_is_slow_at_adding_them(dtype: str, channels: int, fused: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norms[0](self.layers[0](x)).relu()
            return self.layers[2]((self.norms[1](self.layers[1](y)) + x).relu())

    kind = getattr(torch, dtype)
    found = lowered(Block().to(kind).eval(), torch.randn(1, channels, 14, 14, dtype=kind))
    assert sum("convolution_relu" in call for call in found.calls("extern")) == fused


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_depthwise_layers_call_no_library_and_read_filters_side_by_side(dtype: str) -> None:
    """Neighbouring threads read filters of neighbouring channels; what follows is fused."""
    layers = [nn.Conv2d(48, 48, 5, 1, 2, groups=48, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 8, 1)]
    model = nn.Sequential(nn.Conv2d(8, 48, 1), *layers).to(getattr(torch, dtype)).eval()
    found = lowered(model, torch.randn(1, 8, 28, 28, dtype=getattr(torch, dtype)), fuse_convolutions=False)
    assert len(found.calls("extern")) == 2
    body = written_out(found, 2 * 25 * 48 * 28 * 28)
    assert body.count("tl.store") == 1
    assert "sqrt" in body, "the batch norm is part of it"
    for tap in range(1, 25):
        assert f"({48 * tap} + x0)" in body, "the filters of a tap lie side by side"


def written_out(found: Lowered, flops: int) -> str:
    """The text of the one kernel with a depthwise convolution of so many operations, and not many more."""
    (written,) = (k for k in found.graph.kernels if k.kind == "triton" and (k.flops or 0) >= flops)
    assert (written.flops or 0) < 1.5 * flops
    (body,) = (part for part in found.text.split("\ndef ")[1:] if part.startswith(f"{written.call}("))
    return body.partition("\n'''")[0]


def test_a_depthwise_layer_has_its_image_laid_out_channels_last() -> None:
    """One that is given otherwise; the kernel that does so does not count as the convolution."""
    model = nn.Sequential(nn.Conv2d(48, 48, 5, 1, 2, groups=48), nn.ReLU()).half().eval()
    body = written_out(lowered(model, torch.randn(1, 48, 28, 28).half()), 2 * 25 * 48 * 28 * 28)
    reads = re.findall(r"in_ptr\d \+ \((?:\(?(-?\d+)\)? \+ )?\w0 \+ 48\*\w\d\)", body)
    assert sorted(int(read or 0) for read in reads) == [
        48 * (28 * row + column) for row in range(-2, 3) for column in range(-2, 3)
    ], "the pixel beside is 48 elements on"


def test_depthwise_sums_are_of_float32_though_inductor_is_told_to_keep_the_type() -> None:
    model = nn.Sequential(nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.ReLU()).half().eval()
    found = lowered(model, torch.randn(1, 48, 28, 28).half(), **{"triton.codegen_upcast_to_fp32": False})
    body = written_out(found, 2 * 9 * 48 * 28 * 28)
    assert body.count("tl.load(") == 19
    assert body.count(".to(tl.float32)") == 19, "an image's and a filter's element of each tap, and the bias"


def test_what_is_folded_anew_is_launched_in_parts_that_compile_fast() -> None:
    """Layers in one part follow each other: none waits for what a later part makes."""
    model = nn.Sequential(*(Conv(8, 8, 1) for _ in range(25))).half().eval()
    kernels = lowered(model, torch.randn(1, 8, 48, 48).half()).graph.kernels
    parts = [set(kernel.writes) for kernel in kernels if "triton_for" in kernel.call]
    assert sum(map(len, parts)) == 50, "a weight and a shift of each"
    assert max(map(len, parts)) <= MOST
    assert len(parts) == -(-50 // MOST)
    calls = [set(kernel.reads) for kernel in kernels if "convolution_relu" in kernel.call]
    assert len(calls) == 25
    read = [[number for number, part in enumerate(parts) if part & reads] for reads in calls]
    assert read == sorted(read)
    assert sum(map(len, read)) <= len(calls) + len(parts) - 1
