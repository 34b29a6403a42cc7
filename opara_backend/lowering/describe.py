"""What Inductor knows about buffers and kernels, put into our words: sizes, layouts, operations, source lines.

Takes: Inductor's IR nodes, while the graph that owns them is being lowered (`upstream.V.graph`).
Gives: `Buffer`s, numbers and short texts. Must not change: anything. Whatever cannot be told is left out, never
guessed: a size is None, flops are None, a source is empty.
"""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import flop_counter

from opara_backend import upstream
from opara_backend.kernel_graph import Buffer
from opara_backend.lowering import depthwise, gemv

log = logging.getLogger(__name__)

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
# What Dynamo calls the module that was compiled, or whose method was, perhaps within a partial.
_ROOT = re.compile(r"^[LG]\[[^\]]*\](\.func)?(\.__self__)?")
_EXPLAIN = str(pathlib.Path(__file__).parent.parent / "report" / "explain.py")
_FRAME = re.compile(r'File "(?P<file>.+?)", line (?P<line>\d+), in (?P<name>.+)')


def buffer_of(node: Any, *, planned: bool) -> Buffer:
    """The Buffer for an IR buffer (or a workspace), with its size in bytes where the layout tells."""
    device = getattr(node, "get_device", lambda: None)()
    try:
        dtype, size = node.get_dtype(), tuple(node.get_size())
        numel = upstream.V.graph.get_allocation_storage_size(node)
    except (NotImplementedError, AttributeError, AssertionError):
        # Several outputs, or none: the sizes belong to the parts.
        return Buffer(node.get_name(), "intermediate", None, "", str(device or "cpu"), planned)
    return Buffer(
        node.get_name(), "intermediate", _bytes(numel, dtype), _layout(dtype, size), str(device or "cpu"), planned
    )


def input_buffers(graph: Any) -> tuple[Buffer, ...]:
    """One Buffer per tensor input of the graph being lowered, in order."""
    found = []
    for name in graph.graph_input_names:
        value = graph.graph_inputs[name]
        if not hasattr(value, "get_size"):
            continue
        dtype, size = value.get_dtype(), tuple(value.get_size())
        extent = 1 + sum((s - 1) * t for s, t in zip(size, value.get_stride(), strict=True))
        numel = 0 if any(s == 0 for s in size) else extent
        found.append(Buffer(name, "input", _bytes(numel, dtype), _layout(dtype, size), str(value.get_device())))
    return tuple(found)


def dtype_name(node: Any) -> str:
    """Element type of what a node computes, `float32` where it has several or none."""
    try:
        return str(node.get_dtype()).removeprefix("torch.")
    except (NotImplementedError, AttributeError, AssertionError):
        return "float32"


def source_of(origin: Any) -> str:
    """`file:line in function` of the user's code behind a scheduler node; empty if nothing was recorded."""
    for fx_node in _fx_nodes(origin):
        # Not the line in which `explain` calls the model, the only one where that is a module of torch's own.
        frames = [f for f in _FRAME.findall(fx_node.meta.get("stack_trace") or "") if f[0] != _EXPLAIN]
        if frames:
            file, line, name = frames[-1]
            return f"{file}:{line} in {name}"
    return ""


def module_of(origin: Any) -> str:
    """Path of the user's module behind a scheduler node, as in `named_modules()`; empty if nothing was recorded.

    A kernel fused from several modules is named by what they have in common, or by the first two of them.
    """
    paths: dict[tuple[str, ...], None] = {}
    # An operator's origins name its operands' too; its own node is told apart, a fused kernel's last one only.
    own = getattr(getattr(origin, "node", None), "origin_node", None) if not hasattr(origin, "group") else None
    for fx_node in [own] if own is not None else _in_order(_fx_nodes(origin)):
        stack = list((fx_node.meta.get("nn_module_stack") or {}).values())
        if stack:
            path = _ROOT.sub("", str(stack[-1][0])).lstrip(".")
            paths[tuple(path.split("."))] = None
    if not paths:
        return ""
    first, last = min(paths), max(paths)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = first[:shared]
    if len(common) >= max(map(len, paths)) - 1:
        return ".".join(common)
    # Within others lies what says more: of `block` and `block.conv` the latter.
    inner = [p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)]
    return " + ".join(".".join(p) for p in inner[:2]) + (" + ..." if len(inner) > 2 else "")


