"""One lowered call -> a `Call`: what it launches, which Python names it reads, writes and binds.

Takes: a wrapper line of Inductor (its class tells what it is), the text it wrote, and the IR node behind it.
Gives: names only; which storage a name lives in is decided by `program`.
Must not change: the lines. Inductor's objects are duck-typed here; what must be imported comes from `upstream`.

Sources of truth, per kind: Triton kernels by the names in their signature (`in_ptr*` read, `out_ptr*` written,
`in_out_ptr*` both) plus Inductor's list of mutated arguments; C++ kernels by argument type (`const` is a read);
extern calls by the operator's schema, `out=`, and the IR node's mutations. What none of these decides counts as
read *and* written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from opara_backend import upstream
from opara_backend.kernel_graph import KernelKind
from opara_backend.lowering.statements import Statement

# Every rank must make them in one order, or what one sums is another's other tensor.
COLLECTIVES = ("torch.ops._c10d_functional", "torch.ops.c10d", "torch.ops.symm_mem.")
# Namespaces of torch's own operators and of ours: what these share is a tensor, a generator, or a registered effect.
# Others may share a workspace, a counter, a print-out.
_KNOWN = re.compile(
    r"torch\.ops\.(aten|prims?|rngprims|inductor|inductor_prims|mkl|mkldnn|mkldnn_prepacked|onednn|quantized|_quantized"
    r"|quantized_decomposed|sparse|streams|profiler|higher_order|torchvision|opara_backend)\."
)


@dataclass(frozen=True)
class Call:
    """A launch, in terms of Python names of the wrapper.

    random: it advances the generator of its device. effect: it does something on the host that must keep its order.
    custom: nobody here knows what it shares with others of its kind beside the tensors it is given; it may draw random
    numbers without saying so.
    """

    kind: KernelKind
    callee: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    random: bool = False
    effect: bool = False
    custom: bool = False


def triton_call(line: Any, mutated: Iterable[str]) -> Call:
    """A Triton kernel's launch. `mutated`: buffers its IR node says it changes in place."""
    meta = line.triton_meta or {}
    pointers = [(key, kind) for key, kind in meta.get("signature", {}).items() if kind != "constexpr"]
    changed = set((line.inductor_meta or {}).get("mutated_arg_names", ()))
    changed_buffers = set(mutated)
    reads: dict[str, None] = {}
    writes: dict[str, None] = {}
    arguments = [_argument_text(a) for a in line.call_args]
    for position, text in enumerate(arguments):
        names = names_in(text)
        key, kind = pointers[position] if position < len(pointers) else ("", "*")
        is_output = key.startswith("out_ptr")
        is_input = key.startswith(("in_ptr", "arg_", "seed")) or not str(kind).startswith("*")
        touched = key in changed or not (is_output or is_input) or bool(changed_buffers.intersection(names))
        for name in names:
            if touched or not is_output:
                reads[name] = None
            if touched or is_output:
                writes[name] = None
    return Call("triton", line.kernel_name, tuple(reads), tuple(writes))


def cpp_call(line: Any) -> Call:
    """A C++ kernel's launch: a `const` pointer is read, any other pointer may be read and is written."""
    reads: dict[str, None] = {}
    writes: dict[str, None] = {}
    types = list(line.arg_types or ())
    for position, argument in enumerate(line.call_args):
        kind = str(types[position]) if position < len(types) else "*"
        for name in names_in(_argument_text(argument)):
            reads[name] = None
            if "*" in kind and "const" not in kind:
                writes[name] = None
    return Call("cpp", line.kernel_name, tuple(reads), tuple(writes))


def extern_call(node: Any, statement: Statement) -> Call:
    """A call of an operator. `node`: the IR node behind it, or None where Inductor wrote plain text."""
    custom = is_custom(statement.callee)
    if node is None or not hasattr(node, "get_outputs"):
        touched = statement.loads + statement.stores
        return Call("extern", statement.callee, statement.loads, touched, random=True, custom=custom)
    outputs = list(node.get_outputs())
    mutated = dict.fromkeys(
        name for part in (node, *outputs) if hasattr(part, "get_mutation_names") for name in part.get_mutation_names()
    )
    aliases = dict.fromkeys(
        name
        for part in (node, *outputs)
        if hasattr(part, "get_inputs_that_alias_output")
        for name in part.get_inputs_that_alias_output()
    )
    own = {node.get_name(), *(o.get_name() for o in outputs)}
    reads = tuple(n for n in statement.loads if n not in own)
    writes = dict.fromkeys([*(n for n in statement.loads if n in own), *statement.stores, *mutated])
    if not statement.stores and not writes:
        writes = dict.fromkeys(statement.loads)  # an operator that returns nothing exists for what it changes
    effect = statement.callee.startswith(COLLECTIVES) or upstream.has_ordered_effect(getattr(node, "op_overload", None))
    random = draws_random_numbers(node)
    return Call("extern", statement.callee, reads, tuple(writes), tuple(aliases), random, effect, custom)


def is_custom(callee: str) -> bool:
    """True of an operator that is neither torch's nor ours."""
    return callee.startswith("torch.ops.") and not _KNOWN.match(callee)


def draws_random_numbers(node: Any) -> bool:
    """True if the operator behind `node` advances a random generator, by its tags; unknown operators count as yes."""
    operator = getattr(node, "op_overload", None)
    if operator is None:
        name = getattr(node, "python_kernel_name", None) or ""
        if name.startswith("extern_kernels."):
            return False  # matrix products, convolutions and templates of Inductor's own
        operator = _operator(name)
        if operator is None:
            return True
    overloads = [operator]
    if isinstance(operator, torch._ops.OpOverloadPacket):
        overloads = [getattr(operator, o) for o in operator.overloads()]
    return any(torch.Tag.nondeterministic_seeded in getattr(o, "tags", ()) for o in overloads)


def _operator(name: str) -> Any:
    path = name.removeprefix("torch.ops.").split(".")
    if len(path) < 2:
        return None
    owner: Any = torch.ops
    for part in path:
        owner = getattr(owner, part, None)
    return owner


def names_in(text: str) -> tuple[str, ...]:
    """The Python names mentioned in an expression, in order."""
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return ()
    return tuple(dict.fromkeys(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)))


def _argument_text(argument: Any) -> str:
    return argument if isinstance(argument, str) else str(argument)
