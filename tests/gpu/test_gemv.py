"""Products of one row or one column as Triton reductions: no library is called, and results are at least as exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bench import models
from opara_backend.report.record import GraphRecord, collect
from tests.rewrites import only

OPTIONS = only("fuse_gemv", remember=False)
AT_BATCH_1 = ("deepfm", "dlrm", "two_tower", "llama_decode", "moe_decode", "bilstm_tagger")


def calls(record: GraphRecord) -> list[str]:
    return [kernel.call for kernel in record.graph.kernels]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("summed", [3, 64, 1000, 5632, 40_000])
@pytest.mark.parametrize("columns", [1, 7, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_linear_layers_of_one_row(bias: bool, summed: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(summed, columns, bias).to("cuda", dtype)
    x = torch.randn(1, summed, device="cuda", dtype=dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad(), collect() as records:
        call = torch.compile(lambda x: layer(x).relu(), backend="opara", options=OPTIONS)
        for _ in range(2):
            result = call(x)
        eager = layer(x)
    (record,) = records
    assert record.replays == 1
    assert not [name for name in calls(record) if "extern" in name], record.rewrites
    worst = max((eager - exact).abs().max().item(), torch.finfo(dtype).eps * exact.abs().max().item())
    assert (result - exact.relu()).abs().max().item() <= 1.5 * worst


@pytest.mark.parametrize("name", AT_BATCH_1)
def test_models_at_batch_1(name: str) -> None:
    entry = models.get(name).reduced()
    model, inputs = entry.build().cuda().eval(), tuple(x.cuda() for x in entry.inputs(1))
    twin = copy.deepcopy(model)
    with torch.no_grad(), collect() as records:
        call = torch.compile(model, backend="opara", fullgraph=True, options=OPTIONS)
        for _ in range(3):
            result, expected = call(*inputs), twin(*inputs)
            torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
    (record,) = records
    assert (record.replays, record.fallbacks) == (2, [])
    products = [name for name in calls(record) if name.endswith((".mm", ".addmm"))]
    assert len(products) <= 1, "one of the tagger's reads all its words at once"


def test_experts_of_a_layer_become_few_kernels() -> None:
    """Eight experts, three products each: those that read the same vector are one kernel."""
    torch.manual_seed(0)
    gates, ups, downs = (
        nn.ModuleList(nn.Linear(*sizes, bias=False) for _ in range(8)).cuda().half()
        for sizes in ((256, 512), (256, 512), (512, 256))
    )

    def experts(x: Tensor) -> Tensor:
        hidden = [nn.functional.silu(gate(x)) * up(x) for gate, up in zip(gates, ups, strict=True)]
        return sum(down(one) for down, one in zip(downs, hidden, strict=True))

    x = torch.randn(1, 256, device="cuda", dtype=torch.float16)
    counts = {}
    for fused in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), collect() as records:
            result = torch.compile(experts, backend="opara", options={**OPTIONS, "fuse_gemv": fused})(x)
            torch.testing.assert_close(result, experts(x), rtol=5e-3, atol=5e-3)
        counts[fused] = len(records[0].graph)
    assert counts[True] <= 6 < 24 < counts[False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_step_of_a_recurrent_cell_is_one_kernel(kind: type[nn.LSTMCell | nn.GRUCell], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cell = kind(64, 96).to("cuda", dtype)
    words = torch.randn(6, 1, 64, device="cuda", dtype=dtype)

    def run(words: Tensor) -> Tensor:
        state = words.new_zeros(1, 96)
        memory = state
        for word in words.unbind():
            if isinstance(cell, nn.LSTMCell):
                state, memory = cell(word, (state, memory))
            else:
                state = cell(word, state)
        return state

    with torch.no_grad(), collect() as records:
        call = torch.compile(run, backend="opara", fullgraph=True, options=OPTIONS)
        for _ in range(2):
            torch.testing.assert_close(call(words), run(words), rtol=4e-3, atol=4e-3)
    (record,) = records
    assert record.replays == 1
    beside = 2 if kind is nn.LSTMCell else 3
    assert len(record.graph) <= 6 + beside, "one a step; the words, and what zeros to begin with come to"


def test_gate_and_up_of_one_matrix() -> None:
    torch.manual_seed(0)
    both, down = (nn.Linear(*sizes).cuda().half() for sizes in ((256, 1024), (512, 256)))

    def gated(x: Tensor) -> Tensor:
        gate, up = both(x).chunk(2, -1)
        return down(nn.functional.silu(gate) * up)

    x = torch.randn(1, 1, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad(), collect() as records:
        call = torch.compile(gated, backend="opara", fullgraph=True, options=OPTIONS)
        for _ in range(2):
            torch.testing.assert_close(call(x), gated(x), rtol=4e-3, atol=4e-3)
    assert len(records[0].graph) == 2
