"""The first call of a shape that is to be captured: its outputs are the caller's, and what it allocated goes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opara_backend.execution import cuda_graph, first_run, host
from opara_backend.execution.first_run import ROOM, leaves_nothing
from opara_backend.execution.outputs import OutputSpec
from opara_backend.kernel_graph import KernelGraph
from tests.arguments import normal
from tests.replayed import Replayed, replayed
from tests.strategies import graph_with_edges

__all__ = ["replayed"]  # a fixture

CONSTANT = normal(9, 4)


def several(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    z = (x @ y).relu()
    y.add_(1)
    return z, z[1:], x, y.view(-1), z.sum(), CONSTANT * 2, 3


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Addresses of the outputs of each run, as it made them."""
    found: list[set[int]] = []
    observe = host.observe

    def observed(*args: Any) -> host.Observed:
        seen = observe(*args)
        found.append({o.untyped_storage().data_ptr() for o in seen.outputs if isinstance(o, Tensor)})
        kept.append(seen.outputs)
        return seen

    kept: list[Any] = []  # or the next allocation would be at their address
    monkeypatch.setattr(host, "observe", observed)
    return found


def test_outputs_are_copies_that_alias_what_they_should(replayed: list[Replayed], within: list[set[int]]) -> None:
    x, y = normal(0, 4, 4), normal(1, 4, 4)
    expected = several(x.clone(), y.clone())
    with torch.no_grad():
        found = torch.compile(several, backend="opara")(x, y)
    torch.testing.assert_close(found, expected)
    z, part, same, flat, *_ = found
    assert part.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    assert (same.data_ptr(), flat.data_ptr()) == (x.data_ptr(), y.data_ptr())
    inside = within[0] - {x.data_ptr(), y.data_ptr()}
    assert inside
    assert not inside & {o.untyped_storage().data_ptr() for o in found if isinstance(o, Tensor)}


def test_where_there_is_no_memory_for_copies_the_outputs_are_those_of_the_run(
    replayed: list[Replayed], within: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> tuple[Any, ...]:
        raise torch.OutOfMemoryError

    x, y = normal(0, 4, 4), normal(1, 4, 4)
    expected = several(x.clone(), y.clone())
    monkeypatch.setattr(OutputSpec, "collect", full)
    with torch.no_grad():
        found = torch.compile(several, backend="opara")(x, y)
    torch.testing.assert_close(found, expected)
    assert found[0].untyped_storage().data_ptr() in within[0]


def calling(*calls: str) -> KernelGraph:
    graph = graph_with_edges(len(calls), [])
    kernels = zip(graph.kernels, calls, strict=True)
    return replace(graph, kernels=tuple(replace(kernel, kind="extern", call=call) for kernel, call in kernels))


@pytest.mark.parametrize("library", [True, False], ids=["a library's", "generated"])
def test_a_run_that_called_libraries_leaves_no_workspaces(monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def use_mem_pool(pool: Any) -> Iterator[None]:
        events.append("in")
        yield
        events.append("out")

    def run(args: list[Any], alloc: Any, task: Any, release: Any) -> Iterator[None]:
        task(lambda: events.append("kernel"))
        yield
        return ()

    def allocated(freed: int) -> dict[str, Any]:
        return {"allocated_bytes": {"all": {"freed": freed}}}

    counted = iter((100, 100 + 3 * 2**20))
    monkeypatch.setattr(torch.cuda, "MemPool", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: 7)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: allocated(next(counted)))
    monkeypatch.setattr(cuda_graph, "give_up_workspaces", lambda streams: events.append(f"without {streams}"))
    graph = replace(calling("extern_kernels.convolution") if library else graph_with_edges(1, []), outputs=())
    program: Any = SimpleNamespace(run=run, inputs=())
    seen = first_run.observe_apart(program, graph, [], None)
    assert events == ["in", "kernel", "out", *(["without [7]"] if library else [])]
    assert seen.metered == ({0: 3 * 2**20} if library else {}), "allocated by the kernel and freed: its workspace"


@pytest.mark.parametrize(
    ("config", "capability", "expected"),
    [
        (":4096:2:16:8", (9, 0), (8 << 20) + (128 << 10)),
        (":16:8", (9, 0), 128 << 10),
        ("", (9, 0), 32 << 20),
        ("", (8, 0), (8 << 20) + (128 << 10)),
    ],
)
def test_the_workspace_of_cublas(
    monkeypatch: pytest.MonkeyPatch, config: str, capability: tuple[int, int], expected: int
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert first_run.cublas_workspace_bytes(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(
    ("graph", "backend", "free", "expected"),
    [
        (graph_with_edges(3, []), "native", 50, True),
        (calling("extern_kernels.mm", "torch.ops.aten.topk.default", "convolution_out"), "native", 50, True),
        (calling("extern_kernels.mm", "torch.ops.mine.lookup.default"), "native", 50, False),
        (calling("extern_kernels.mm"), "cudaMallocAsync", 50, False),
        (calling("extern_kernels.mm"), "native", 100 // ROOM - 1, False),
        (calling("extern_kernels.mm"), "native", 100 // ROOM, True),
    ],
    ids=["generated", "torch's", "somebody's", "another allocator", "device full", "device nearly full"],
)
def test_only_what_is_known_to_keep_nothing_runs_in_a_pool_of_its_own(
    monkeypatch: pytest.MonkeyPatch, graph: KernelGraph, backend: str, free: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    assert leaves_nothing(graph) == expected
