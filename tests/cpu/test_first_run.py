"""The first call of a shape that is to be captured: its outputs are the caller's, and what it allocated goes back."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opara_backend.execution import cuda_graph, first_run, host
from opara_backend.execution.first_run import ROOM, leaves_nothing
from opara_backend.execution.outputs import OutputSpec
from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.workspaces import Workspaces
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


@dataclass(eq=False)
class Stream:
    """Writes down what it is told. broken: the device has failed."""

    name: str
    events: list[str]
    broken: bool = False

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.events.append(f"the host waits for {self.name}")
        if self.broken:
            raise torch.AcceleratorError("device-side assert triggered")


@dataclass
class World:
    """A device that is not there. counted: what the allocator says, each time it is asked: allocated, freed."""

    events: list[str] = field(default_factory=list)
    pools: list[weakref.ref[Any]] = field(default_factory=list)
    counted: list[tuple[int, int]] = field(default_factory=list)
    failing: bool = False

    def make_pool(self) -> Any:
        class Pool:
            pass

        pool = Pool()
        self.pools.append(weakref.ref(pool))
        return pool

    @contextlib.contextmanager
    def within(self, what: Any) -> Iterator[None]:
        self.events.append(f"in {getattr(what, 'name', 'the pool')}")
        yield

    def run(self, args: list[Any], alloc: Any, task: Any, release: Any) -> Iterator[None]:
        def kernel() -> None:
            self.events.append("kernel")
            if self.failing:
                raise ZeroDivisionError

        task(kernel)
        yield
        return ()

    def observe(self, call: str) -> host.Observed:
        graph = replace(calling(call), outputs=(), device="cuda:0")
        program: Any = SimpleNamespace(run=self.run, inputs=())
        return first_run.observe_apart(program, graph, [], None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    caller, ours = Stream("the caller's", world.events), Stream("ours", world.events)
    monkeypatch.setattr(torch.cuda, "MemPool", world.make_pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", world.within)
    monkeypatch.setattr(torch.cuda, "stream", world.within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(
        torch.cuda,
        "memory_stats_as_nested_dict",
        lambda device: {
            "allocated_bytes": {"all": dict(zip(("allocated", "freed"), world.counted.pop(0), strict=True))}
        },
    )
    monkeypatch.setattr(first_run, "private_streams", lambda device, count: [ours])
    monkeypatch.setattr(
        cuda_graph, "give_up_workspaces", lambda streams: world.events.append(f"forget {streams[0].name}")
    )
    return world


def test_the_run_is_in_order_with_the_callers_and_leaves_no_workspaces(world: World) -> None:
    """The host waits before the pool's memory is freed: outputs are copied out of it."""
    world.counted = [(1000, 100), (1000 + 5 * 2**20, 100 + 3 * 2**20)]
    seen = world.observe("extern_kernels.convolution")
    assert world.events == [
        *("in the pool", "ours waits for the caller's", "in ours", "kernel", "the caller's waits for ours"),
        *("the host waits for the caller's", "forget ours"),
    ]
    program = SimpleNamespace(rewrites=("fuse_gemv",))
    needed = first_run.workspaces(program, seen, 7)  # type: ignore[arg-type]
    assert needed == Workspaces({0: 3 * 2**20}, 7, True, {0: 2 * 2**20}), "its workspace, and its results"
    assert world.pools[0]() is None


@pytest.mark.parametrize("setting", ["another allocator", "benchmark", "generated"])
def test_what_cannot_be_metered_is_not(world: World, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """An allocator of somebody's own raises where it is asked, and cuDNN's search allocates for all it tries."""
    if setting == "another allocator":
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "pluggable")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", setting == "benchmark")
    graph = graph_with_edges(1, []) if setting == "generated" else calling("extern_kernels.convolution")
    program: Any = SimpleNamespace(run=world.run, inputs=())
    seen = first_run.observe_metered(program, replace(graph, outputs=(), device="cuda:0"), [], None)
    assert seen.metered == {}
    assert world.events == ["kernel"]


@pytest.mark.parametrize("broken", [False, True], ids=["a device that works", "a device that has failed"])
def test_a_run_that_fails(world: World, broken: bool) -> None:
    """Where the device has failed the pool's destructor would end the process, and nobody see the exception."""
    world.failing, world.counted = True, [(0, 0), (0, 0)]
    torch.cuda.current_stream().broken = broken
    with pytest.raises(ZeroDivisionError):
        world.observe("extern_kernels.convolution")
    assert "the caller's waits for ours" in world.events
    gc.collect()
    assert (world.pools[0]() is not None) == broken


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


MM = calling("extern_kernels.mm")


@pytest.mark.parametrize(
    ("graph", "backend", "fraction", "nbytes", "free", "expected"),
    [
        (graph_with_edges(3, []), "native", 1.0, 10, 50, True),
        (calling("extern_kernels.mm", "torch.ops.aten.topk.default", "convolution_out"), "native", 1.0, 1, 50, True),
        (calling("extern_kernels.mm", "torch.ops.mine.lookup.default"), "native", 1.0, 1, 50, False),
        (MM, "cudaMallocAsync", 1.0, 1, 50, False),
        (MM, "native", 0.5, 1, 50, False),
        (MM, "native", 1.0, 1, 100 // ROOM - 1, False),
        (MM, "native", 1.0, 1, 100 // ROOM, True),
        (MM, "native", 1.0, 51, 50, False),
        (MM, "native", 1.0, "s0", 50, True),
    ],
    ids=[
        *("generated", "torch's", "somebody's", "another allocator", "a limit"),
        *("device full", "device nearly full", "too large for it", "size not known"),
    ],
)
def test_only_what_is_known_to_keep_nothing_runs_in_a_pool_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    graph: KernelGraph,
    backend: str,
    fraction: float,
    nbytes: int | str,
    free: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    given_back: list[bool] = []
    monkeypatch.setattr(cuda_graph, "give_back_unused", lambda: given_back.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * len(given_back), 100))
    sized = [replace(b, nbytes=nbytes) if b.kind == "intermediate" else b for b in graph.buffers]
    assert leaves_nothing(replace(graph, buffers=tuple(sized))) == expected
