"""Profiles as a GPU would give them, with grids and blocks, drawn by hypothesis or by hand. Imports no torch."""

from __future__ import annotations

from hypothesis import strategies as st

from bench.recorded import Measured, Recording
from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import PRESETS
from opara_backend.profiling.occupancy import Launch, gpu_share
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule
from tests.strategies import ORDERS, POLICIES, WIDTHS, graph_of, kernel_graphs

GPU = PRESETS["H200"]
Scheduled = tuple[KernelGraph, Profile, Schedule]
# From one block to several waves of the whole GPU, and blocks that are scarce in threads, registers or shared memory.
LAUNCHES = st.builds(
    Launch,
    grid=st.tuples(st.sampled_from([1, 7, 132, 264, 300, 1000, 5000]), st.just(1), st.just(1)),
    block=st.tuples(st.sampled_from([32, 128, 256, 1024]), st.just(1), st.just(1)),
    registers=st.sampled_from([16, 40, 64]),
    static_shared=st.just(0),
    dynamic_shared=st.sampled_from([0, 1000, 40_000, 120_000, 200_000]),
)
SECONDS = st.sampled_from([0.0, 0.5e-6, 1e-6, 2.5e-6, 3e-6, 10e-6, 47e-6])


def kernel(
    seconds: float, blocks: int, *, threads: int = 128, shared: int = 0, nbytes: int = 0, memory_bound: bool = False
) -> KernelProfile:
    """One kernel on `GPU`; of `shared` above 113 kB a multiprocessor holds one block, of 1024 threads two."""
    launch = Launch((blocks, 1, 1), (threads, 1, 1), 16, 0, shared)
    return KernelProfile(seconds, gpu_share(launch, GPU), memory_bound, (launch,), nbytes)


def tiny_recording(seconds: tuple[float, ...] = (3e-6, 2e-6), model: str = "tiny") -> Recording:
    """Two kernels and a third that reads what they wrote, on one stream and on two; measured as told."""
    graph = graph_of(("in", "a"), ("in", "b"), ("a b", "c"), outputs=("c",))
    profile = Profile(tuple(kernel(1e-6, blocks) for blocks in (1, 10, 132)), GPU)
    schedules = [
        build(graph, profile, policy=policy, launch_order="program", streams=2) for policy in ("sequential", "opara")
    ]
    about = {"model": model, "dtype": "float16", "batch": 1}
    measured = tuple(Measured(schedule, time) for schedule, time in zip(schedules, seconds, strict=False))
    return Recording(about, graph, profile, measured)


@st.composite
def gpu_kernels(draw: st.DrawFn, contended: bool = True) -> KernelProfile:
    """One kernel on `GPU`, of no launch, one or two. contended: False keeps it from asking for memory's bandwidth."""
    launches = tuple(draw(st.lists(LAUNCHES, max_size=2)))
    return KernelProfile(
        duration=draw(SECONDS),
        demand=max((gpu_share(launch, GPU) for launch in launches), default=0.0),
        memory_bound=contended and draw(st.booleans()),
        launches=launches,
        nbytes=draw(st.sampled_from([0, 4096, 1 << 20, 1 << 24, 1 << 28])),
    )


@st.composite
def gpu_schedules(draw: st.DrawFn, contended: bool = True) -> Scheduled:
    """A graph, its profile on `GPU`, and what some policy makes of it."""
    graph = draw(kernel_graphs())
    kernels = draw(st.lists(gpu_kernels(contended), min_size=len(graph), max_size=len(graph)))
    profile = Profile(tuple(kernels), GPU)
    policy, order = draw(st.sampled_from(POLICIES)), draw(st.sampled_from(ORDERS))
    return graph, profile, build(graph, profile, policy=policy, launch_order=order, streams=draw(WIDTHS))
