"""Inductor's Python wrapper, rewritten as a program of separate kernels (route S: source text).

Takes: the wrapper lines Inductor built for one inference graph, after its own passes over them.
Gives: a Python module whose `call` is a fresh `Runtime` over `program(...)` and its KernelGraph. The module is plain
source, so Inductor's FX-graph cache and AOTAutograd's cache store it and load it as they do their own.
Must not change: the kernels, their order in the text, or any call's text. Where a line is of a kind that cannot be
rewritten, the whole wrapper is left to stock Inductor and the module says why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from opara_backend import options, upstream
from opara_backend.kernel_graph import Buffer
from opara_backend.lowering import joining, statements
from opara_backend.lowering import lines as line_kinds
from opara_backend.lowering.describe import input_buffers, nbytes_of
from opara_backend.lowering.lines import is_a
from opara_backend.lowering.program import ProgramWriter
from opara_backend.lowering.sorting import Sorter, Unsupported
from opara_backend.lowering.under_way import (
    LoweringRequest,
    begun,
    current,
    finds_something,
    note_rewrite,
    parameters,
    static_inputs,
    under_way,
)

log = logging.getLogger(__name__)

# What Inductor must not do for us, because we do it later and with knowledge of the schedule (memory), or because
# it would split or guard the text we rewrite. `inplace_buffers` and `allow_buffer_reuse` tie kernels together.
PATCHES: dict[str, Any] = {
    "inplace_buffers": False,
    "allow_buffer_reuse": False,
    "memory_planning": False,
    "graph_partition": False,
    "alignment_asserts": False,
    "triton.autotune_at_compile_time": False,
}


@contextlib.contextmanager
def lowering(request: LoweringRequest, devices: tuple[str, ...]) -> Iterator[None]:
    """Let Inductor graphs compiled inside the block, by this thread, come out as programs."""
    noted = functools.partial(note_rewrite, "join_small")
    with (
        begun(request),
        upstream.inductor_config.patch(PATCHES),
        upstream.wrapper_codegen_for(devices, OparaWrapperCodegen),
        upstream.waiting_whatever_ran_before(),
        joining.joined(under_way, noted, parameters) if request.join_small else contextlib.nullcontext(),
    ):
        yield


class OparaWrapperCodegen(upstream.PythonWrapperCodegen):
    """Writes `program(args, alloc, task, release)` in place of `call(args)`."""

    def __init__(self) -> None:
        self._origins: dict[int, tuple[Any, Any]] = {}
        self._graph_json: str | None = None
        self._numbers: tuple[str, ...] = ()
        self._unsupported = ""
        super().__init__()

    @staticmethod
    def create(
        is_subgraph: bool,
        subgraph_name: str | None,
        parent_wrapper: Any,
        partition_signatures: Any = None,
    ) -> Any:
        """Ours for the main graph of a thread that asked for it; stock Inductor's for everything else.

        A graph that has a name is part of another one, compiled alone to be timed while that one is lowered.
        """
        if is_subgraph or not under_way() or upstream.V.graph.name is not None:
            return upstream.PythonWrapperCodegen.create(
                is_subgraph, subgraph_name, parent_wrapper, partition_signatures
            )
        return OparaWrapperCodegen()

    # --- names and text around the body --------------------------------------------------------------------------

    def set_launcher_fn_name(self) -> None:
        self.launcher_fn_name = "program"

    def write_launcher_fn_call_get_indent(self) -> int:
        self.prefix.splice("\ndef program(args, alloc, task, release):\n")
        return 1

    def get_wrapper_call_indent(self) -> int:
        return 1

    def register_alignment_check_inputs(self) -> None:
        """Leave misaligned inputs to Inductor's check around the call; inside, it would be a hidden copy."""

    def codegen_input_size_asserts(self) -> None:
        """None: Dynamo's guards have looked at them, and where a user leaves those out, `arguments.Layouts` does."""

    def add_benchmark_harness(self, output: Any) -> None:
        """None: the harness calls a plain function `call`, which this module has not."""

    def make_allocation(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        shape: Sequence[Any],
        stride: Sequence[Any],
        allocation_shape: Sequence[Any] | None = None,
        is_pinned: bool = False,
    ) -> str:
        if self._unsupported:
            return super().make_allocation(name, device, dtype, shape, stride, allocation_shape, is_pinned)
        if is_pinned:
            raise Unsupported(f"buffer {name} is pinned host memory")
        sizes = self.codegen_python_shape_tuple(shape)
        strides = self.codegen_python_shape_tuple(stride)
        allocated = sizes if allocation_shape is None else self.codegen_python_shape_tuple(allocation_shape)
        text = f"alloc({name!r}, {allocated}, {strides}, {dtype}, {str(device)!r})"
        if allocated != sizes:  # not as_strided, which looks at memory that is there only when the buffer is alive
            text = f"reinterpret_tensor({text}, {sizes}, {strides}, 0)"
        return f"{name} = {text}"

    # --- remembering who wrote a line ----------------------------------------------------------------------------

    def writeline(self, line: Any) -> None:
        scheduler = getattr(upstream.V.graph, "scheduler", None)
        # The line is kept alive beside its id, or another object could come to live at the same address.
        self._origins[id(line)] = (line, getattr(scheduler, "current_node", None))
        super().writeline(line)

    def _origin(self, line: Any) -> Any:
        kept, node = self._origins.get(id(line), (None, None))
        return node if kept is line else None

    # --- the rewriting -------------------------------------------------------------------------------------------

    def run_wrapper_ir_passes(self, is_inference: bool) -> None:
        super().run_wrapper_ir_passes(is_inference)
        self.lines: list[Any] = [_Rewritten(self, list(self.lines))]

    def rewrite(self, lines: Sequence[Any], code: Any) -> None:
        """Sort `lines` into the writer and put its body into `code`."""
        graph = upstream.V.graph
        writer = ProgramWriter(
            device=_device_of_graph(graph),
            inputs=input_buffers(graph),
            constants=tuple(
                Buffer(name, "constant", nbytes_of(value), "", str(value.device))
                for name, value in graph.constants.items()
                if isinstance(value, torch.Tensor)
            ),
            symbols=_symbols(graph),
        )
        whole_of = {id(line): line.node.get_name() for line in lines if is_a(line, ("ReinterpretLine",))}
        sorter = Sorter(writer, self._origin)
        for line in lines:
            written, indent = self._text_of(line)
            sorter.sort(line, written, indent, whole_of.get(id(line)))
        graph = writer.graph([statements.parse(ref) for ref in self.get_output_refs()])
        graph.verify()
        body, graph_json = writer.body(), graph.to_json()
        for emitted in body:
            code.writeline(emitted)
        self._graph_json, self._numbers = graph_json, writer.numbers()

    def _text_of(self, line: Any) -> tuple[list[str], int]:
        """What `line` writes, dedented, and by how much it changes the indentation of what follows."""
        buffer = upstream.IndentedBuffer()

        def sink(item: Any) -> None:
            if isinstance(item, upstream.WrapperLine):
                item.codegen(buffer)
            else:
                buffer.writeline(item)

        # An instance attribute shadows the method, as Inductor's own `set_writeline` does; that one's signature
        # differs between versions.
        redirected = self.writeline  # Inductor has redirected it already, and must find its own again
        self.writeline = sink  # type: ignore[assignment, method-assign]
        try:
            if isinstance(line, upstream.WrapperLine):
                line.codegen(buffer)
            elif isinstance(line, str | upstream.DeferredLineBase):
                buffer.writeline(line)
            elif not is_a(line, line_kinds.BOOKKEEPING):
                raise Unsupported(f"wrapper line of type {type(line).__name__}")
        finally:
            self.writeline = redirected  # type: ignore[method-assign]
        return [t for t in buffer.getvalue().splitlines() if t.strip()], buffer._indent

    def leave_to_inductor(self, lines: Sequence[Any], code: Any, why: str) -> None:
        """Write `lines` as stock Inductor does."""
        self._unsupported = why
        for line in lines:
            if isinstance(line, upstream.WrapperLine):
                line.codegen(code)
            else:
                code.writeline(line)

    def generate_return(self, output_refs: list[str]) -> None:
        if not self._unsupported:
            self.wrapper_call.writeline("yield")
        super().generate_return(output_refs)

    def generate_after_suffix(self, result: Any) -> None:
        if self._graph_json is None:
            arguments = f"program, graph_json=None, unsupported={self._unsupported!r}"
        else:
            names = tuple(self.get_graph_input_names())
            numbers = tuple(names.index(name) for name in self._numbers)
            arguments = (
                f"program, graph_json={self._graph_json!r}, inputs={names!r}, static_inputs={static_inputs()!r}, "
                f"dynamic_inputs={_dynamic_inputs(upstream.V.graph)!r}, number_inputs={numbers!r}, "
                f"labels={options.current().labels!r}, {_rewrites()}"
            )
        result.splice(_FOOTER.format(arguments=arguments))


