"""Inputs of a GPU program that lie on the CPU: where kernels are given the value alone, it is part of a launch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from opara_backend.execution.arguments import StaticArguments
from opara_backend.execution.program import Program
from opara_backend.execution.runtime import Runtime
from opara_backend.fallback import FallbackReason, why_host
from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.lowering.kernels import Call
from opara_backend.lowering.program import ProgramWriter
from opara_backend.options import Options

X, SCALE, LARGE = (
    Buffer("arg0_1", "input", 64, "f32[16]", "cuda:0"),
    Buffer("arg1_1", "input", 8, "f64[]", "cpu"),
    Buffer("arg1_1", "input", 64, "f64[8]", "cpu"),
)


def lowered(
    line: str, scale: Buffer = SCALE, writes: tuple[str, ...] = ("buf0",)
) -> tuple[KernelGraph, tuple[str, ...]]:
    writer = ProgramWriter(device="cuda:0", inputs=(X, scale), constants=())
    writer.allocation(Buffer("buf0", "intermediate", 64, "f32[16]", "cuda:0", True), ["buf0 = alloc('buf0')"])
    writer.launch(Call("triton", "triton_poi_0", ("arg0_1", "arg1_1"), writes), [line], (), device="cuda:0")
    return writer.graph([]), writer.numbers()


def test_a_value_given_to_a_launch_is_a_number() -> None:
    graph, numbers = lowered("triton_poi_0.run(arg0_1, arg1_1.item(), buf0, 16, stream=get_raw_stream(0))")
    assert numbers == ("arg1_1",)
    assert why_host(graph) is None


@pytest.mark.parametrize(
    ("line", "scale", "writes"),
    [
        ("buf0.copy_(arg1_1)", SCALE, ("buf0",)),
        ("triton_poi_0.run(arg0_1, arg1_1.item(), arg1_1, buf0)", SCALE, ("buf0",)),
        ("triton_poi_0.run(arg0_1, arg1_1.item(), buf0)", SCALE, ("buf0", "arg1_1")),
        ("triton_poi_0.run(arg0_1, arg1_1.item(), buf0)", LARGE, ("buf0",)),
    ],
    ids=["read as a tensor", "both", "written", "of many elements"],
)
def test_other_tensors_on_the_cpu_need_the_host(line: str, scale: Buffer, writes: tuple[str, ...]) -> None:
    graph, numbers = lowered(line, scale, writes)
    assert numbers == ()
    found = why_host(graph)
    assert found is not None
    assert found[0] is FallbackReason.HOST_KERNEL


def runtime() -> Runtime:
    graph, _ = lowered("triton_poi_0.run(arg0_1, arg1_1.item(), buf0)")

    def run(*_: Any) -> Iterator[None]:
        yield

    program = Program(run, graph.to_json(), ("arg0_1", "arg1_1"), number_inputs=(1,))
    return Runtime(program, graph, Options())


def test_each_value_is_a_shape_of_its_own() -> None:
    here, x = runtime(), torch.ones(16)
    keys = [here._key([x, torch.tensor(value, dtype=torch.float64)]) for value in (0.5, 0.25, 0.0, -0.0, math.nan)]
    assert len(set(keys)) == 5
    again = [here._key([x, torch.tensor(value, dtype=torch.float64)]) for value in (0.5, 0.25, 0.0, -0.0, math.nan)]
    assert again == keys
    assert {here.shape_of(key) for key in keys} == {()}  # and one schedule does for all


def test_numbers_are_not_copied_anywhere() -> None:
    here = runtime()
    arguments = StaticArguments(here.program, here.graph, [torch.ones(16), torch.tensor(0.5)])
    assert arguments._copied == [0]
    assert float(arguments.values[1]) == 0.5


class Lane:
    """In place of what captures: keeps what it is called with."""

    made = 0

    def __init__(self, runtime: Runtime) -> None:
        time.sleep(0.05)
        type(self).made += 1
        self.calls: list[tuple[Any, Any]] = []

    def __call__(self, key: Any, args: Any) -> tuple[Any, ...]:
        self.calls.append((key, args))
        return ()


def test_a_number_that_changes_while_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opara_backend.execution.lane.CudaLane", Lane)
    here, scale = runtime(), torch.tensor(0.5)
    here([torch.ones(16), scale])
    scale.fill_(7.0)
    ((key, given),) = here._cuda.calls
    assert (key, float(given[1])) == (("0.5",), 0.5)


def test_threads_that_call_first_share_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lanes would not wait for each other's calls."""
    monkeypatch.setattr("opara_backend.execution.lane.CudaLane", Lane)
    monkeypatch.setattr(Lane, "made", 0)
    here = runtime()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: here([torch.ones(16), torch.tensor(float(n))]), range(4)))
    assert Lane.made == 1
    assert len(here._cuda.calls) == 4
