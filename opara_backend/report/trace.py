"""Report -> a trace in Chrome's JSON format, for Perfetto and everything that reads it.

Takes: a Report. Gives: text. Must not change: the report. One process per timeline, one thread per stream, one
complete event per kernel, and a flow from the end of an awaited kernel to the start of the one that waits. Kernels
carry the names and keys that torch's own profiler writes, so that tools for its traces find them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from opara_backend.report.model import KernelRow, Report, ShapeReport, Span, Timeline

Event = dict[str, Any]


def trace(report: Report) -> str:
    """The trace as JSON; times in microseconds."""
    events: list[Event] = []
    several = len(report.shapes()) > 1
    for number, graph in enumerate(report.graphs):
        for shape in graph.shapes:
            for timeline in shape.timelines:
                title = f"{timeline.title} ({timeline.note})" if timeline.note else timeline.title
                name = f"graph {number}, shape {shape.shape}: {title}" if several else title
                process = 1 + len({e["pid"] for e in events})
                events += _process(process, name, shape, timeline)
    about = {"model": report.model, "device": report.device, **dict(report.versions)}
    document = {"schemaVersion": 1, "displayTimeUnit": "ns", "otherData": about, "traceEvents": events}
    return json.dumps(document, separators=(",", ":"))


def _process(process: int, name: str, shape: ShapeReport, timeline: Timeline) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "ts": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "ts": 0, "args": {"sort_index": process}}
    for stream in sorted({s.stream for s in timeline.spans}):
        label = {"name": f"stream {stream}"}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": stream, "ts": 0, "args": label}
    spans = {s.kernel: s for s in timeline.spans}
    unsure = set(timeline.ambiguous)
    for span in timeline.spans:
        yield _kernel(process, span, shape.kernels[span.kernel], span.kernel in unsure)
    if timeline.kind == "sequential":
        return
    for number, wait in enumerate(shape.waits):
        before, after = spans.get(wait.awaited), spans.get(wait.kernel)
        if before is None or after is None:
            continue
        flow = {"cat": "wait", "name": ", ".join(f"{h.kind} {h.buffer}" for h in wait.hazards), "id": number}
        # Inside the slice it starts from, or viewers bind it to the next one.
        left = max(before.start, before.end - 1e-9)
        yield {**flow, "ph": "s", "pid": process, "tid": before.stream, "ts": left * 1e6}
        yield {**flow, "ph": "f", "bp": "e", "pid": process, "tid": after.stream, "ts": after.start * 1e6}


def _kernel(process: int, span: Span, row: KernelRow, unsure: bool) -> Event:
    args: dict[str, Any] = {
        "stream": span.stream,
        "device": 0,
        "correlation": span.kernel + 1,
        "kernel": row.call,
        "source": row.source,
        "launch position": row.position,
        "alone_us": row.seconds * 1e6,
        "bound": "memory" if row.memory_bound else "compute",
        "critical path": row.critical,
    }
    if unsure:
        args["ambiguous"] = True
    if row.launches:
        launch = row.launches[0]
        args |= {
            "grid": list(launch.grid),
            "block": list(launch.block),
            "registers per thread": launch.registers,
            "shared memory": launch.shared_memory,
            "est. achieved occupancy %": round(100 * launch.occupancy),
            "waves": launch.waves,
            "share of the GPU": launch.share,
        }
    return {
        "ph": "X",
        "cat": "kernel",
        "name": row.label,
        "pid": process,
        "tid": span.stream,
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "args": args,
    }
