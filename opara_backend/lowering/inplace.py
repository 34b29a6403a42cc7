"""Which outputs of a generated kernel may lie where one of its inputs lies.

Takes: the scheduler node behind a kernel. Gives: pairs of buffer names, read and written.
Must not change: anything. Inductor decides the same while it writes a kernel, and ties the two buffers together for
good; here it is only said what would be right, and the memory planner decides, knowing the schedule.

Right is: the kernel reads the input and writes the output element by element at one and the same index, all reads of
the input in the kernel are at that index, and none comes behind the write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from opara_backend import upstream


def inplace_pairs(origin: Any) -> tuple[tuple[str, str], ...]:
    """(read, written) pairs of buffers for the kernel of `origin`; each buffer is in at most one pair.

    None for several kernels joined in one launch: their blocks run in any order, so one might write what another reads.
    """
    if isinstance(origin, upstream.ForeachKernelSchedulerNode):
        return ()
    nodes = list(origin.get_nodes()) if hasattr(origin, "get_nodes") else []
    found: list[tuple[str, str]] = []
    taken: set[str] = set()
    for position, node in enumerate(nodes):
        for output in node.get_outputs() if isinstance(node, upstream.SchedulerNode) else ():
            for read in _replaceable(nodes, position, output):
                if read not in taken and output.get_name() not in taken:
                    found.append((read, output.get_name()))
                    taken.update(found[-1])
    return tuple(found)


def _replaceable(nodes: Sequence[Any], position: int, output: Any) -> Iterator[str]:
    """Names of the intermediate buffers that `output` of `nodes[position]` may be written over."""
    node, made = nodes[position], output.node
    if made is None or not made.should_allocate() or made.get_inputs_that_alias_output() or made.get_mutation_names():
        return
    if output.get_name() in upstream.V.graph.removed_buffers:
        return
    for read in node.read_writes.reads:
        before = node.scheduler.name_to_buf.get(read.name)
        if before is None or before.node is None or read.name in upstream.V.graph.removed_buffers:
            continue
        accesses = [a for other in nodes for a in other.read_writes.reads_and_writes() if a.name == read.name]
        read_later = any(a.name == read.name for other in nodes[position + 1 :] for a in other.read_writes.reads)
        if (
            isinstance(before.node.get_output_spec(), upstream.FixedLayout)  # not: none, several, or another's
            and node.can_inplace(read)
            and not read_later
            and len(set(accesses)) == 1
            and not before.node.get_inputs_that_alias_output()
            and upstream.can_match_buffer_size(before.node, made)
        ):
            yield read.name
