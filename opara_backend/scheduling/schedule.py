"""A Schedule, what it guarantees (happens-before), and the check that it is enough.

Takes: a KernelGraph, a stream for each kernel and a launch order. Gives: `Schedule` with the fewest waits, and
`verify`, which recomputes from reads and writes alone that every conflicting pair of kernels is ordered.
Must not change: the graph. Imports no torch. Errors: `ScheduleError`, naming both kernels and the buffer.

The model. A stream runs its kernels one after the other, in launch order. Waiting for a kernel means waiting for an
event recorded right after it on its own stream. *a happens before b* if a comes earlier on b's stream, or b (or
something earlier on its stream) waits for a, or by any chain of these. Two kernels conflict if one writes a buffer
the other touches. A schedule is valid if every conflicting pair is ordered by happens-before in program order.

Why neighbours suffice: for one buffer, program order alternates writes and runs of reads. If each write happens
before the reads that follow it, each of those reads before the next write, and each write before the next, then by
transitivity every conflicting pair on that buffer is ordered. So `verify` looks at O(reads + writes) pairs, and
happens-before is decided in O(1) each from vector clocks: clock[k][s] is how many kernels of stream s happen before
the end of k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from opara_backend.kernel_graph import KernelGraph
from opara_backend.scheduling.happens_before import HappensBefore


class ScheduleError(RuntimeError):
    """A schedule that is not valid for its graph: a bug in a policy, never the user's fault."""


@dataclass(frozen=True)
class Schedule:
    """Where, in which order, and after what each kernel is launched (indices into the graph's kernels).

    stream: stream of each kernel. order: kernels in launch order. waits: for each kernel, the kernels whose events
    its stream waits for just before it. policy: who made it.
    """

    stream: tuple[int, ...]
    order: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]
    policy: str = ""

    @property
    def streams(self) -> int:
        """Number of streams."""
        return max(self.stream, default=-1) + 1

    @property
    def launches(self) -> tuple[object, ...]:
        """What it is, whoever made it: schedules alike in this are the same."""
        return self.stream, self.order, self.waits

    @property
    def wait_count(self) -> int:
        """Number of event waits."""
        return sum(map(len, self.waits))


def happens_before(schedule: Schedule) -> HappensBefore:
    """The relation `schedule` promises. KeyError if a kernel waits for one launched after it."""
    relation = HappensBefore(schedule.streams)
    for kernel in schedule.order:
        relation.launch(kernel, schedule.stream[kernel], schedule.waits[kernel])
    return relation


def directly_behind(schedule: Schedule) -> list[tuple[int, ...]]:
    """For each kernel those it is launched behind: the one before on its stream, and those it waits for."""
    last: dict[int, int] = {}
    found: list[tuple[int, ...]] = [()] * len(schedule.order)
    for kernel in schedule.order:
        stream = schedule.stream[kernel]
        before = (last[stream],) if stream in last else ()
        found[kernel] = tuple(dict.fromkeys((*before, *schedule.waits[kernel])))
        last[stream] = kernel
    return found


def with_waits(graph: KernelGraph, stream: Sequence[int], order: Sequence[int], policy: str = "") -> Schedule:
    """The Schedule with just the waits it needs: none for what stream order or an earlier wait already gives.

    `order` must be topological.
    """
    return Schedule(tuple(stream), tuple(order), fewest_waits(stream, order, graph.predecessors), policy)


def fewest_waits(
    stream: Sequence[int], order: Sequence[int], behind: Callable[[int], Iterable[int]]
) -> tuple[tuple[int, ...], ...]:
    """For each kernel the waits after which all that `behind` names of it, launched before it, happens before it.

    These are looked at latest-launched first, so no wait is added that a later one covers; without any single wait
    some pair is unordered.
    """
    before = HappensBefore(max(stream, default=-1) + 1)
    launched = [0] * len(order)
    for place, kernel in enumerate(order):
        launched[kernel] = place
    waits: list[tuple[int, ...]] = [()] * len(order)
    for kernel in order:
        clock = before.next_clock(stream[kernel])
        needed: list[int] = []
        for earlier in sorted(behind(kernel), key=launched.__getitem__, reverse=True):
            if not before.precedes(earlier, clock):
                needed.append(earlier)
                clock = before.merged(clock, earlier)
        waits[kernel] = tuple(sorted(needed))
        before.launch(kernel, stream[kernel], waits[kernel])
    return tuple(waits)


def neighbouring_conflicts(graph: KernelGraph) -> Iterator[tuple[int, int, str]]:
    """Pairs (earlier, later, buffer) whose order implies that of every conflicting pair; see the module's text."""
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    for index, kernel in enumerate(graph.kernels):
        for name in kernel.reads:
            if name in writer:
                yield writer[name], index, name
        for name in kernel.writes:
            for reader in readers.pop(name, ()):
                if reader != index:
                    yield reader, index, name
            if name in writer and writer[name] != index:
                yield writer[name], index, name
            writer[name] = index
        for name in kernel.reads:
            if writer.get(name) != index:
                readers.setdefault(name, []).append(index)


def verify(graph: KernelGraph, schedule: Schedule) -> None:
    """Raise ScheduleError unless `schedule` is valid for `graph`: computed from reads and writes, not from edges.

    O(kernels x streams + waits + reads + writes).
    """
    count = len(graph.kernels)
    if len(schedule.stream) != count or len(schedule.waits) != count or sorted(schedule.order) != list(range(count)):
        raise ScheduleError(f"the schedule does not launch each of the {count} kernels exactly once")
    if min(schedule.stream, default=0) < 0:
        raise ScheduleError(f"kernel {graph.kernels[schedule.stream.index(min(schedule.stream))].name} has no stream")
    seen: set[int] = set()
    for kernel in schedule.order:
        for awaited in schedule.waits[kernel]:
            if awaited not in seen:
                raise ScheduleError(
                    f"kernel {graph.kernels[kernel].name} waits for an event of {_name(graph, awaited)}, "
                    "which is not launched before it"
                )
        seen.add(kernel)
    before = happens_before(schedule)
    for first, second, buffer in neighbouring_conflicts(graph):
        if not before.ordered(first, second):
            raise ScheduleError(
                f"kernels {graph.kernels[first].name} ({graph.kernels[first].call}) and "
                f"{graph.kernels[second].name} ({graph.kernels[second].call}) both touch {buffer!r}, one writes it, "
                f"and policy {schedule.policy!r} does not order them"
            )


def _name(graph: KernelGraph, kernel: int) -> str:
    return graph.kernels[kernel].name if 0 <= kernel < len(graph.kernels) else f"kernel {kernel}"
