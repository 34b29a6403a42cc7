"""The first call of a shape that is about to be captured: a plain run in memory that goes back when it is over.

Takes: a Program, its KernelGraph, the arguments of a call. Gives: what the run showed, its outputs in memory of the
caller's; what libraries need. Must not change: anything but what the program itself writes.

cuBLAS keeps a workspace (32 MiB on Hopper GPUs) for each stream that has called it. The caller's stream would call it
this once, as replays work in the graph's own. So the run is made on a stream of ours, and allocates from a pool that
ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from opara_backend.execution import cuda_graph, host
from opara_backend.execution.host import Metered, Observed
from opara_backend.execution.outputs import OutputSpec
from opara_backend.execution.program import Program
from opara_backend.execution.streams import private_streams
from opara_backend.kernel_graph import KernelGraph
from opara_backend.memory import Lifetimes
from opara_backend.scheduling.gathering import library_kernels
from opara_backend.scheduling.workspaces import Workspaces

log = logging.getLogger(__name__)

# Calls of torch's and of our own: they work on the current stream, run no compiled model, and keep nothing that they
# allocate. Others may not.
KNOWN_CALLS = ("extern_kernels.", "torch.ops.aten.", "aten.", "torch.ops.opara_backend.", "convolution_out")
GEMV = "fuse_gemv"  # the rewrite that leaves no product where there was one
ROOM = 4  # one part in so many of the device must be free: meanwhile torch does not give back what it has cached


def leaves_nothing(graph: KernelGraph) -> bool:
    """True if a run of `graph` can be told to allocate from a pool that ends with it, and there is room for that.

    What is cached and unused is given back before it looks, for the pool could not have it.
    """
    if not all(kernel.kind == "triton" or kernel.call.startswith(KNOWN_CALLS) for kernel in graph.kernels):
        return False
    if not _is_torchs_allocator() or torch.cuda.get_per_process_memory_fraction(graph.device) < 1:
        return False
    cuda_graph.give_back_unused()
    free, total = torch.cuda.mem_get_info(graph.device)
    sizes = [buffer.nbytes for buffer in graph.buffers if buffer.kind == "intermediate"]
    return free >= max(total // ROOM, sum(nbytes for nbytes in sizes if isinstance(nbytes, int)))


def observe_apart(program: Program, graph: KernelGraph, args: Sequence[Any], lives: Lifetimes | None) -> Observed:
    """`observe_metered` on the current device, in the current stream's order; what it allocates, outputs excepted, is
    given back.

    For programs of which `leaves_nothing` is true. Call it with `cuda_graph.EXCLUSIVE` held.
    """
    caller, (stream,) = torch.cuda.current_stream(), private_streams(torch.device(graph.device), 1)
    pool = torch.cuda.MemPool()
    with _outliving_errors(pool, caller):
        with torch.cuda.use_mem_pool(pool), _in_order(caller, stream), torch.cuda.stream(stream):
            seen = observe_metered(program, graph, args, lives)
        try:
            seen = replace(seen, outputs=OutputSpec(program, graph, seen.outputs, args).collect(args))
        except torch.OutOfMemoryError:
            log.info("no memory for copies of outputs: what the first run allocated stays as long as they do")
    # Whether the pool holds any is not asked: `pool.snapshot()` releases the numbers in the pool's name once too often
    # (seen 2.11), and the process dies of it some hundred pools later.
    cuda_graph.give_up_workspaces([stream])
    return seen


@contextlib.contextmanager
def _in_order(caller: torch.cuda.Stream, stream: torch.cuda.Stream) -> Iterator[None]:
    """What the block queues on `stream` follows what `caller` has queued, and goes before what it will."""
    stream.wait_stream(caller)
    try:
        yield
    finally:
        caller.wait_stream(stream)


@contextlib.contextmanager
def _outliving_errors(pool: Any, caller: torch.cuda.Stream) -> Iterator[None]:
    """Wait for what the block has queued; if the device has failed, keep `pool` for good.

    Its destructor frees memory, and ends the process where that fails: the caller would see no exception.
    """
    try:
        yield
        caller.synchronize()
    except BaseException:
        try:
            caller.synchronize()
        except RuntimeError:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
        raise


def observe_metered(program: Program, graph: KernelGraph, args: Sequence[Any], lives: Lifetimes | None) -> Observed:
    """`host.observe`, metering what calls of libraries allocate, and free again: their workspaces.

    What other threads free meanwhile counts as well. Not where the allocator does not count, nor where cuDNN tries all
    it has in the first call, each in a workspace of its own.
    """
    counts = torch.device(graph.device).type == "cuda" and _is_torchs_allocator() and not torch.backends.cudnn.benchmark
    libraries = library_kernels(graph) if counts else frozenset()

    def meter(kernel: int) -> Metered | None:
        if kernel not in libraries:
            return None
        counted = torch.cuda.memory_stats_as_nested_dict(graph.device)["allocated_bytes"]["all"]
        return Metered(counted["allocated"], counted["freed"])

    return host.observe(program, args, lives, meter)


def workspaces(program: Program, seen: Observed, product: int) -> Workspaces:
    """What libraries need to run `program`, by a run that was metered. product: bytes that cuBLAS keeps on a stream."""
    transient = {kernel: metered.freed for kernel, metered in seen.metered.items() if metered.freed}
    kept = {kernel: metered.allocated - metered.freed for kernel, metered in seen.metered.items()}
    return Workspaces(transient, product, GEMV in program.rewrites, kept)


def cublas_workspace_bytes(device: torch.device) -> int:
    """Bytes of the workspace that torch gives cuBLAS on each stream, as `CUBLAS_WORKSPACE_CONFIG` says.

    Its form is `:KiB:count`, repeated. Where it says nothing, torch's defaults: 32 MiB from Hopper on, before 8 MiB.
    """
    parts = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if parts:
        return sum(int(size) * int(count) for size, count in parts) << 10
    return (32 << 20) if torch.cuda.get_device_capability(device) >= (9, 0) else (8 << 20) + (128 << 10)


def _is_torchs_allocator() -> bool:
    return torch.cuda.get_allocator_backend() == "native"
