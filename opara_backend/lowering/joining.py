"""Small kernels that wait for the same others become one launch (Inductor's combo kernels).

Takes: Inductor's scheduler, its kernels fused. Gives: groups of kernels to be joined. Must not change: anything.

A small kernel's work takes less than its launch, and a recommender looks up a row in each of its tables, one launch
each. Inductor joins whatever is equally deep in the graph, large kernels too, which made convolutional networks two to
five times slower (docs/results.md). Here only elementwise kernels of few
elements are joined, and only those that wait for the same kernels: then none starts later than it would have, and who
waits for one of them waits for others that are over at the same time.

Triton compiles a joined kernel, a chain of branches, in a time that grows faster than their number. What is made of
parameters alone, as are the shifts of folded batch norms, one for each convolution, is therefore joined by a few: each
part runs beside whatever comes before the layer that reads it. What the model's input decides is on its path, where
each launch counts, and stays one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import sympy

from opara_backend import upstream

DEVICES = ("cuda",)
FEW = 16_384
"""Elements up to which a kernel counts as small: 64 KiB at 4 bytes each. Chosen, not tuned; a million is far too many:
with all weights joined that batch norms scale NASNet takes half as long again."""
MOST = 20
"""Kernels made of parameters alone that are joined, at most. ResNet-50 has 51: as one Triton 3.7 compiles them for an
H200 in 4.4 s of a core, in parts of 26 in 2.1 s, of 17 in 1.5 s, of 13 in 1.3 s. Each part is a launch."""


@contextlib.contextmanager
def joined(
    asked: Callable[[], bool], noted: Callable[[], object], parameters: Callable[[], Collection[str]]
) -> Iterator[None]:
    """Let Inductor join `groups` while the block runs, wherever `asked()`; `noted` is called if there are any.

    parameters: tells the names of those of the graph that is lowered.
    """

    def found(scheduler: Any) -> list[list[Any]]:
        those = groups(scheduler, parameters())
        if those:
            noted()
        return those

    with upstream.inductor_config.patch(settings()), upstream.joining_kernels_by(found, asked):
        yield


def settings() -> dict[str, Any]:
    """What Inductor's configuration must say to join groups of ours, as they are, by what this torch knows."""
    wanted: dict[str, Any] = {
        "combo_kernels": True,
        "benchmark_combo_kernel": False,
        "combo_kernels_autotune": 0,
        "combo_kernel_peak_memory_increase_gb": None,
        "combo_kernel_peak_memory_pct_threshold": None,
        "combo_kernel_max_distance": -1,
    }
    known = upstream.inductor_option_names()
    return {name: value for name, value in wanted.items() if name in known}


def groups(scheduler: Any, parameters: Collection[str] = ()) -> list[list[Any]]:
    """The scheduler's nodes to be joined, two or more together, in the order that it has them."""
    found: dict[tuple[Any, frozenset[str]], list[Any]] = {}
    for node in scheduler.nodes:
        if _small(node):
            found.setdefault((node.get_device(), _waits(scheduler, node)), []).append(node)
    parts = (part for nodes in found.values() for part in _parts(nodes, parameters))
    return [nodes for nodes in parts if len(nodes) > 1]


def _parts(nodes: list[Any], parameters: Collection[str]) -> list[list[Any]]:
    """`nodes`; if many are made of `parameters` alone, those in parts of about one size, and the others as one."""
    known = frozenset(parameters)
    still: list[Any] = []
    others: list[Any] = []
    for node in nodes:
        (still if _names(node) - node.get_buffer_names() <= known else others).append(node)
    if len(still) <= MOST:
        return [nodes]
    count = -(-len(still) // MOST)
    ends = [len(still) * part // count for part in range(count + 1)]
    return [others, *(still[start:end] for start, end in itertools.pairwise(ends))]


def _names(node: Any) -> set[str]:
    """The buffers and inputs that `node` reads."""
    return {dependency.name for dependency in node.read_writes.reads}


def _small(node: Any) -> bool:
    # Of these, Inductor itself leaves out what it cannot join.
    if not isinstance(node, upstream.SchedulerNode | upstream.FusedSchedulerNode) or node.is_reduction():
        return False
    device, elements = node.get_device(), [part.node.get_numel() for part in node.get_nodes()]
    # A symbol's value may be any: what is not a number is not joined.
    return device.type in DEVICES and all(isinstance(n, int | sympy.Integer) and n <= FEW for n in elements)


def _waits(scheduler: Any, node: Any) -> frozenset[str]:
    """The kernels that `node` waits for, by the names of what they were fused from."""
    names: set[str] = set()
    for dependency in node.unmet_dependencies:
        buffer = scheduler.name_to_buf.get(dependency.name)
        writer = buffer.defining_op.get_name() if buffer is not None and buffer.defining_op else dependency.name
        fused = scheduler.name_to_fused_node.get(writer)
        names.add(fused.get_name() if fused is not None else writer)
    return frozenset(names)
