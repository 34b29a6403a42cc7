"""The same schedule with library kernels on fewer streams: where its happens-before allows, or as few as must be.

Takes: a Schedule and which of its kernels call libraries. Gives: a Schedule of the same launch order on no more
streams, those with library kernels first. Must not change: that what happened before something still does; but for
`on_fewer_streams`, nothing else does. Imports no torch. Deterministic.

Libraries keep memory per stream: a workspace of cuBLAS's (32 MiB on Hopper GPUs), and what cuDNN works in, which the
allocator hands back only to the stream it came from. A captured graph knows no streams, only kernels and the edges
between them. So a chain of products that a policy has spread over four streams may as well be launched on one.

A kernel may join a stream whose last kernel happens before it. Best is one that it waits for anyway: any other makes
one more edge of the graph, if an implied one. So streams are kept for the way with the most library kernels ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.schedule import Schedule, directly_behind, fewest_waits, happens_before


def library_kernels(graph: KernelGraph) -> frozenset[int]:
    """Kernels of `graph` that may be libraries' calls: all that Inductor has generated no code for."""
    return frozenset(index for index, kernel in enumerate(graph.kernels) if kernel.kind == "extern")


def gathered(schedule: Schedule, libraries: Mapping[int, int]) -> Schedule:
    """`schedule`, its kernels in `libraries` on as few streams as are found, which come first.

    libraries: by kernel, the bytes it asks for; streams with the largest pieces come before others, so that schedules
    captured on the same streams share them. What is found may not be the fewest streams there could be.
    O(kernels x streams x (waits + streams)).
    """
    calls = libraries.keys()
    before = {schedule.stream[kernel] for kernel in calls}
    if before <= {0}:
        return schedule
    direct = directly_behind(schedule)
    stream = _chains(schedule, direct, calls) if len(before) > 1 else None
    if stream is None or len({stream[kernel] for kernel in calls}) >= len(before):
        stream = list(schedule.stream)
    return _renumbered(schedule, stream, direct, libraries)


def renumbered(schedule: Schedule, libraries: Mapping[int, int]) -> Schedule:
    """`schedule` as it is, its streams numbered as `gathered` numbers them."""
    return _renumbered(schedule, schedule.stream, directly_behind(schedule), libraries)


def on_fewer_streams(
    schedule: Schedule, moved: Collection[int], libraries: Mapping[int, int], fits: Callable[[Schedule], bool]
) -> Schedule | None:
    """`schedule` with the kernels of `moved` on ever fewer of their streams, until it `fits`; None if it never does.

    On a stream they share they take turns, in launch order; all others stay where they are. The two streams with the
    fewest of them become one each time. libraries: as `gathered` takes them. fits: asked about streams and launch order
    alone; what it is asked about has no waits yet.
    """
    stream, direct = list(schedule.stream), directly_behind(schedule)
    for _ in range(len({stream[kernel] for kernel in moved}) - 1):
        load: dict[int, int] = {}
        for kernel in moved:
            load[stream[kernel]] = load.get(stream[kernel], 0) + 1
        one, other = sorted(load, key=lambda s: (load[s], s))[:2]
        for kernel in moved:
            if stream[kernel] == other:
                stream[kernel] = one
        if fits(Schedule(tuple(stream), schedule.order, ((),) * len(stream))):
            return _renumbered(schedule, stream, direct, libraries)
    return None


def _heirs(schedule: Schedule, direct: Sequence[tuple[int, ...]], calls: Collection[int]) -> list[int]:
    """For each kernel the one behind it from which most library kernels follow one another; -1 if there is none."""
    ahead = [0] * len(direct)  # library kernels on the best way from here on, this one included
    heir = [-1] * len(direct)
    for kernel in reversed(schedule.order):
        ahead[kernel] += kernel in calls
        for earlier in direct[kernel]:
            if heir[earlier] < 0 or ahead[kernel] > ahead[earlier]:  # until its own turn comes: without itself
                ahead[earlier], heir[earlier] = ahead[kernel], kernel
    return heir


def _chains(schedule: Schedule, direct: Sequence[tuple[int, ...]], calls: Collection[int]) -> list[int] | None:
    """A stream for each kernel, such that each stream is a chain of `schedule`'s happens-before; None if it would take
    more streams than there are."""
    relation = happens_before(schedule)
    heir = _heirs(schedule, direct, calls)
    tails: list[int] = []  # the last kernel on each stream
    holds: list[bool] = []  # whether it has library kernels
    stream, width = [0] * len(direct), schedule.streams
    for kernel in schedule.order:
        library = kernel in calls
        open_to = [s for s, tail in enumerate(tails) if relation.ordered(tail, kernel)]

        def cost(s: int, kernel: int = kernel, library: bool = library) -> tuple[int, ...]:
            if s == len(tails):  # a new one
                return (1, 1, 1, s) if library else (1, 0, 0, s)
            follows, inherits = tails[s] in direct[kernel], heir[tails[s]] == kernel
            if library:
                return (not holds[s], not inherits, not follows, s)
            # Others take a stream that libraries use only as the way to the next library kernel.
            return (2 * (holds[s] and not inherits), not follows, not holds[s], s)

        if len(tails) < width:
            open_to.append(len(tails))
        elif not open_to:
            return None
        best = min(open_to, key=cost)
        if best == len(tails):
            tails.append(kernel)
            holds.append(False)
        stream[kernel], tails[best] = best, kernel
        holds[best] = holds[best] or library
    return stream


def _renumbered(
    schedule: Schedule, stream: Sequence[int], direct: Sequence[tuple[int, ...]], libraries: Mapping[int, int]
) -> Schedule:
    """The schedule on these streams, those with the largest pieces of memory and the most library kernels first, and
    the fewest waits `direct` needs."""
    load = {stream[kernel]: (0, 0) for kernel in schedule.order}
    for kernel, nbytes in libraries.items():
        largest, count = load[stream[kernel]]
        load[stream[kernel]] = max(largest, nbytes), count + 1
    ranked = sorted(load, key=lambda s: load[s], reverse=True)  # stable: in the order they come in
    number = {old: new for new, old in enumerate(ranked)}
    stream = [number[s] for s in stream]
    return replace(schedule, stream=tuple(stream), waits=fewest_waits(stream, schedule.order, direct.__getitem__))
