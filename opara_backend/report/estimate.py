"""Guesses of what kernels would demand of a GPU, where only a CPU has run them.

Takes: a KernelGraph with sizes bound and a DeviceSpec. Gives: a `Profile`. Must not change: anything. Imports no
torch. Whoever shows these numbers must call them estimated: they come from bytes and operations alone.
"""

from __future__ import annotations

from opara_backend.kernel_graph import KernelGraph
from opara_backend.profiling.device import DeviceSpec
from opara_backend.profiling.occupancy import Launch
from opara_backend.profiling.profile import Profile, build_profile, kernel_bytes

_SHORTEST = 1.5e-6  # seconds; what the smallest kernels took in recordings
_EFFICIENCY = 0.5  # of the peak rate, either of memory or of arithmetic
_THREADS, _BYTES_PER_BLOCK = 128, 4096
_MOST_BLOCKS = 65535


def estimated_profile(graph: KernelGraph, device: DeviceSpec) -> Profile:
    """Roofline durations, and grids as large as the bytes touched: what is needed for a picture, not for a choice."""
    seconds, launches = [], []
    for index, kernel in enumerate(graph.kernels):
        nbytes = kernel_bytes(graph, index)
        moving = nbytes / (device.memory_bandwidth * _EFFICIENCY)
        computing = (kernel.flops or 0) / (device.flops_per_second(kernel.dtype) * _EFFICIENCY)
        seconds.append(max(_SHORTEST, moving, computing))
        blocks = min(_MOST_BLOCKS, max(1, -(-nbytes // _BYTES_PER_BLOCK)))
        launches.append((Launch((blocks, 1, 1), (_THREADS, 1, 1), 32, 0, 0),))
    return build_profile(graph, seconds, launches, device)
