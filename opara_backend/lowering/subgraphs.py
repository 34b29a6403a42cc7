"""Functions of the generated module that are called like an operator, as one kernel each.

Inductor makes them of matrix products split along k, and of regions under `torch.compiler.nested_compile_region`. Their
own kernels run one after another on the stream they are called on, in memory they allocate themselves.
Takes: the IR node behind a line. Gives: whether it is such a call, and what it does. Must not change: the lines.
What is decided on the host inside a subgraph (`torch.cond`), or computed on another device, is left to the host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opara_backend.lowering.kernels import Call, draws_random_numbers, extern_call
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
    return replace(call, callee=_graph(node).name, reads=reads, writes=writes, random=_draws_random_numbers(node))


def _draws_random_numbers(node: Any) -> bool:
    operations = _graph(node).operations
    return any(
        _draws_random_numbers(operation) if is_a(operation, _CALLS) else draws_random_numbers(operation)
        for operation in operations
        if is_a(operation, ("ExternKernel",))
    )


def _graph(node: Any) -> Any:
    """The lowered graph behind the call."""
    return node.subgraph.graph if is_a(node, ("InvokeSubgraph",)) else node.subgraph