_FOOTER = """
from opara_backend.execution.libraries import convolution_out
from opara_backend.execution.program import Program
opara_program = Program({arguments})


def __getattr__(name):
    # Each compiled model asks for `call` once and owns what it gets; the module keeps none of it alive.
    if name == "call":
        return opara_program.bind()
    raise AttributeError(name)
"""


class _Rewritten(upstream.WrapperLine):
    """All wrapper lines of a graph, as one that writes the program."""

    def __init__(self, wrapper: OparaWrapperCodegen, lines: list[Any]) -> None:
        self.wrapper, self.lines = wrapper, lines

    def codegen(self, code: Any) -> None:
        # Stock text instead of an error of ours: the module's `call` reports it as a fallback when it is loaded.
        start = time.perf_counter()
        try:
            self.wrapper.rewrite(self.lines, code)
        except Unsupported as why:
            self.wrapper.leave_to_inductor(self.lines, code, str(why))
        except Exception as error:
            log.exception("lowering failed; please report this")
            self.wrapper.leave_to_inductor(self.lines, code, f"internal error: {type(error).__name__}: {error}")
        finally:
            options.current().lowering_seconds += time.perf_counter() - start


def _rewrites() -> str:
    """Arguments of `Program` that say which rewrites there were and could have been."""
    here = current()
    unjoined = not (here.request.join_small or upstream.inductor_config.combo_kernels)
    look = functools.partial(joining.groups, upstream.V.graph.scheduler)
    if here.request.looking and unjoined and finds_something("join_small", look):
        note_rewrite("join_small", done=False)
    return f"rewrites={tuple(sorted(here.rewrites))!r}, possible={tuple(sorted(here.possible))!r}"


def _device_of_graph(graph: Any) -> str:
    kinds = sorted({str(d) for d in graph.device_types if d not in ("cpu", "meta")})
    indices = sorted(graph.device_idxs)
    if not kinds:
        return "cpu"
    if len(kinds) > 1 or len(indices) != 1:
        raise Unsupported(f"one graph on several devices: {', '.join(kinds)} with indices {indices}")
    return f"{kinds[0]}:{indices[0]}"


def _symbols(graph: Any) -> tuple[str, ...]:
    return tuple(str(v) for v in graph.graph_inputs.values() if getattr(v, "is_Symbol", False))


def _dynamic_inputs(graph: Any) -> tuple[int, ...]:
    """Positions of tensor inputs whose sizes or strides are symbolic."""
    found = []
    for position, name in enumerate(graph.graph_input_names):
        value = graph.graph_inputs[name]
        if hasattr(value, "get_stride") and any(
            getattr(e, "free_symbols", None) for e in (*value.get_size(), *value.get_stride())
        ):
            found.append(position)
    return tuple(found)
