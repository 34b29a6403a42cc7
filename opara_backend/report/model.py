"""What a report says, as plain frozen data, and its JSON form.

Takes: nothing but Python values. Gives: `Report` and its parts. Times are seconds, sizes bytes, kernels indices into
`GraphReport.kernels`. Must not change: a report once built. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from opara_backend import codec
from opara_backend.report.record import Stages

SCHEMA = 3
_FUSED = re.compile(r"(?:triton|cpp)_(?:[a-z]+_)?fused_(?P<operations>.*?)(?:_\d+)?$")


class ReportError(ValueError):
    """Text that is no report this version can read."""


@dataclass(frozen=True)
class LaunchRow:
    """One launch of a kernel on the device: what it asks for, and how far that fills the GPU.

    limited_by: what keeps more blocks from an SM; "grid" if all blocks are resident with room to spare.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    registers: int
    shared_memory: int
    blocks_per_sm: int
    limited_by: str
    occupancy: float
    waves: float
    share: float


@dataclass(frozen=True)
class KernelRow:
    """One kernel. position: its place in launch order; critical: it lies on the longest chain of dependent kernels.

    seconds: what `ShapeReport.basis` says. host_seconds: as a CPU took for it, where it ran on one.
    """

    name: str
    call: str
    kind: str
    dtype: str
    module: str
    source: str
    stream: int
    position: int
    segment: int
    seconds: float
    host_seconds: float | None
    memory_bound: bool
    flops: int | None
    nbytes: int
    critical: bool
    launches: tuple[LaunchRow, ...] = ()

    @property
    def label(self) -> str:
        """What people know it by: the module it computes and what is called."""
        return f"{self.module}: {self.operation}" if self.module else self.operation

    @property
    def operation(self) -> str:
        """What is called, in short: `convolution`, `fused batch_norm relu`."""
        fused = _FUSED.match(self.call)
        if fused is None:
            called = self.call.removeprefix("extern_kernels.").removeprefix("torch.ops.").removesuffix(".default")
            return called.removeprefix("aten.").removeprefix("opara_backend.")
        text = fused["operations"].replace("native_batch_norm_legit_no_training", "batch_norm")
        return f"fused {text.replace('_with_indices', '').strip('_')}"


@dataclass(frozen=True)
class Hazard:
    """`second` must come after `first`, because of `buffer` (RAW, WAR, WAW), or because a policy wants it (ORDER)."""

    kind: str
    buffer: str
    first: int
    second: int


@dataclass(frozen=True)
class WaitRow:
    """Before `kernel`, its stream waits for `awaited`; without that the `hazards` would be open."""

    kernel: int
    awaited: int
    hazards: tuple[Hazard, ...]


@dataclass(frozen=True)
class CandidateRow:
    """A schedule that was tried. predicted: by the simulator; measured: per replay, None where nothing was timed."""

    policy: str
    streams: int
    waits: int
    predicted: float | None
    measured: float | None
    chosen: bool


@dataclass(frozen=True)
class LoweringRow:
    """A way of lowering the graph that was timed: its rewrites (options), seconds per replay of its best schedule."""

    rewrites: tuple[str, ...]
    measured: float
    chosen: bool

    @property
    def label(self) -> str:
        """What people know it by."""
        return ", ".join(self.rewrites) or "no rewrites"


@dataclass(frozen=True)
class BoundRow:
    """How fast no schedule of these kernels can beat. dominant: which of the two bounds is the larger.

    gap: how far the replay (measured if it was, else predicted) lies above the bound, as a fraction of it. streams,
    launch, contention: its seconds above the critical path by cause (`scheduling.gaps`).
    """

    critical_path: float
    work: float
    dominant: str
    predicted: float | None
    measured: float | None
    gap: float | None
    streams: float | None = None
    launch: float | None = None
    contention: float | None = None


