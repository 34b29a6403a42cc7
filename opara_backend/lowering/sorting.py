"""One wrapper line, and the text it writes -> what it is to the program: a kernel, an allocation, a view, arithmetic.

Takes: Inductor's wrapper lines in order, the text of each. Gives: calls of a `ProgramWriter`.
Must not change: the text, but for one thing: the raw stream is asked for inside each launch.
Errors: `Unsupported` for a line of a kind that cannot be rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from opara_backend import upstream
from opara_backend.kernel_graph import Buffer
from opara_backend.lowering import lines as line_kinds
from opara_backend.lowering import statements
from opara_backend.lowering.convolutions import with_out
from opara_backend.lowering.describe import buffer_of, dtype_name, flops_of, module_of, source_of
from opara_backend.lowering.inplace import inplace_pairs
from opara_backend.lowering.kernels import cpp_call, extern_call, triton_call
from opara_backend.lowering.lines import is_a
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.subgraphs import is_call, is_kernel, subgraph_call


class Unsupported(Exception):
    """A wrapper line that cannot be rewritten; the message is the fallback's detail."""


class Sorter:
    """Hands lines to `writer`, one by one. origin_of: the scheduler's node a line was written for, or None."""

    def __init__(self, writer: ProgramWriter, origin_of: Callable[[Any], Any]) -> None:
        self.writer, self.origin_of = writer, origin_of
        self._subgraph_text: list[str] = []

    def sort(self, line: Any, written: list[str], indent: int, whole: str | None) -> None:
        """Hand one line to the writer method that fits it."""
        if is_a(line, line_kinds.UNSUPPORTED) or getattr(line, "comm_buffer", False):
            raise Unsupported(f"{type(line).__name__}: the program chooses streams, pools or peers itself")
        if is_a(line, line_kinds.BOOKKEEPING):
            return
        text = [t for t in written if not t.lstrip().startswith(("#", "del "))]
        if not text and not indent:
            return
        node = getattr(self.origin_of(line), "node", None)
        if isinstance(line, str) and is_kernel(node):
            self._sort_subgraph(node, text)
            return
        statement = statements.parse("\n".join(text))
        if is_a(line, line_kinds.CHECKS) or (text and text[0].startswith("assert_size_stride(")):
            self.writer.check(statement, text)
            return
        by_itself = is_a(line, line_kinds.HOST) or (statement.kind == "host" and not is_a(line, line_kinds.CALLS))
        if by_itself and not indent and not self.writer.touches_data(statement):
            self.writer.plain(text)  # a check on sizes: they are the same for every run of one shape
        elif self.writer.depends_on_host(statement) or indent or by_itself:
            self.writer.host(statement, text, indent)
        elif is_a(line, ("AllocateLine",)):
            self.writer.allocation(buffer_of(line.node, planned=True), text)
        elif is_a(line, line_kinds.VIEWS) or statement.kind == "view":
            self._sort_view(statement, text, whole)
        elif is_a(line, line_kinds.CALLS) or statement.kind == "call":
            self._sort_call(line, statement, text)
        else:
            self.writer.plain(text)

    def _sort_subgraph(self, node: Any, text: list[str]) -> None:
        """A list of arguments, then the call of a function of the module: together one kernel."""
        self._subgraph_text += text
        statement = statements.parse("\n".join(self._subgraph_text))
        if not is_call(node, statement):
            return
        name, device = node.get_name(), str(node.get_device())
        text, self._subgraph_text = self._subgraph_text, []
        self.writer.launch(
            subgraph_call(node, statement),
            text,
            (name,),
            device=device,
            dtype=dtype_name(node),
            source=source_of(node),
            module=module_of(node),
            results=[_result(name, device)],
        )

    def _sort_view(self, statement: statements.Statement, text: list[str], whole: str | None) -> None:
        for name in statement.stores:
            if whole is not None:
                self.writer.part(name, whole, statement, text)
            else:
                self.writer.view(name, statement, text)

    def _sort_call(self, line: Any, statement: statements.Statement, text: list[str]) -> None:
        origin = self.origin_of(line)
        stores: tuple[str, ...] = ()
        node = getattr(line, "node", None) or getattr(origin, "node", None)
        if is_a(line, ("KernelCallLine",)):
            call = triton_call(line, _mutated(origin)) if line.triton else cpp_call(line)
            if line.triton:
                text = _fresh_stream(text)
            elif line.device.type != "cpu":
                raise Unsupported(f"kernel {line.kernel_name} is neither Triton nor C++ for the CPU")
            device = str(line.device)
        elif (filled := with_out(node, "\n".join(text))) is not None:
            allocation = upstream.V.graph.wrapper_code.make_buffer_allocation(node)
            self.writer.allocation(buffer_of(node, planned=True), [allocation])
            call, text, device = extern_call(node, statements.parse(filled)), [filled], self.writer.device
        else:
            touched = [n for n in (*statement.loads, *statement.stores) if self.writer.knows(n)]
            if not touched and node is None:
                self.writer.plain(text)
                return
            call = extern_call(node, statement)
            own = getattr(node, "get_device", lambda: None)()
            device = str(own) if own is not None else self.writer.device
            stores = statement.stores
        self.writer.launch(
            call,
            text,
            stores,
            device=device,
            dtype=dtype_name(node),
            flops=flops_of(origin, generated=call.kind in ("triton", "cpp")),
            source=source_of(origin),
            module=module_of(origin),
            results=[_result(name, device) for name in stores],
            inplace=inplace_pairs(origin) if call.kind in ("triton", "cpp") else (),
        )


_STREAM_NAME = re.compile(r"\b(?:raw_)?stream(\d+)\b")  # up to 2.11, and from 2.13 on


def _fresh_stream(text: list[str]) -> list[str]:
    """`text` with the raw stream asked for inside the launch: it differs between kernels of one program."""
    kept = [t for t in text if " = get_raw_stream(" not in t]
    fresh = [re.sub(rf"stream={_STREAM_NAME.pattern}", r"stream=get_raw_stream(\1)", t) for t in kept]
    # The line that gave it a name is gone.
    if named := next((found for t in fresh if (found := re.search(r"\bstream=(?!get_raw_stream\()\w+", t))), None):
        raise Unsupported(f"a launch on a stream called {named[0]!r}")
    return fresh


def _mutated(origin: Any) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for output in origin.get_outputs() if origin is not None and hasattr(origin, "get_outputs") else ():
        names.update(dict.fromkeys(output.get_mutations()))
    return tuple(names)


def _result(name: str, device: str) -> Buffer:
    made = upstream.V.graph.try_get_buffer(name)
    return buffer_of(made, planned=False) if made is not None else Buffer(name, "intermediate", None, "", device)