def _in_order(nodes: Iterable[torch.fx.Node]) -> list[torch.fx.Node]:
    """`nodes` in program order, where this torch compares nodes by it; else as they come."""
    try:
        return sorted(nodes)
    except TypeError:
        return list(nodes)


def flops_of(origin: Any, *, generated: bool) -> int | None:
    """Floating-point operations behind a scheduler node, by PyTorch's own formulas (torch.utils.flop_counter).

    Operators without a formula count as one operation per element they produce, and so does everything in a
    `generated` kernel that is no template: there a convolution among the origins only means that its operands are
    laid out anew. Products of vectors and depthwise convolutions are such kernels, and no templates. None where shapes
    are unknown. Symbolic sizes count with their hints.
    """
    formulas = not generated or bool(getattr(origin, "is_template", lambda: False)())
    total = 0
    nodes = list(_fx_nodes(origin))
    for fx_node in nodes:
        packet = getattr(fx_node.target, "overloadpacket", None)
        of_vector = gemv.operator.names(fx_node.target)
        written = depthwise.operator.names(fx_node.target) and _makes(origin, fx_node)
        try:
            value = _concrete(fx_node.meta.get("val"))
            if (formulas or of_vector or written) and packet in flop_counter.flop_registry:
                args, kwargs = torch.fx.node.map_arg((fx_node.args, fx_node.kwargs), lambda n: n.meta["val"])
                args, kwargs = upstream.tree_map(_concrete, (args, kwargs))
                total += int(flop_counter.flop_registry[packet](*args, **kwargs, out_val=value))
            elif isinstance(value, torch.Size):
                total += value.numel()
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            log.debug("no flops for %s: %s", fx_node, error)
            return None
    return total if nodes else None


def _concrete(value: Any) -> Any:
    """A tensor's shape, or a size, as plain numbers: symbolic ones by their hints.

    Arithmetic on the symbols themselves would add guards, and the graph would be recompiled for every size.
    """
    if isinstance(value, torch.Tensor):
        return torch.Size(_concrete(s) for s in value.shape)
    if isinstance(value, torch.SymInt):
        if value.node.hint is None:
            raise ValueError(f"{value} has no hint")
        return int(value.node.hint)
    return value


def _parts(origin: Any) -> list[Any]:
    """The buffers' nodes that a scheduler node was fused from."""
    parts = origin.get_nodes() if hasattr(origin, "get_nodes") else [origin]
    return [getattr(part, "node", part) for part in parts]


def _makes(origin: Any, fx_node: torch.fx.Node) -> bool:
    """True if the result of `fx_node` is computed there, not only something laid out for it."""
    return any(getattr(node, "origin_node", None) is fx_node for node in _parts(origin))


def _fx_nodes(origin: Any) -> Iterable[torch.fx.Node]:
    seen: dict[torch.fx.Node, None] = {}
    for node in _parts(origin):
        # Origins are an ordered set of FX nodes; those of one kernel, not of the views it reads through.
        for fx_node in getattr(node, "origins", ()) or ():
            if fx_node.op == "call_function":
                seen[fx_node] = None
    return seen


def nbytes_of(constant: torch.Tensor) -> int:
    """Bytes of a constant's memory; of one in a library's own layout (frozen weights on a CPU), of its elements."""
    if constant.is_mkldnn:
        return constant.numel() * constant.element_size()
    return constant.untyped_storage().nbytes()


def _bytes(numel: Any, dtype: torch.dtype) -> int | str:
    total = numel * dtype.itemsize
    return int(total) if not getattr(total, "free_symbols", None) else str(total)


def _layout(dtype: torch.dtype, size: tuple[Any, ...]) -> str:
    name = str(dtype).removeprefix("torch.")
    head = name.rstrip("0123456789")
    return f"{_SHORT.get(head, head)}{name[len(head) :]}[{', '.join(map(str, size))}]"