@dataclass(frozen=True)
class MemoryRow:
    """The arena, and what its buffers would take one by one. reuse: the part that sharing saves, 0 to 1.

    libraries: bytes that the allocator reserves for workspaces and results of libraries, of each stream that has any;
    None where nobody asked.
    """

    arena_bytes: int
    requested_bytes: int
    reuse: float
    buffers: int
    libraries: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Span:
    """`kernel` ran (or is predicted to run) on `stream` from `start` to `end`, seconds from the program's start."""

    kernel: int
    stream: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each kernel runs. kind: "plan", "sequential" or "measured".

    ambiguous: kernels whose times may be those of another kernel that looks the same. note: how it came about.
    """

    kind: str
    title: str
    spans: tuple[Span, ...]
    ambiguous: tuple[int, ...] = ()
    note: str = ""

    @property
    def makespan(self) -> float:
        """Seconds until the last kernel has ended."""
        return max((s.end for s in self.spans), default=0.0)


@dataclass(frozen=True)
class ShapeReport:
    """How one concrete shape of a graph runs. basis: where the kernels' durations come from.

    state: "captured", "in order" (planned, not captured) or "unplanned". critical: the longest chain of dependent
    kernels. lowerings: those timed against each other, if there were several. notes: what else to know.
    """

    shape: str
    state: str
    policy: str
    streams: int
    basis: str
    estimated: bool
    kernels: tuple[KernelRow, ...]
    waits: tuple[WaitRow, ...]
    candidates: tuple[CandidateRow, ...]
    bound: BoundRow | None
    memory: MemoryRow | None
    critical: tuple[int, ...]
    timelines: tuple[Timeline, ...]
    lowerings: tuple[LoweringRow, ...] = ()
    notes: tuple[str, ...] = ()

    def timeline(self, kind: str) -> Timeline | None:
        """The timeline of that kind, if there is one."""
        return next((t for t in self.timelines if t.kind == kind), None)


@dataclass(frozen=True)
class FallbackRow:
    """A step down the ladder. source: the user's line, where it is known."""

    reason: str
    detail: str
    remedy: str
    error: str = ""
    source: str = ""


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph, lowered in one way. segments: index of the first kernel of each part. edges: (before, after,
    kind, buffer). rewrites: options whose rewrites are in it.

    Where shapes run by different lowerings of one graph, each is a report of its own; calls, time spent and fallbacks
    are told with the first.
    """

    device: str
    segments: tuple[int, ...]
    symbols: tuple[str, ...]
    edges: tuple[tuple[int, int, str, str], ...]
    replays: int
    other_calls: int
    hit_rate: float
    stages: Stages
    fallbacks: tuple[FallbackRow, ...]
    shapes: tuple[ShapeReport, ...]
    rewrites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was done with a model. See `explain`.

    fallbacks: steps down of parts that are no graph of ours (training, foreign devices). options: as text.
    modules: path and class of each of the model's modules.
    """

    model: str
    device: str
    versions: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...] = ()
    graphs: tuple[GraphReport, ...] = ()
    fallbacks: tuple[FallbackRow, ...] = ()
    notes: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    def shapes(self) -> tuple[ShapeReport, ...]:
        """All shapes of all graphs, in order."""
        return tuple(shape for graph in self.graphs for shape in graph.shapes)

    def to_json(self) -> str:
        """One line of JSON, schema `SCHEMA`."""
        return codec.dump(self, SCHEMA)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report written by `to_json`; ReportError if the text is of another schema or incomplete."""
        try:
            report: Report = codec.load(text, Report, SCHEMA, "report")
        except codec.FormatError as error:
            raise ReportError(str(error)) from error
        return report

    def __str__(self) -> str:
        from opara_backend.report.text import plain

        return plain(self)

    def text(self, *, width: int = 120, kernels: int | None = None) -> str:
        """The tables of `str()`, `width` characters wide, with at most `kernels` kernels a shape (None: all)."""
        from opara_backend.report.text import plain

        return plain(self, width=width, kernels=kernels)

    def _repr_html_(self) -> str:
        from opara_backend.report.text import html

        return html(self)

    def save_trace(self, path: str | Path) -> Path:
        """Write a trace for https://ui.perfetto.dev or chrome://tracing; returns the file."""
        from opara_backend.report.trace import trace

        return _written(path, trace(self))

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page with the timelines; returns the file."""
        from opara_backend.report.page import page

        return _written(path, page(self))

    def save_json(self, path: str | Path) -> Path:
        """Write `to_json()`; returns the file."""
        return _written(path, self.to_json() + "\n")

    def to_dot(self, graph: int = 0) -> str:
        """The kernel graph number `graph` in Graphviz's language, one cluster a stream."""
        from opara_backend.report.drawing import dot

        return dot(self._graph(graph))

    def to_mermaid(self, graph: int = 0) -> str:
        """The kernel graph number `graph` as a Mermaid flowchart, one subgraph a stream."""
        from opara_backend.report.drawing import mermaid

        return mermaid(self._graph(graph))

    def _graph(self, number: int) -> GraphReport:
        if not 0 <= number < len(self.graphs):
            raise ValueError(f"graph {number}: this report holds {len(self.graphs)} graphs" + self._why_none())
        return self.graphs[number]

    def _why_none(self) -> str:
        said = [*(f"{step.reason}: {step.detail}" for step in self.fallbacks), *self.notes]
        return f" ({'; '.join(said)})" if said and not self.graphs else ""


def _written(path: str | Path, text: str) -> Path:
    target = Path(path)
    target.write_text(text, encoding="utf-8")
    return target
