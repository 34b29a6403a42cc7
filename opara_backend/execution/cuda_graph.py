"""Schedule -> one captured CUDA Graph.

Takes: a Program, a Plan, arguments at static addresses. Gives: a graph whose branches are the schedule's streams.
Must not change: the caller's current stream or device. Errors: whatever capture raises, after capture mode is left
and the graph's memory given back.

How a stream becomes a branch: kernels are launched in the schedule's order, each on its stream, which first waits
for the events of the kernels in `waits`; all streams start from one event and join in the end. Library workspaces
(cuBLAS keeps one per stream and thread) are allocated inside the capture, from the graph's memory pool, and forgotten
behind it, so that they live as long as the graph and serve no other (pytorch#193402).

While one thread captures, CUDA lets no other wait for the whole device, which tuning a kernel does; and a capture is
invalidated by some of what other threads may do. So captures, runs that may tune kernels, and compilation hold
`EXCLUSIVE`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from opara_backend import upstream
from opara_backend.execution.host import Arena, Plan, Supply, run_unplanned
from opara_backend.execution.program import Activation, Program
from opara_backend.kernel_graph import RANDOM_STATE

log = logging.getLogger(__name__)

Probe = Callable[[int], None]

EXCLUSIVE = threading.RLock()  # taken before any lock of a compiled graph; an operator may call a compiled model

_COMPILATION_WAITS = 60.0  # seconds; then it goes on: what is waited for may be waiting for the compilation

_LAUNCHED = 10.0  # seconds after which a GEMM whose workspace had been asked for is surely under way

_INVALIDATED = 901  # cudaErrorStreamCaptureInvalidated
_ATTEMPTS = 3  # at a capture that somebody else invalidates


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Hold `EXCLUSIVE` while the block compiles, if it can be had in time."""
    held = EXCLUSIVE.acquire(timeout=_COMPILATION_WAITS)
    try:
        yield
    finally:
        if held:
            EXCLUSIVE.release()


class CapturedGraph:
    """A replayable graph, the outputs it fills, and the memory it works in: an arena, and a pool of the allocator's."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, outputs: tuple[Any, ...], arena: Arena, device: torch.device, pool: Any
    ) -> None:
        self.graph, self.arena, self.device, self.pool = graph, arena, device, pool
        self.outputs: tuple[Any, ...] | None = outputs
        self._process = os.getpid()
        self._stream: torch.cuda.Stream | None = None

    def replay(self, stream: torch.cuda.Stream | None = None) -> None:
        """Queue one run on the current stream, which is `stream` if the caller knows it."""
        self._stream = stream or torch.cuda.current_stream(self.device)
        self.graph.replay()

    def give_up_arena(self) -> None:
        """Give back the arena alone: the graph cannot be replayed after, and what keeps its memory pool is still it."""
        if self._stream is not None:
            self._stream.synchronize()
        self.outputs, self.arena.bytes = (), None

    def reset(self) -> None:
        """Give the graph's memory back, if it has not been; the graph cannot be replayed after."""
        if self.outputs is None:
            return
        if self._stream is not None and not torch.cuda.is_current_stream_capturing():
            # A replay under way still works in that memory. Not the whole device: another thread may be capturing.
            self._stream.synchronize()
        self.outputs = self._stream = self.arena.bytes = None
        self.graph.reset()

    def __del__(self) -> None:
        if self.outputs is not None and not sys.is_finalizing() and self._process == os.getpid():
            self.reset()  # in a process that was forked CUDA does not work, nor is the memory its own


def capture(
    program: Program,
    plan: Plan,
    args: Sequence[Any],
    streams: Sequence[torch.cuda.Stream],
    pool: Any,
    supply: Supply | None = None,
    probe: Probe | None = None,
    workspaces_stay: bool = False,
) -> CapturedGraph:
    """Capture `plan` on `streams` (at least as many as the schedule uses), allocating from memory pool `pool`.

    supply: where the arena's memory comes from; it may be that of graphs which never run at the same time.
    workspaces_stay: the next capture into `pool` uses the same library workspaces; `give_up_workspaces` ends that.
    probe: called with a kernel's index before its launch, on its stream, and with -1 behind the last, on the first
    stream, which then waits for the others: for events between kernels of one stream. All kernels must have run once
    before, so that nothing is compiled or tuned in capture.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with EXCLUSIVE:
                return _capture(program, plan, args, streams, pool, supply, probe, workspaces_stay)
        except torch.AcceleratorError as error:
            if getattr(error, "error_code", None) != _INVALIDATED or attempt == _ATTEMPTS:
                raise
            log.info("somebody invalidated a capture; once more")
            pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph, which this may have been
    raise AssertionError("unreachable")


class _Workspaces:
    """When cuBLAS workspaces that may be others' were last forgotten, by `time.monotonic`; guarded by `EXCLUSIVE`."""

    forgotten = -math.inf


