"""Stream allocation by minimum path cover: the policy of Nimble.

Takes: a KernelGraph. Gives: a chain number per kernel. Must not change: the graph. Imports no torch; the matching is
networkx's Hopcroft-Karp.

Source: Kwon et al., *Nimble: Lightweight and Parallel GPU Task Scheduling for Deep Learning*, NeurIPS 2020. The graph's
transitive reduction keeps only edges that no longer path implies; a maximum matching between each kernel and one of
its successors joins kernels into the fewest chains that use reduced edges.
"""

from __future__ import annotations

from opara_backend.kernel_graph import KernelGraph


def nimble(graph: KernelGraph) -> tuple[int, ...]:
    """A chain per kernel, as few chains as reduced edges allow; numbered by their first kernel."""
    import networkx

    reduced = transitive_reduction(graph)
    pairs = networkx.Graph()
    pairs.add_nodes_from(range(len(graph)), bipartite=0)
    # Successors live at ~k: a kernel is both somebody's successor and somebody's predecessor.
    pairs.add_edges_from((kernel, ~after) for kernel, afters in enumerate(reduced) for after in afters)
    matched = networkx.bipartite.hopcroft_karp_matching(pairs, top_nodes=range(len(graph)))
    chain = [-1] * len(graph)
    opened = 0
    for kernel in range(len(graph)):
        before = matched.get(~kernel)
        if before is None:
            chain[kernel] = opened
            opened += 1
        else:
            chain[kernel] = chain[before]
    return tuple(chain)


def transitive_reduction(graph: KernelGraph) -> tuple[tuple[int, ...], ...]:
    """Successors of each kernel without those that another successor reaches too. O(V E / word) with bit sets."""
    reach = [0] * len(graph)
    reduced: list[tuple[int, ...]] = [()] * len(graph)
    for kernel in range(len(graph) - 1, -1, -1):
        covered = 0
        kept = []
        for after in graph.successors(kernel):  # ascending, so whatever reaches `after` has been seen before it
            if not covered >> after & 1:
                kept.append(after)
                covered |= reach[after] | 1 << after
        reduced[kernel] = tuple(kept)
        reach[kernel] = covered
    return tuple(reduced)
