"""Lowered programs in plain Python: bytes instead of tensors, and a few functions in place of kernels.

`Source` writes lines as a wrapper of Inductor would, hands each to a ProgramWriter, and compiles what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opara_backend.kernel_graph import Buffer, KernelGraph
from opara_backend.lowering.kernels import Call
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.statements import parse

NBYTES = 8
Allocate = Callable[[str, int], memoryview]


def fresh(name: str, nbytes: int) -> memoryview:
    """Memory of its own."""
    return memoryview(bytearray(nbytes))


def mix(target: memoryview, sources: Sequence[memoryview], salt: int) -> None:
    """Overwrite `target` with something that depends on every byte of `sources`, on their order, and on `salt`."""
    state = salt
    for source in sources:
        for byte in source:
            state = (state * 31 + byte + 1) % 65521
    for place in range(len(target)):
        state = (state * 31 + place) % 65521
        target[place] = state % 256


def make(sources: Sequence[memoryview], salt: int) -> memoryview:
    """Like `mix`, into memory the kernel allocates itself."""
    target = memoryview(bytearray(NBYTES))
    mix(target, sources, salt)
    return target


def same(source: memoryview) -> memoryview:
    """What it was given: a result that aliases an argument."""
    return source


class Generator:
    """A random generator: every number depends on all before it."""

    def __init__(self) -> None:
        self.state = 1

    def draw(self, target: memoryview) -> None:
        self.state = self.state * 75 % 65537
        mix(target, (), self.state)


@dataclass
class Run:
    """One run of a program: its kernels so far, what drops buffers, and the outputs in the end."""

    steps: Any
    tasks: list[Callable[[], None]]
    release: dict[str, Callable[[], None]]
    outputs: tuple[Any, ...] | None = None
    done: int = 0

    def advance(self) -> bool:
        try:
            next(self.steps)
        except StopIteration as finished:
            self.outputs = finished.value
            return False
        return True

    def finish(self) -> tuple[Any, ...]:
        """Run in program order what has not run yet."""
        while self.outputs is None:
            for task in self.tasks[self.done :]:
                task()
            self.done = len(self.tasks)
            self.advance()
        return self.outputs


@dataclass
class Source:
    """A program being written, one method per kind of line."""

    inputs: Sequence[str] = ("arg0",)
    device: str = "cpu"
    constants: Sequence[str] = ()
    writer: ProgramWriter = field(init=False)

    def __post_init__(self) -> None:
        def buffers(names: Sequence[str], kind: Any) -> tuple[Buffer, ...]:
            return tuple(Buffer(name, kind, NBYTES, "", self.device) for name in names)

        self.writer = ProgramWriter(self.device, buffers(self.inputs, "input"), buffers(self.constants, "constant"))

    def alloc(self, name: str, nbytes: int | str = NBYTES, device: str = "") -> None:
        buffer = Buffer(name, "intermediate", nbytes, "", device or self.device, planned=True)
        self.writer.allocation(buffer, [f"{name} = alloc({name!r}, {nbytes})"])

    def view(self, text: str) -> None:
        statement = parse(text)
        assert statement.kind == "view", statement
        self.writer.view(statement.stores[0], statement, [text])

    def part(self, text: str, whole: str) -> None:
        statement = parse(text)
        self.writer.part(statement.stores[0], whole, statement, [text])

    def call(self, text: str, reads: str = "", writes: str = "", **more: Any) -> None:
        """A kernel: `text`, and which names it reads and writes; a name it stores is memory it allocates."""
        statement = parse(text)
        assert statement.kind == "call", statement
        kind = more.pop("kind", "extern")
        aliases = tuple(more.pop("aliases", "").split())
        marks = {mark: more.pop(mark, False) for mark in ("random", "effect", "custom")}
        call = Call(kind, statement.callee, tuple(reads.split()), tuple(writes.split()), aliases, **marks)
        results = [Buffer(name, "intermediate", None, "", self.device) for name in statement.stores]
        device = more.pop("device", self.device)
        self.writer.launch(call, [text], statement.stores, device=device, results=results, **more)

    def host(self, text: str, indent: int = 0) -> None:
        self.writer.host(parse(text), [text], indent)

    def check(self, text: str) -> None:
        self.writer.check(parse(text), [text])

    def plain(self, text: str) -> None:
        assert parse(text).kind == "plain"
        self.writer.plain([text])

    def graph(self, *outputs: str) -> KernelGraph:
        """The graph, which must be legal."""
        graph = self.writer.graph([parse(output) for output in outputs])
        graph.verify()
        return graph

    def text(self, *outputs: str) -> str:
        """The whole program, as a generated module would have it."""
        names = [*self.inputs, *self.constants]
        lines = [
            f"{', '.join(names)}, = args" if names else "pass",
            *self.writer.body(),
            "yield",
            f"return ({''.join(f'{output}, ' for output in outputs)})",
        ]
        return "def program(args, alloc, task, release):\n" + "".join(f"    {line}\n" for line in lines)

    def run(self, *outputs: str, args: Sequence[Any] = (), alloc: Allocate = fresh, **functions: Any) -> Run:
        """Start the program; nothing has run yet."""
        module: dict[str, Any] = {"mix": mix, "make": make, "same": same, "draw": Generator().draw, **functions}
        exec(compile(self.text(*outputs), "program", "exec"), module)
        tasks: list[Callable[[], None]] = []
        release: dict[str, Callable[[], None]] = {}
        return Run(module["program"](list(args), alloc, tasks.append, release), tasks, release)