_WORKSPACES = _Workspaces()


def give_up_workspaces(streams: Sequence[torch.cuda.Stream]) -> None:
    """Let library workspaces of `streams` belong to the graphs captured there, and to nobody else."""
    with EXCLUSIVE, _noting_what_may_be_others():  # nobody captures meanwhile
        upstream.clear_cublas_workspaces(streams)


@contextlib.contextmanager
def _noting_what_may_be_others() -> Iterator[None]:
    """Note the time if the block, which forgets workspaces, frees any but those of captured graphs, which nobody else
    launches."""
    if upstream.clears_cublas_workspaces_by_stream():
        yield
        return
    told = torch.cuda.get_allocator_backend() == "native"  # others do not say what they hold
    freed, before = (_freed(), _blocks_of_pools()) if told else (0, {})
    yield
    after = _blocks_of_pools() if told else {}
    gone = sum(nbytes for address, nbytes in before.items() if address not in after)
    if not told or _freed() - freed > gone:
        _WORKSPACES.forgotten = time.monotonic()


def _freed() -> int:
    """Bytes freed so far on all devices; whatever anybody freed meanwhile counts as a workspace."""
    counted = (torch.cuda.memory_stats_as_nested_dict(index) for index in range(torch.cuda.device_count()))
    return sum(stats["allocated_bytes"]["all"]["freed"] for stats in counted if stats)


def _blocks_of_pools() -> dict[int, int]:
    """Bytes of what is allocated from memory pools, by address."""
    segments: Any = torch.cuda.memory_snapshot()
    blocks = (block for s in segments if tuple(s["segment_pool_id"]) != (0, 0) for block in s["blocks"])
    return {block["address"]: block["size"] for block in blocks if block["state"] == "active_allocated"}


def give_back_unused() -> None:
    """Give memory of graphs that are gone back to the device, and what the allocator has cached where that is safe.

    Where torch can only forget the cuBLAS workspaces of all threads at once, one of them may just have asked for its
    own and be about to launch a GEMM that works in it, for as long as CUDA takes to load a kernel: that memory, though
    free, must stay mapped. While a thread allocates from a pool, torch gives back none but graphs' memory.
    """
    with EXCLUSIVE, contextlib.ExitStack() as held:
        if time.monotonic() - _WORKSPACES.forgotten < _LAUNCHED:
            held.enter_context(torch.cuda.use_mem_pool(torch.cuda.MemPool()))
        torch.cuda.empty_cache()


def _capture(
    program: Program,
    plan: Plan,
    args: Sequence[Any],
    streams: Sequence[torch.cuda.Stream],
    pool: Any,
    supply: Supply | None,
    probe: Probe | None,
    workspaces_stay: bool,
) -> CapturedGraph:
    device = torch.device(plan.graph.device)
    with torch.cuda.device(device):
        arena = Arena(plan.memory, plan.graph.device, supply)
        torch.cuda.current_stream(device).synchronize()
        if not all(isinstance(stream, torch.cuda.ExternalStream) for stream in streams):
            give_up_workspaces(streams)  # torch's own streams: others may have called cuBLAS there
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            with _no_collection(), torch.cuda.stream(streams[0]):
                draws = any(RANDOM_STATE in k.writes for k in plan.graph.kernels)
                spare = _begin_capture(graph, device, pool, draws)
                try:
                    outputs = _launch_all(program, plan, args, streams, arena, probe)
                except BaseException:
                    _leave_capture(graph, streams, pool, spare)
                    raise
                _end_capture(graph, device, pool, spare)
            graph.instantiate()
        except BaseException as error:
            graph.reset()
            if "cusolver" in str(error).lower():
                _absorb_errors(program, args, device)
            raise
        finally:
            if not workspaces_stay:
                give_up_workspaces(streams)
        return CapturedGraph(graph, outputs, arena, device, pool)


