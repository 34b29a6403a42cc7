"""Classified lines -> a generator's source text and its KernelGraph.

Takes: lines one by one, in program order, already sorted into views, allocations, calls and host statements.
Gives: the body of `program(args, alloc, task, release)` and the KernelGraph that describes it.
Must not change: Inductor's text of a call; it is emitted as it came.

The emitted body allocates through `alloc`, hands every launch to `task` as a closure, and yields when everything
handed over so far must have run; what it returns are the program's outputs:

    def program(args, alloc, task, release):
        arg0_1, arg1_1 = args
        buf1 = None
        buf0 = alloc('buf0', (8, 16), (16, 1), torch.float32, 'cuda')
        @task
        def k0():
            triton_poi_fused_add_0.run(arg0_1, arg1_1, buf0, 128, stream=get_raw_stream(0))
        @task
        def k1():
            nonlocal buf1
            buf1 = extern_kernels.convolution(buf0, ...)
        yield
        return (buf1, )

`release[name]` drops the program's own references to a buffer that a kernel allocated, so that an executor can end
its life when the schedule says so; or to one that a custom operator is given, so that it shows whether that keeps it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from opara_backend.kernel_graph import EFFECTS, HIDDEN_STATE, RANDOM_STATE, Buffer, Kernel, KernelGraph
from opara_backend.lowering.dependencies import edges
from opara_backend.lowering.kernels import Call
from opara_backend.lowering.statements import Statement

_STATE = (
    (RANDOM_STATE, "random generator"),
    (EFFECTS, "effects outside the program"),
    (HIDDEN_STATE, "what custom operators may share"),
)


@dataclass
class _Launch:
    """A kernel being written: its lines, and the names its closure binds."""

    call: Call
    lines: list[str]
    binds: dict[str, None]
    device: str
    dtype: str
    flops: int | None
    source: str
    module: str = ""
    inplace: tuple[tuple[str, str], ...] = ()


@dataclass
class ProgramWriter:
    """Collects lines and ends in source text and a graph. Names are Inductor's own (`arg0_1`, `buf7`)."""

    device: str
    inputs: tuple[Buffer, ...]
    constants: tuple[Buffer, ...]
    symbols: tuple[str, ...] = ()
    _body: list[str | _Launch] = field(default_factory=list)
    _launches: list[_Launch] = field(default_factory=list)
    _segments: list[int] = field(default_factory=lambda: [0])
    _buffers: dict[str, Buffer] = field(default_factory=dict)
    _root: dict[str, str] = field(default_factory=dict)
    _part_of: dict[str, str] = field(default_factory=dict)
    _parts: dict[str, list[str]] = field(default_factory=dict)  # by root
    _producer: dict[str, _Launch] = field(default_factory=dict)
    _ran: set[str] = field(default_factory=set)
    _bound_inline: list[str] = field(default_factory=list)
    _host_names: dict[str, None] = field(default_factory=dict)
    _indent: int = 0

    def __post_init__(self) -> None:
        for buffer in (*self.inputs, *self.constants):
            self._buffers[buffer.name] = buffer

    # --- what the codegen calls, one method per kind of line -----------------------------------------------------

    def allocation(self, buffer: Buffer, lines: Sequence[str]) -> None:
        """A buffer the program allocates; `lines` bind its name."""
        self._buffers[buffer.name] = buffer
        self._bound_inline.append(buffer.name)
        self._inline(lines)

    def part(self, name: str, whole: str, statement: Statement, lines: Sequence[str]) -> None:
        """`name` is a slice of `whole` that no other slice overlaps (operands of a concatenation).

        It becomes a buffer of its own, so that kernels writing different slices stay independent; whoever touches
        the whole touches every part.
        """
        if self._producer.get(whole) is not None or self.root(whole) != whole:
            self.view(name, statement, lines)
            return
        self._buffers[name] = Buffer(name, "intermediate", 0, f"part of {whole}", self.device_of(whole), False)
        self._part_of[name] = whole
        self._parts.setdefault(whole, []).append(name)
        self._bound_inline.append(name)
        self._inline(lines)

    def view(self, name: str, statement: Statement, lines: Sequence[str]) -> None:
        """`name` is memory that exists already; it launches nothing."""
        sources = [n for n in statement.loads if self.knows(n)]
        producers = {id(p): p for n in sources if (p := self._producer.get(n)) is not None}
        for source in sources:
            self._unite(name, source)
        if not producers:
            self._bound_inline.extend(statement.stores)
            self._inline(lines)
            if not self._ran.isdisjoint(sources):
                self._ran.update(statement.stores)
            return
        producer = list(producers.values())[-1]
        if len(producers) > 1:  # a view over two kernels' results: bound when the later one has run
            producer = max(producers.values(), key=self._launches.index)
        producer.lines.extend(lines)
        producer.binds.update(dict.fromkeys(statement.stores))
        for stored in statement.stores:
            self._producer[stored] = producer

    def check(self, statement: Statement, lines: Sequence[str]) -> None:
        """Something that must hold of a kernel's results, looked at when it has run; nothing of any other memory."""
        producers = [p for name in statement.loads if (p := self._producer.get(name)) is not None]
        if self._indent or (not producers and not self._ran.isdisjoint(statement.loads)):
            self._inline(lines)
        elif producers:
            max(producers, key=self._launches.index).lines.extend(lines)

    def launch(
        self,
        call: Call,
        lines: Sequence[str],
        stores: Sequence[str],
        *,
        device: str,
        dtype: str = "float32",
        flops: int | None = None,
        source: str = "",
        module: str = "",
        results: Iterable[Buffer] = (),
        inplace: Iterable[tuple[str, str]] = (),
    ) -> None:
        """A kernel. `stores`: names its text binds; `results`: buffers it allocates itself; `inplace`: see `Kernel`."""
        bound = dict.fromkeys(stores)
        launch = _Launch(call, list(lines), bound, device, dtype, flops, source, module, tuple(inplace))
        for buffer in results:
            self._buffers.setdefault(buffer.name, buffer)
        for name in stores:
            self._producer[name] = launch
            for alias in call.aliases:
                if self.knows(alias):
                    self._unite(name, alias)
        self._launches.append(launch)
        self._body.append(launch)

    def host(self, statement: Statement, lines: Sequence[str], indent: int) -> None:
        """Control flow, or a value read back: everything before it must have run. Emitted as it is."""
        if not self._indent and (len(self._segments) == 1 or self._segments[-1] != len(self._launches)):
            self._body.append("yield")
            self._segments.append(len(self._launches))
            self._ran.update(self._producer)
            self._producer.clear()  # they have run: views of their results need not wait for them
        self._inline(lines)
        self._indent = max(0, self._indent + indent)
        for name in statement.stores:
            self._host_names[name] = None
            self._buffers[name] = Buffer(name, "state", None, "from the host", self.device)

    def plain(self, lines: Sequence[str]) -> None:
        """Arithmetic on sizes."""
        self._inline(lines)

    def depends_on_host(self, statement: Statement) -> bool:
        """True inside control flow, or if the statement uses a name only the host knows."""
        return self._indent > 0 or any(n in self._host_names and n not in self._buffers for n in statement.loads)

    def touches_data(self, statement: Statement) -> bool:
        """True unless the statement speaks of sizes only, none of which depends on data."""
        if self._indent or statement.stores:
            return True
        return any(self.knows(n) or n in self._host_names for n in statement.loads)

    # --- names and storages -----------------------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        """True if `name` is a tensor of the program."""
        return name in self._buffers or name in self._root

    def root(self, name: str) -> str:
        """The buffer whose storage `name` lives in."""
        while name in self._root:
            name = self._root[name]
        return name

    def device_of(self, name: str) -> str:
        """Device of the storage `name` lives in."""
        buffer = self._buffers.get(self.root(name))
        return buffer.device if buffer else self.device

    def _whole(self, name: str) -> str:
        """The buffer that `name` is a view or a part of."""
        root = self.root(name)
        while root in self._part_of:
            root = self.root(self._part_of[root])
        return root

    def _lent(self) -> set[str]:
        """Buffers that the program allocates and custom operators are given."""
        custom = (launch.call for launch in self._launches if launch.call.custom)
        given = {self._whole(name) for call in custom for name in (*call.reads, *call.writes) if self.knows(name)}
        return {name for name in given if name in self._buffers and self._buffers[name].planned}

    def _unite(self, name: str, other: str) -> None:
        first, second = self.root(name), self.root(other)
        if first != second:
            # An input or constant keeps its name; so does whatever was there before.
            if first in self._buffers and self._buffers[first].kind in ("input", "constant", "state"):
                first, second = second, first
            self._root[first] = second
            if first in self._parts:
                self._parts.setdefault(second, []).extend(self._parts.pop(first))

    def _touched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Storages behind `names`, a whole with all its parts."""
        found: dict[str, None] = {}
        todo = deque(self.root(n) for n in names if self.knows(n))
        while todo:
            name = todo.popleft()
            if name not in found:
                found[name] = None
                todo.extend(self._parts.get(name, ()))
        return tuple(found)

    def _inline(self, lines: Sequence[str]) -> None:
        self._body.extend("    " * self._indent + line for line in lines)

    # --- the results ------------------------------------------------------------------------------------------

    def numbers(self) -> tuple[str, ...]:
        """Inputs of a GPU program that lie on the CPU and of which kernels are given the value alone.

        torch passes a Python float that has changed between calls that way. Such a value is part of a launch, as sizes
        are.
        """
        if self.device == "cpu":
            return ()
        texts = [line for launch in self._launches for line in launch.lines]
        texts += [line for line in self._body if isinstance(line, str)]
        written = {name for launch in self._launches for name in (*launch.call.writes, *launch.binds)}
        return tuple(
            buffer.name
            for buffer in self.inputs
            if buffer.device == "cpu"
            and buffer.layout.endswith("[]")
            and buffer.name not in written
            and not any(re.search(rf"\b{buffer.name}\b(?!\.item\(\))", text) for text in texts)
        )

    def graph(self, outputs: Sequence[Statement]) -> KernelGraph:
        """The KernelGraph; `outputs`: the returned expressions, in order."""
        numbers = self.numbers()
        written = {n for n, b in self._buffers.items() if b.kind != "intermediate"}
        kernels = tuple(self._kernel(i, launch, written, numbers) for i, launch in enumerate(self._launches))
        used = {n for k in kernels for n in (*k.reads, *k.writes)}
        results = tuple(next((self.root(n) for n in o.loads if self.knows(n)), None) for o in outputs)
        used.update(n for n in results if n is not None)
        buffers = [b for n, b in self._buffers.items() if self.root(n) == n and (b.kind == "input" or n in used)]
        wholes = [self._buffers[w] for w in map(self.root, self._part_of.values()) if w in self._buffers]
        buffers.extend(w for w in dict.fromkeys(wholes) if w not in buffers)
        for name, what in _STATE:
            if name in used:
                buffers.append(Buffer(name, "state", 0, what, self.device))
        return KernelGraph(
            kernels=kernels,
            buffers=tuple(self._with_parts(b) for b in buffers),
            edges=edges(kernels),
            outputs=results,
            segments=tuple(self._segments),
            symbols=self.symbols,
            device=self.device,
        )

    def _with_parts(self, buffer: Buffer) -> Buffer:
        whole = self._part_of.get(buffer.name)
        if whole is None:
            return buffer
        return Buffer(buffer.name, buffer.kind, buffer.nbytes, buffer.layout, buffer.device, False, self.root(whole))

    def _kernel(self, index: int, launch: _Launch, written: set[str], numbers: Sequence[str]) -> Kernel:
        """The Kernel of `launch`; `written` are the storages that hold values before it, and after it gains its own."""
        reads = self._touched(launch.call.reads)
        writes = self._touched((*launch.call.writes, *(s for s in launch.binds if self.knows(s))))
        if launch.call.kind == "cpp":  # what this kernel is first to write, it does not read
            reads = tuple(r for r in reads if r not in writes or r in written)
        written.update(writes)
        devices = {self.device_of(n) for n in (*reads, *writes) if n not in numbers}
        host = self.device != "cpu" and bool((devices | {launch.device}) - {self.device})
        call = launch.call
        state = (HIDDEN_STATE,) * call.custom + (RANDOM_STATE,) * call.random + (EFFECTS,) * call.effect
        writes = (*writes, *state)
        if call.custom and not call.random:  # it may: so none that does changes places with it
            state = (*state, RANDOM_STATE)
        reads = (*reads, *state)
        return Kernel(
            name=f"k{index}",
            kind=launch.call.kind,
            call=launch.call.callee,
            reads=reads,
            writes=writes,
            device=launch.device,
            dtype=launch.dtype,
            flops=launch.flops,
            source=launch.source,
            module=launch.module,
            host=host or launch.call.effect,
            inplace=self._inplace(launch, reads, writes),
        )

    def _inplace(self, launch: _Launch, reads: Sequence[str], writes: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Pairs of storages: whole ones that the program allocates, and that the kernel touches as the pair says."""
        pairs = ((self.root(read), self.root(write)) for read, write in launch.inplace)
        planned = {n for n in (*reads, *writes) if n in self._buffers and self._buffers[n].planned}
        whole = planned - self._part_of.keys() - self._parts.keys()
        return tuple(
            (read, write)
            for read, write in pairs
            if read in reads and write in writes and {read, write} <= whole and read not in writes
        )

    def body(self) -> list[str]:
        """Source lines of the program, without its header and its last `yield` and `return`."""
        bound = [n for launch in self._launches for n in launch.binds]
        lines = [f"{' = '.join(dict.fromkeys(bound))} = None"] if bound else []
        index = 0
        for part in self._body:
            if isinstance(part, str):
                lines.append(part)
                continue
            lines += ["@task", f"def k{index}():"]
            if part.binds:
                lines.append(f"    nonlocal {', '.join(part.binds)}")
            lines += [f"    {text}" for text in part.lines]
            index += 1
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(bound):
            groups.setdefault(self.root(name), []).append(name)
        lent = self._lent()
        for name in self._bound_inline:
            if (whole := self._whole(name)) in lent:
                groups.setdefault(whole, []).append(name)
        for root, names in groups.items():
            lines += ["def drop():", f"    nonlocal {', '.join(names)}", f"    {' = '.join(names)} = None"]
            lines.append(f"release[{root!r}] = drop")
        return lines
