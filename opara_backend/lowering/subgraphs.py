"""Functions of the generated module that are called like an operator, as one kernel each.

Inductor makes them of matrix products split along k, and of regions under `torch.compiler.nested_compile_region`. Their
own kernels run one after another on the stream they are called on, in memory they allocate themselves.
Takes: the IR node behind a line. Gives: whether it is such a call, and what it does. Must not change: the lines.
What is decided on the host inside a subgraph (`torch.cond`), or computed on another device, is left to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from opara_backend.lowering.kernels import Call, draws_random_numbers, extern_call, is_custom
from opara_backend.lowering.lines import is_a
from opara_backend.lowering.statements import Statement

_CALLS = ("SubgraphBuffer", "InvokeSubgraph")
# What is known to run on its device alone. New versions bring new operations, and some decide on the host: `torch.cond`
# is a Conditional in 2.13, a Switch in 2.15.
_ON_DEVICE = (
    "ComputedBuffer",
    "TemplateBuffer",
    "NopKernel",
    "ExternKernelOut",
    "ExternKernelAlloc",
    "UserDefinedTritonKernel",
    "InplaceBernoulliFallback",
    "InplaceCopyFallback",
    "ScatterFallback",
    "IndexPutFallback",
    "MultiOutput",
)
_NOT_ALONE = ("EffectfulKernel", "DeviceCopy", "_CollectiveKernel")  # derive from those above


def is_kernel(node: Any) -> bool:
    """True if `node` is a subgraph that runs on its device from its first kernel to its last."""
    if not is_a(node, _CALLS):
        return False
    graph, device = _graph(node), str(node.get_device())
    values = [*graph.operations, *(value for value in graph.graph_inputs.values() if hasattr(value, "get_device"))]
    return all(str(value.get_device()) == device for value in values if value.get_device() is not None) and all(
        is_kernel(operation)
        if is_a(operation, _CALLS)
        else is_a(operation, _ON_DEVICE) and not is_a(operation, _NOT_ALONE)
        for operation in graph.operations
    )


def is_call(node: Any, statement: Statement) -> bool:
    """True if `statement`, what has been written for `node` so far, calls the subgraph."""
    return _graph(node).name in statement.loads


def subgraph_call(node: Any, statement: Statement) -> Call:
    """The call of a subgraph, whose arguments `statement` lists and whose result it binds to the name of `node`."""
    call, arguments = extern_call(node, statement), f"{_graph(node).name}_args"
    reads, writes = (tuple(n for n in names if n != arguments) for names in (call.reads, call.writes))
    called = [operation for operation in _operations(node) if is_a(operation, ("ExternKernel",))]
    custom = any(is_custom(getattr(operation, "python_kernel_name", None) or "") for operation in called)
    random = any(map(draws_random_numbers, called))
    return replace(call, callee=_graph(node).name, reads=reads, writes=writes, random=random, custom=custom)


def _operations(node: Any) -> Iterator[Any]:
    """What the subgraph does, and those that it calls."""
    for operation in _graph(node).operations:
        if is_a(operation, _CALLS):
            yield from _operations(operation)
        else:
            yield operation


def _graph(node: Any) -> Any:
    """The lowered graph behind the call."""
    return node.subgraph.graph if is_a(node, ("InvokeSubgraph",)) else node.subgraph