def _end_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any, spare: torch.Generator | None) -> None:
    """End a capture; if that fails, end its claim on the memory pool too, which torch keeps then (pytorch#190348).

    And if the program draws random numbers, torch (2.11) leaves the generator believing that it is being captured:
    every later number would raise. Then, and only then, it goes on with `spare`: graphs captured before are not tied
    to that, and seeds given from now on do not reach them.
    """
    try:
        graph.capture_end()
    except BaseException:
        upstream.abandon_pool(device, pool)
        if spare is not None:
            torch.cuda.default_generators[device.index].graphsafe_set_state(spare)
        raise


def _leave_capture(
    graph: torch.cuda.CUDAGraph, streams: Sequence[torch.cuda.Stream], pool: Any, spare: torch.Generator | None
) -> None:
    """End a capture that failed: streams still forked off would make ending it fail too."""
    for stream in streams[1:]:
        with contextlib.suppress(RuntimeError):
            streams[0].wait_stream(stream)
    with contextlib.suppress(RuntimeError):  # what is wrong has been raised already
        _end_capture(graph, streams[0].device, pool, spare)


def _absorb_errors(program: Program, args: Sequence[Any], device: torch.device) -> None:
    """Run the program plainly until it succeeds: cuSOLVER's first call after one that capture refused fails, too.

    Whoever makes it: better we than the user.
    """
    for _ in range(3):
        with contextlib.suppress(RuntimeError):
            run_unplanned(program, args)
            torch.cuda.current_stream(device).synchronize()
            return


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out: a graph or tensor it frees in mid-capture would invalidate the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _begin_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any, draws: bool) -> torch.Generator | None:
    """Begin a capture during which other threads may allocate, launch and, unless the program `draws`, draw numbers.

    torch ties the default generator's state to every capture, and then refuses numbers to all other streams. A program
    that draws none gets a copy of that state to be tied to. Else the copy is returned, for a capture that cannot be
    ended.
    """
    generator = torch.cuda.default_generators[device.index]
    own, copy = generator.graphsafe_get_state(), generator.clone_state()
    tied, other = (own, copy) if draws else (copy, own)
    generator.graphsafe_set_state(tied)
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    except BaseException:
        generator.graphsafe_set_state(other)  # what is tied may believe that it is being captured
        raise
    generator.graphsafe_set_state(own)
    return copy if draws else None


def _reserve(nbytes: int, device: torch.device) -> None:
    """Let the allocator have a segment of `nbytes` for the current stream, if it is one that cuts it up later."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if torch.cuda.get_allocator_backend() == "native" and "max_split_size" not in settings:
        torch.UntypedStorage(nbytes, device=device)


def _launch_all(
    program: Program,
    plan: Plan,
    args: Sequence[Any],
    streams: Sequence[torch.cuda.Stream],
    arena: Arena,
    probe: Probe | None,
) -> tuple[Any, ...]:
    schedule = plan.schedule
    awaited = {before for waits in schedule.waits for before in waits}
    origin = streams[0]
    activation = Activation(program, args, arena)
    activation.advance()
    started = torch.cuda.Event()
    started.record(origin)
    used = sorted(set(schedule.stream))
    for index in used:
        if index:
            streams[index].wait_event(started)
    for index, nbytes in plan.segments.items():
        with torch.cuda.stream(streams[index]):
            _reserve(nbytes, origin.device)
    events: dict[int, torch.cuda.Event] = {}
    for kernel, finished in zip(schedule.order, plan.memory.releases, strict=True):
        stream = streams[schedule.stream[kernel]]
        for before in schedule.waits[kernel]:
            stream.wait_event(events[before])
        for name in finished:
            activation.release[name]()
        with torch.cuda.stream(stream):
            if probe is not None:
                probe(kernel)
            activation.tasks[kernel]()
        if kernel in awaited:
            events[kernel] = torch.cuda.Event()
            events[kernel].record(stream)
    if probe is not None:
        probe(-1)
    for index in used:
        if index:
            origin.wait_stream(streams[index])
    activation.advance()
    return activation.outputs
