"""Kernels that do nothing but spin, captured by a schedule and replayed on a GPU.

Takes: a Shape. Gives: when each kernel began and ended in each replay, and GPU seconds a replay, as `Played`.
Must not change: anything. Importing it needs triton, playing a GPU.

Each kernel is one block of one warp, so that nothing is shared and what is left is how a CUDA Graph launches. It reads
the GPU's own clock (`%globaltimer`) when it begins, until the time is over, and writes both readings down.
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

from bench.shapes import Played, Shape
from opara_backend.execution.streams import private_streams

BURST = 20  # replays between two events
HEAD_START = 4_000_000  # cycles that the GPU waits, about 2 ms, while the host queues a burst


@triton.jit(do_not_specialize=["place", "nanoseconds"])
def _spin(times, place, nanoseconds):  # type: ignore[no-untyped-def]  # triton reads annotations as types of its own
    begin = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = begin
    while now - begin < nanoseconds:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(times + 2 * place, begin)
    tl.store(times + 2 * place + 1, now)


def play(shape: Shape, replays: int = 60, bursts: int = 5) -> Played:
    """Capture `shape`, replay it, and say what was seen."""
    device = torch.device("cuda", torch.cuda.current_device())
    count = len(shape.seconds)
    times = torch.zeros(count, 2, dtype=torch.int64, device=device)
    graph = _captured(shape, times)
    try:
        graph.replay()
        seen = torch.zeros(replays, count, 2, dtype=torch.int64, device=device)
        for row in seen:
            graph.replay()
            row.copy_(times)
        traces = (seen - seen[:, :, :1].amin(1, keepdim=True)).tolist()
        seconds = statistics.median(_burst(graph) for _ in range(bursts))
    finally:
        torch.cuda.synchronize()
        graph.reset()
    return Played(tuple(tuple((1e-9 * begin, 1e-9 * end) for begin, end in trace) for trace in traces), seconds)


def _captured(shape: Shape, times: torch.Tensor) -> torch.cuda.CUDAGraph:
    """As `execution.cuda_graph` captures: all streams start from one event and join in the end."""
    schedule = shape.schedule
    streams = private_streams(times.device, schedule.streams)
    with torch.cuda.stream(streams[0]):
        _spin[(1,)](times, 0, 0, num_warps=1)  # compiles it, which no capture allows
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    awaited = {before for waits in schedule.waits for before in waits}
    events: dict[int, torch.cuda.Event] = {}
    with torch.cuda.graph(graph, stream=streams[0], capture_error_mode="thread_local"):
        started = torch.cuda.Event()
        started.record(streams[0])
        for stream in streams[1:]:
            stream.wait_event(started)
        for kernel in schedule.order:
            stream = streams[schedule.stream[kernel]]
            for before in schedule.waits[kernel]:
                stream.wait_event(events[before])
            with torch.cuda.stream(stream):
                _spin[(1,)](times, kernel, round(1e9 * shape.seconds[kernel]), num_warps=1)
            if kernel in awaited:
                events[kernel] = torch.cuda.Event()
                events[kernel].record(stream)
        for stream in streams[1:]:
            streams[0].wait_stream(stream)
    return graph


def _burst(graph: torch.cuda.CUDAGraph) -> float:
    """GPU seconds a replay, of some in a row that the host queues ahead of the GPU."""
    torch.cuda._sleep(HEAD_START)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(BURST):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / BURST
