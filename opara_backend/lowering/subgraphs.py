"""Functions of the generated module that are called like an operator: matrix products split along k, for instance.

Takes: the IR node behind a line. Gives: whether it is such a call, and what it does as one kernel. Its own kernels run
one after another on the stream it is called on, in memory it allocates itself.
Must not change: the lines. What is decided on the host inside a subgraph (`torch.cond`) is left to the host.
"""

from __future__ import annotations

from typing import Any

from opara_backend.lowering.kernels import Call, draws_random_numbers
from opara_backend.lowering.lines import is_a
from opara_backend.lowering.statements import Statement

_DECIDED_ON_HOST = ("Conditional", "WhileLoop", "DynamicScalar", "InvokeSubgraph", "EffectfulKernel")


def is_kernel(node: Any) -> bool:
    """True if `node` is a subgraph that runs on the device from its first kernel to its last."""
    if not is_a(node, ("SubgraphBuffer",)):
        return False
    operations = getattr(node.subgraph, "operations", None)
    return operations is not None and not any(is_a(operation, _DECIDED_ON_HOST) for operation in operations)


def subgraph_call(node: Any, statement: Statement) -> Call:
    """The call of a subgraph, whose arguments `statement` lists and whose result it binds to the name of `node`."""
    operators = [o for o in node.subgraph.operations if is_a(o, ("ExternKernel",))]
    random = any(draws_random_numbers(operator) for operator in operators)
    return Call("extern", node.subgraph.name, statement.loads, (node.get_name(),), random=random)
