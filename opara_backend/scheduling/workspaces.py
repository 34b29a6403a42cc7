"""What libraries keep in memory beside a schedule's arena, on each stream that they run on.

Takes: which stream each kernel is launched on, and what its library needs. Gives: bytes that torch's allocator will
reserve; which schedules take few enough.
Must not change: anything. Imports no torch.

A convolution allocates its workspace when it is launched and frees it when it is queued; the allocator hands it on to
the next one of the same stream, and to no other stream. cuBLAS keeps one workspace for each stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from opara_backend.kernel_graph import Kernel, KernelGraph
from opara_backend.scheduling.gathering import gathered, library_kernels
from opara_backend.scheduling.schedule import Schedule

OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_int_mm", "_scaled_mm", "linear", "matmul")
MORE = 0.1  # of what one stream takes is never too much

# The allocator's segments: for blocks up to 1 MiB, up to 10 MiB, and larger ones, which are rounded up to 2 MiB.
_SMALL, _LARGE = 1 << 20, 10 << 20
_SMALL_SEGMENT, _LARGE_SEGMENT, _ROUND = 2 << 20, 20 << 20, 2 << 20


@dataclass(frozen=True)
class Workspaces:
    """What libraries need, in bytes. transient: by kernel, while it runs; product: per stream with products."""

    transient: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    product: int = 0


NONE = Workspaces()


def is_product(kernel: Kernel) -> bool:
    """True if `kernel` may call cuBLAS: Inductor's `extern_kernels`, but for convolutions, and operators of torch's."""
    owner, *names = kernel.call.removeprefix("torch.ops.").split(".")
    if owner == "extern_kernels":
        return names != ["convolution"]
    return owner == "aten" and bool(names) and names[0] in OPERATORS


def admission(graph: KernelGraph, needed: Workspaces, extra: int) -> Callable[[Schedule], bool]:
    """Tells schedules whose workspaces, gathered, take at most a tenth and `extra` bytes more than on one stream."""
    libraries = library_kernels(graph)
    least = workspace_bytes(graph, (0,) * len(graph), needed)
    most = least + int(MORE * least) + extra

    def admits(schedule: Schedule) -> bool:
        if workspace_bytes(graph, schedule.stream, needed) <= most:
            return True
        return workspace_bytes(graph, gathered(schedule, libraries).stream, needed) <= most

    return admits


def workspace_bytes(graph: KernelGraph, stream: Sequence[int], needed: Workspaces) -> int:
    """Bytes reserved for libraries when each kernel is launched on its `stream`: on each, the largest of each kind."""
    largest: dict[int, int] = {}
    for kernel, nbytes in needed.transient.items():
        largest[stream[kernel]] = max(largest.get(stream[kernel], 0), nbytes)
    with_products = {s for s, kernel in zip(stream, graph.kernels, strict=True) if is_product(kernel)}
    return sum(map(segment_bytes, largest.values())) + len(with_products) * segment_bytes(needed.product)


def segment_bytes(nbytes: int) -> int:
    """Bytes the allocator reserves for a block of `nbytes` where nothing is cached."""
    if nbytes <= _SMALL:
        return _SMALL_SEGMENT if nbytes else 0
    return _LARGE_SEGMENT if nbytes < _LARGE else -(-nbytes // _ROUND) * _ROUND
