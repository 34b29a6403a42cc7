"""One line of a wrapper, as text -> what kind of statement it is and which names it loads and stores.

Takes: the lines of Python that one Inductor wrapper line wrote. Gives: a `Statement`.
Must not change: the text. Imports no torch.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

StatementKind = Literal["view", "call", "plain", "host"]

# Calls that only make a new Python object over memory that exists: they launch nothing.
_VIEW_CALLS = ("reinterpret_tensor", "aten.view.dtype", "torch.ops.aten.view.dtype", "alloc_from_pool")
# Methods that bring a value to the host: whatever they look at must have been computed. Of sizes only those that
# depend on data are asked for this way (`u0 = buf1.size(0)` after `nonzero`); all others are symbols.
_HOST_METHODS = ("item", "tolist", "synchronize", "cpu", "numpy", "size", "stride", "storage_offset")


@dataclass(frozen=True)
class Statement:
    """What one line does.

    view: binds a name to memory that exists; call: calls something, perhaps a kernel; plain: arithmetic on sizes;
    host: control flow, or a value read back, so everything before it must have run.
    callee: the dotted name called, empty unless `call`.
    """

    kind: StatementKind
    loads: tuple[str, ...]
    stores: tuple[str, ...]
    callee: str = ""


def parse(text: str) -> Statement:
    """Classify `text`; what does not parse on its own (`if x:`, `else:`) is a host statement."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return Statement("host", _words(text), ())
    loads: dict[str, None] = {}
    stores: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (stores if isinstance(node.ctx, ast.Store) else loads)[node.id] = None
    kind, callee = "plain", ""
    for statement in tree.body:
        found, name = _kind(statement)
        if _RANK[found] > _RANK[kind]:
            kind = found
        callee = name or callee
    return Statement(kind, tuple(loads), tuple(stores), callee)  # type: ignore[arg-type]


_RANK = {"plain": 0, "view": 1, "call": 2, "host": 3}


def _kind(statement: ast.stmt) -> tuple[str, str]:
    if isinstance(statement, ast.Delete | ast.Pass | ast.Import | ast.ImportFrom):
        return "plain", ""
    if isinstance(statement, ast.Expr):
        if isinstance(statement.value, ast.Constant):
            return "plain", ""
        value = statement.value
    elif isinstance(statement, ast.Assign) and all(isinstance(t, ast.Name) for t in statement.targets):
        value = statement.value
    else:
        return "host", ""
    # A CPU scalar unwrapped as an argument of a launch stays a call; the caller sees whose scalar it is.
    launch = isinstance(value, ast.Call) and value.args and _method(value) == "run"
    if not launch and any(isinstance(n, ast.Call) and _method(n) in _HOST_METHODS for n in ast.walk(value)):
        return "host", ""
    if isinstance(value, ast.List | ast.Tuple | ast.BinOp) and isinstance(statement, ast.Assign):
        return ("host", "") if any(isinstance(n, ast.List) for n in ast.walk(value)) else ("plain", "")
    if isinstance(value, ast.Call):
        callee = _dotted(value.func)
        if callee in _VIEW_CALLS or callee.endswith(".as_strided"):
            return "view", ""
        return ("plain", "") if callee in ("max", "min", "math.ceil", "math.floor", "abs") else ("call", callee)
    if isinstance(value, ast.Name | ast.Subscript | ast.Attribute):
        return "view", ""
    return "plain", ""


def _method(call: ast.Call) -> str:
    return _dotted(call.func).rpartition(".")[2]


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "(...)"


def _words(text: str) -> tuple[str, ...]:
    cleaned = "".join(c if c.isalnum() or c == "_" else " " for c in text)
    return tuple(dict.fromkeys(cleaned.split()))
