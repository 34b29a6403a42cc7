"""Reads and writes in program order -> edges.

Takes: kernels in program order, each with the storages it reads and writes (aliases already resolved).
Gives: read-after-write, write-after-read and write-after-write edges, each pair of neighbours once per buffer.
Must not change: anything; imports no torch.

Only conflicts between *neighbours* become edges: last writer -> reader, readers since the last write -> next
writer, last writer -> next writer when nobody read in between. All other conflicting pairs follow by transitivity.
Node order and FX edges cannot be used instead: a kernel may write a buffer allocated long before it (FINDINGS).
"""

from __future__ import annotations

from collections.abc import Sequence

from opara_backend.kernel_graph import Edge, Kernel


def edges(kernels: Sequence[Kernel]) -> tuple[Edge, ...]:
    """Edges among `kernels`, in order of their later kernel. O(total reads and writes + edges)."""
    last_writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    found: list[Edge] = []
    for index, kernel in enumerate(kernels):
        written = set(kernel.writes)
        for name in dict.fromkeys(kernel.reads):
            if name in last_writer:
                found.append(Edge(last_writer[name], index, "RAW", name))
            if name not in written:
                readers.setdefault(name, []).append(index)
        for name in dict.fromkeys(kernel.writes):
            since = readers.pop(name, [])
            found.extend(Edge(reader, index, "WAR", name) for reader in since)
            if name in last_writer and not since and name not in kernel.reads:
                found.append(Edge(last_writer[name], index, "WAW", name))
            last_writer[name] = index
    return tuple(found)
