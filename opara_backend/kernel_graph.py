"""The lowered program as plain data: kernels, the buffers they touch, and what must come before what.

Takes: nothing but Python values. Imports no torch, so that schedules can be studied anywhere.
Gives: `Kernel`, `Buffer`, `Edge`, `KernelGraph`, a verifier that says what a legal graph is, and a JSON form
(`to_json` / `from_json`) in which a graph travels inside generated modules and recorded files.
Must not change: a graph once built. Every pass returns new data.

A *buffer* is one storage, not one tensor: views and in-place results are resolved to the storage they live in, so
two kernels conflict exactly when they name the same buffer and at least one of them writes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

BufferKind = Literal["input", "constant", "intermediate", "state"]
KernelKind = Literal["triton", "extern", "cpp", "glue"]
EdgeKind = Literal["RAW", "WAR", "WAW", "ORDER"]

BUFFER_KINDS: tuple[BufferKind, ...] = ("input", "constant", "intermediate", "state")
KERNEL_KINDS: tuple[KernelKind, ...] = ("triton", "extern", "cpp", "glue")
SCHEMA = 1

# What kernels share beside tensors, as buffers of their own, so that those who touch it keep their order: a random
# generator, effects on the host, and whatever custom operators keep to themselves.
RANDOM_STATE, EFFECTS, HIDDEN_STATE = "rng", "effects", "hidden"


class KernelGraphError(ValueError):
    """A kernel graph that is not legal; the message names the kernel and the buffer."""


@dataclass(frozen=True)
class Buffer:
    """One storage.

    nbytes: size in bytes; an expression over the graph's symbols where shapes are symbolic; None where only the
    kernel that allocates it knows.
    planned: True if the memory plan gives it an address, False if it arrives from outside or a kernel allocates it.
    part_of: the buffer this one is a slice of, if it is; slices of one buffer never overlap.
    """

    name: str
    kind: BufferKind = "intermediate"
    nbytes: int | str | None = None
    layout: str = ""
    device: str = "cpu"
    planned: bool = False
    part_of: str | None = None


@dataclass(frozen=True)
class Kernel:
    """One launch: what it calls, and the storages it reads and writes (names of buffers, in order of mention).

    flops: floating-point operations modelled from shapes, None where nobody knows.
    dtype: element type that decides which peak rate applies.
    source: where the user wrote it, `file:line`, empty if unknown.
    module: path of the module it computes, `features.3.conv`, empty if unknown (recordings of old have none).
    host: True if it needs the host (CPU tensor, copy between devices), so no CUDA Graph can hold it.
    inplace: pairs of a buffer it reads and one it writes, element by element: both may be the same memory.
    """

    name: str
    kind: KernelKind
    call: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    device: str = "cpu"
    dtype: str = "float32"
    flops: int | None = None
    source: str = ""
    host: bool = False
    inplace: tuple[tuple[str, str], ...] = ()
    module: str = ""


@dataclass(frozen=True)
class Edge:
    """Kernel `src` must be finished before kernel `dst` starts, because of `buffer` (indices into `kernels`).

    An ORDER edge has no buffer: a policy wants it so. Lowered graphs have none.
    """

    src: int
    dst: int
    kind: EdgeKind
    buffer: str


@dataclass(frozen=True)
class KernelGraph:
    """Kernels in program order (a topological order), their buffers, and the edges between them.

    outputs: for each value the program returns, the buffer it lives in, or None for a plain number.
    segments: index of the first kernel of each part; more than one means the host must look at a result in between,
    and a part may be empty: the host may look before the first kernel, or behind the last.
    symbols: names of the symbolic sizes the program was lowered with.
    """

    kernels: tuple[Kernel, ...]
    buffers: tuple[Buffer, ...]
    edges: tuple[Edge, ...]
    outputs: tuple[str | None, ...] = ()
    segments: tuple[int, ...] = (0,)
    symbols: tuple[str, ...] = ()
    device: str = "cpu"
    _buffer_index: Mapping[str, int] = field(init=False, repr=False, compare=False, hash=False)
    _predecessors: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False, hash=False)
    _successors: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_buffer_index", {b.name: i for i, b in enumerate(self.buffers)})
        before: list[list[int]] = [[] for _ in self.kernels]
        after: list[list[int]] = [[] for _ in self.kernels]
        for src, dst in sorted({(e.src, e.dst) for e in self.edges}):
            if not (0 <= src < len(self.kernels) and 0 <= dst < len(self.kernels)):
                raise KernelGraphError(f"edge {src} -> {dst} leaves the graph of {len(self.kernels)} kernels")
            before[dst].append(src)
            after[src].append(dst)
        object.__setattr__(self, "_predecessors", tuple(map(tuple, before)))
        object.__setattr__(self, "_successors", tuple(map(tuple, after)))

    def __len__(self) -> int:
        return len(self.kernels)

    def predecessors(self, kernel: int) -> tuple[int, ...]:
        """Kernels that must be finished before `kernel`, ascending, each once."""
        return self._predecessors[kernel]

    def successors(self, kernel: int) -> tuple[int, ...]:
        """Kernels that wait for `kernel`, ascending, each once."""
        return self._successors[kernel]

    def buffer(self, name: str) -> Buffer:
        """The buffer called `name`; KernelGraphError if there is none."""
        try:
            return self.buffers[self._buffer_index[name]]
        except KeyError:
            raise KernelGraphError(f"no buffer {name!r}; the graph has {len(self.buffers)} buffers") from None

    def bind(self, nbytes: Mapping[str, int | None]) -> KernelGraph:
        """The same graph with the sizes (bytes) of the named buffers filled in, for one concrete shape.

        None for one that must stay out of any plan.
        """
        bound = tuple(replace(b, nbytes=nbytes[b.name]) if b.name in nbytes else b for b in self.buffers)
        return replace(self, buffers=bound)

    def without_labels(self) -> KernelGraph:
        """The same graph, whose kernels do not say where a user wrote them."""
        return replace(self, kernels=tuple(replace(k, source="", module="") for k in self.kernels))

    def verify(self) -> None:
        """Raise KernelGraphError unless the graph is legal: see `problems`."""
        for problem in problems(self):
            raise KernelGraphError(problem)

    def to_json(self) -> str:
        """One line of JSON, schema `SCHEMA`."""
        fields = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        return json.dumps({"schema": SCHEMA, **fields}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> KernelGraph:
        """The graph written by `to_json`; KernelGraphError if the text is of another schema or incomplete."""
        try:
            data: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise KernelGraphError(f"not a kernel graph: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise KernelGraphError(f"kernel graph of schema {found!r}; this version reads {SCHEMA}")
        try:
            return KernelGraph(
                kernels=tuple(_kernel(k) for k in data["kernels"]),
                buffers=tuple(Buffer(**b) for b in data["buffers"]),
                edges=tuple(Edge(**e) for e in data["edges"]),
                outputs=tuple(data["outputs"]),
                segments=tuple(data["segments"]),
                symbols=tuple(data["symbols"]),
                device=data["device"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise KernelGraphError(f"kernel graph with missing or unknown fields: {error}") from error

    def __str__(self) -> str:
        """The graph as a program: inputs, then one line a kernel in program order, then what is returned."""
        lines = [f"kernel_graph({', '.join(b.name for b in self.buffers if b.kind == 'input')}) on {self.device}:"]
        starts = set(self.segments[1:])
        for index in range(len(self.kernels) + 1):
            if index in starts:
                lines.append("  -- the host looks at a result --")
            if index < len(self.kernels):
                lines.append(f"  {_kernel_line(self, index, self.kernels[index])}")
        lines.append(f"  return {', '.join(str(name) for name in self.outputs) or 'nothing'}")
        return "\n".join(lines)


def _kernel(data: Mapping[str, Any]) -> Kernel:
    pairs = tuple((read, written) for read, written in data.get("inplace", ()))  # recordings of old have none
    return Kernel(**{**data, "reads": tuple(data["reads"]), "writes": tuple(data["writes"]), "inplace": pairs})


def _kernel_line(graph: KernelGraph, index: int, kernel: Kernel) -> str:
    written = ", ".join(
        f"{name}: {layout}" if (layout := graph.buffer(name).layout) else name for name in kernel.writes
    )
    after = ", ".join(f"%{i}" for i in graph.predecessors(index))
    parts = [f"%{index} {written} = {kernel.call}({', '.join(kernel.reads)})"]
    if after:
        parts.append(f"after {after}")
    if kernel.source:
        parts.append(f"# {kernel.source}")
    return "  ".join(parts)


def problems(graph: KernelGraph) -> Iterator[str]:
    """What is wrong with a graph, one sentence each; nothing if it is legal.

    Legal: names unique; kinds known; every buffer a kernel names exists; whoever touches a buffer touches its parts
    (so that names alone tell conflicts); what a kernel allocates is written before it is read; constants are never
    written; edges go forward in program order and each is a real conflict on its buffer; every output names a buffer;
    segments start at 0 and ascend. That the edges are *complete* is not taken on trust here: `scheduling.verify`
    recomputes conflicts from reads and writes.
    """
    counts = Counter(b.name for b in graph.buffers)
    yield from (f"two buffers are called {n!r}" for n in sorted(n for n, count in counts.items() if count > 1))
    kernel_names = [k.name for k in graph.kernels]
    if len(set(kernel_names)) != len(kernel_names):
        yield "two kernels have the same name"
    for buffer in graph.buffers:
        if buffer.kind not in BUFFER_KINDS:
            yield f"buffer {buffer.name!r} is of kind {buffer.kind!r}; accepted: {', '.join(BUFFER_KINDS)}"
        if isinstance(buffer.nbytes, int) and buffer.nbytes < 0:
            yield f"buffer {buffer.name!r} has {buffer.nbytes} bytes"
    known = {b.name: b for b in graph.buffers}
    yield from _part_problems(graph, known)
    # Memory the program allocates may be read as it comes: operators that fill it take it as an argument.
    written = {b.name for b in graph.buffers if b.kind != "intermediate" or b.planned}
    written |= {b.part_of for b in graph.buffers if b.part_of is not None}  # written through its parts
    for kernel in graph.kernels:
        if kernel.kind not in KERNEL_KINDS:
            yield f"kernel {kernel.name!r} is of kind {kernel.kind!r}; accepted: {', '.join(KERNEL_KINDS)}"
        for name in (*kernel.reads, *kernel.writes):
            if name not in known:
                yield f"kernel {kernel.name!r} touches {name!r}, which is no buffer of the graph"
        for name in kernel.reads:
            if name in known and name not in written and name not in kernel.writes:
                yield f"kernel {kernel.name!r} reads {name!r} before any kernel wrote it"
        for name in kernel.writes:
            if name in known and known[name].kind == "constant":
                yield f"kernel {kernel.name!r} writes the constant {name!r}"
            written.add(name)
        for read, write in kernel.inplace:
            if read not in kernel.reads or write not in kernel.writes or read == write:
                yield f"kernel {kernel.name!r} cannot write {write!r} in place of {read!r}: it reads or writes neither"
    for edge in graph.edges:
        if edge.src >= edge.dst:
            yield f"edge {edge.src} -> {edge.dst} goes backwards in program order"
        elif not _is_conflict(graph.kernels[edge.src], graph.kernels[edge.dst], edge):
            yield f"edge {edge.src} -> {edge.dst} claims a {edge.kind} on {edge.buffer!r} that its kernels do not have"
    yield from (f"output {n!r} is no buffer of the graph" for n in graph.outputs if n is not None and n not in known)
    starts = list(graph.segments)
    if not starts or starts[0] != 0 or starts != sorted(starts) or starts[-1] > len(graph):
        yield f"segments {graph.segments} must start at 0, ascend, and stay within {len(graph)} kernels"


def _part_problems(graph: KernelGraph, known: Mapping[str, Buffer]) -> Iterator[str]:
    parts: dict[str, list[str]] = {}
    for buffer in graph.buffers:
        if buffer.part_of is None:
            continue
        parts.setdefault(buffer.part_of, []).append(buffer.name)
        above, whole = {buffer.name}, known.get(buffer.part_of)
        while whole is not None and whole.part_of is not None and whole.name not in above:
            above.add(whole.name)
            whole = known.get(whole.part_of)
        if whole is None:
            yield f"buffer {buffer.name!r} is part of something that is no buffer of the graph"
        elif whole.part_of is not None:
            yield f"buffer {buffer.name!r} is part of itself"
    for kernel in graph.kernels if parts else ():
        writes = set(kernel.writes)
        for touched, enough in ((kernel.reads, writes.union(kernel.reads)), (kernel.writes, writes)):
            for name in touched:
                missing = [part for part in parts.get(name, ()) if part not in enough]
                yield from (f"kernel {kernel.name!r} touches {name!r} but not its part {part!r}" for part in missing)


def _is_conflict(first: Kernel, second: Kernel, edge: Edge) -> bool:
    writes_first, writes_second = edge.buffer in first.writes, edge.buffer in second.writes
    if edge.kind == "RAW":
        return writes_first and edge.buffer in second.reads
    if edge.kind == "WAR":
        return edge.buffer in first.reads and writes_second
    return edge.kind == "WAW" and writes_first and writes_second
