"""Profiles as a GPU would give them, with grids and blocks, drawn by hypothesis. Imports no torch."""

from __future__ import annotations

from hypothesis import strategies as st

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import PRESETS
from opara_backend.profiling.occupancy import Launch, gpu_share
from opara_backend.profiling.profile import KernelProfile, Profile
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.schedule import Schedule
from tests.strategies import ORDERS, POLICIES, WIDTHS, kernel_graphs

GPU = PRESETS["H200"]
# From one block to several waves of the whole GPU, and blocks that are scarce in threads, registers or shared memory.
LAUNCHES = st.builds(
    Launch,
    grid=st.tuples(st.sampled_from([1, 7, 132, 264, 300, 1000, 5000]), st.just(1), st.just(1)),
    block=st.tuples(st.sampled_from([32, 128, 256, 1024]), st.just(1), st.just(1)),
    registers=st.sampled_from([16, 40, 64]),
    static_shared=st.just(0),
    dynamic_shared=st.sampled_from([0, 1000, 40_000, 120_000, 200_000]),
)
MICROSECONDS = st.sampled_from([0.0, 0.5, 1.0, 2.5, 3.0, 10.0, 47.0])


@st.composite
def gpu_kernels(draw: st.DrawFn) -> KernelProfile:
    """One kernel on `GPU`, of no launch, one or two."""
    launches = tuple(draw(st.lists(LAUNCHES, max_size=2)))
    return KernelProfile(
        duration=draw(MICROSECONDS) * 1e-6,
        demand=max((gpu_share(launch, GPU) for launch in launches), default=0.0),
        memory_bound=draw(st.booleans()),
        launches=launches,
        nbytes=draw(st.sampled_from([0, 4096, 1 << 20, 1 << 24, 1 << 28])),
    )


@st.composite
def gpu_profiles(draw: st.DrawFn, count: int) -> Profile:
    """A profile of `count` kernels on `GPU`."""
    return Profile(tuple(draw(st.lists(gpu_kernels(), min_size=count, max_size=count))), GPU)


@st.composite
def gpu_schedules(
    draw: st.DrawFn, min_kernels: int = 0, max_kernels: int = 12
) -> tuple[KernelGraph, Profile, Schedule]:
    """A graph, its profile on `GPU`, and what some policy makes of it."""
    graph = draw(kernel_graphs(min_kernels, max_kernels))
    profile = draw(gpu_profiles(len(graph)))
    policy, order = draw(st.sampled_from(POLICIES)), draw(st.sampled_from(ORDERS))
    return graph, profile, build(graph, profile, policy=policy, launch_order=order, streams=draw(WIDTHS))
