"""What a kernel demands and how long it takes, as plain data.

Takes: numbers measured by `timing` and `resources`, or modelled. Gives: `KernelProfile`, `Profile`.
Must not change: anything. Imports no torch: this is what scheduling reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import DeviceSpec
from opara_backend.profiling.occupancy import Launch, gpu_share


@dataclass(frozen=True)
class KernelProfile:
    """One kernel on one device.

    duration: seconds, alone on the device. demand: what it asks of the device, the key Algorithm 2 launches by
    (share of the GPU it would hold, 0 to 1; on a CPU its duration). memory_bound: its arithmetic intensity lies
    below the device's balance point. launches: its grids and blocks, empty where nobody could tell. nbytes: bytes of
    the buffers it reads and writes.
    """

    duration: float
    demand: float
    memory_bound: bool = True
    launches: tuple[Launch, ...] = ()
    nbytes: int = 0


@dataclass(frozen=True)
class Profile:
    """One KernelProfile per kernel, in program order, and the device they were taken on."""

    kernels: tuple[KernelProfile, ...]
    device: DeviceSpec | None = None

    def durations(self) -> tuple[float, ...]:
        """Seconds per kernel."""
        return tuple(k.duration for k in self.kernels)


def kernel_bytes(graph: KernelGraph, kernel: int) -> int:
    """Bytes of the buffers `kernel` reads plus those it writes; buffers of unknown size count as nothing."""
    touched = (*graph.kernels[kernel].reads, *graph.kernels[kernel].writes)
    sizes = (graph.buffer(name).nbytes for name in touched)
    return sum(size for size in sizes if isinstance(size, int))


def is_memory_bound(flops: int | None, nbytes: int, dtype: str, device: DeviceSpec) -> bool:
    """Roofline: True if `flops` per byte lie below the device's balance point for `dtype`.

    Where the operations are unknown the kernel counts as memory-bound: what Inductor has no formula for is
    pointwise or data movement. float32 products run on tensor cores only if the user allows tf32; the plain
    float32 rate is the cautious choice.
    """
    if flops is None or nbytes <= 0:
        return True
    return flops / nbytes < device.balance(dtype)


def build_profile(
    graph: KernelGraph,
    durations: Sequence[float],
    launches: Sequence[tuple[Launch, ...]] | None,
    device: DeviceSpec | None,
) -> Profile:
    """Join measured durations (seconds) and launch parameters with what the graph tells about work and bytes.

    Without a device or without launch parameters the demand is the duration: a kernel that runs long holds its
    resources long.
    """
    found = []
    for index, kernel in enumerate(graph.kernels):
        nbytes = kernel_bytes(graph, index)
        own = tuple(launches[index]) if launches is not None else ()
        demand = durations[index]
        if device is not None and launches is not None:
            demand = max((gpu_share(launch, device) for launch in own), default=0.0)
        memory_bound = device is None or is_memory_bound(kernel.flops, nbytes, kernel.dtype, device)
        found.append(KernelProfile(durations[index], demand, memory_bound, own, nbytes))
    return Profile(tuple(found), device)
