"""Small schedules of spinning kernels, each of which shows one cost of launching; and how that is read off a replay.

Takes: numbers of kernels, streams and seconds; what was seen when a Shape was replayed. Gives: Shapes; seconds.
Must not change: anything. Imports no torch.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from opara_backend.scheduling.schedule import Schedule

SPIN = 5e-6  # seconds: about what a small kernel of a model takes
SETTLED = 12  # kernels on two streams after which these have long been in step

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Shape:
    """A schedule, and how long each of its kernels spins."""

    schedule: Schedule
    seconds: tuple[float, ...]

    def awaited(self, kernel: int) -> list[int]:
        """The kernels that `kernel` follows: those it waits for, and the one before it on its stream."""
        order, stream = self.schedule.order, self.schedule.stream
        earlier = [k for k in order[: order.index(kernel)] if stream[k] == stream[kernel]]
        return [*self.schedule.waits[kernel], *earlier[-1:]]


@dataclass(frozen=True)
class Played:
    """What was seen of a Shape: begin and end of each kernel in each replay, and GPU seconds a replay, in a burst.

    A replay's times count from the begin of whichever kernel began first.
    """

    traces: tuple[Points, ...]
    seconds: float


@dataclass
class Drawing:
    """A Shape in the making; kernels are launched in the order in which they are added."""

    streams: list[int] = field(default_factory=list)
    waits: list[tuple[int, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, stream: int, *waits: int, seconds: float = SPIN) -> int:
        """One more kernel; its number."""
        self.streams.append(stream)
        self.waits.append(waits)
        self.seconds.append(seconds)
        return len(self.streams) - 1

    def shape(self) -> Shape:
        """What was drawn."""
        schedule = Schedule(tuple(self.streams), tuple(range(len(self.streams))), tuple(self.waits))
        return Shape(schedule, tuple(self.seconds))


def chains(streams: int, length: int) -> Shape:
    """`streams` chains side by side that never wait for each other."""
    drawing = Drawing()
    for _ in range(length):
        for stream in range(streams):
            drawing.add(stream)
    return drawing.shape()


def handed_over(length: int) -> Drawing:
    """One chain that changes between two streams with every kernel."""
    drawing = Drawing()
    for kernel in range(length):
        drawing.add(kernel % 2, *([kernel - 1] if kernel else []))
    return drawing


def fan(streams: int) -> Shape:
    """A kernel, and one on each stream that follows it."""
    drawing = Drawing()
    first = drawing.add(0)
    for stream in range(streams):
        drawing.add(stream, *([first] if stream else []))
    return drawing.shape()


def strangers() -> Shape:
    """Two chains that never waited for each other, and a last kernel that joins them."""
    drawing = Drawing()
    for _ in range(SETTLED):
        drawing.add(0)
        other = drawing.add(1)
    drawing.add(0, other)
    return drawing.shape()


def stale(seconds: float) -> Shape:
    """Two streams in step; then a kernel of `seconds`, and a last one that waits for what ended long before."""
    drawing = handed_over(SETTLED)
    drawing.add(0, seconds=seconds)
    drawing.add(0, SETTLED - 1)
    return drawing.shape()


def joined(streams: int, waits: int, rounds: int) -> tuple[Shape, list[int]]:
    """Chains, the first of which waits with each kernel for `waits` others by turns; those kernels.

    Kernels of the others take longer, so that there is something to wait for.
    """
    drawing = Drawing()
    latest = [drawing.add(stream, seconds=0.7 * SPIN) for stream in range(streams)]
    joins = []
    turn = 0
    for _ in range(rounds):
        chosen = [1 + (turn + i) % (streams - 1) for i in range(waits)]
        turn += waits
        latest[0] = drawing.add(0, *sorted(latest[stream] for stream in chosen), seconds=0.4 * SPIN)
        joins.append(latest[0])
        for stream in range(1, streams):
            latest[stream] = drawing.add(stream, seconds=0.7 * SPIN)
    return drawing.shape(), joins


def delays(shape: Shape, played: Played, kernel: int) -> list[float]:
    """In each replay, seconds from the end of the last kernel that `kernel` follows to its begin."""
    awaited = shape.awaited(kernel)
    return [trace[kernel][0] - max(trace[k][1] for k in awaited) for trace in played.traces]


def delay(shape: Shape, played: Played, kernels: Iterable[int]) -> float:
    """The same, as a rule: over all replays and `kernels`."""
    return middle([seconds for kernel in kernels for seconds in delays(shape, played, kernel)])


def apart(played: Played, kernels: Sequence[int]) -> float:
    """Seconds between the first and the last begin of `kernels`, as a rule."""
    begins = [[trace[kernel][0] for kernel in kernels] for trace in played.traces]
    return middle([max(own) - min(own) for own in begins])


def middle(values: Sequence[float]) -> float:
    """Mean of the middle half: as robust as a median, and finer than the clock that was read."""
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def slope(points: Points) -> float:
    """Of the straight line with the least squares through `points`."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def step(points: Points, level: float) -> float | None:
    """Where along x the y rise above `level`: half-way between two points, with the fewest on the wrong side.

    None if no place is better than in front of or behind all of them.
    """
    ordered = sorted(points)

    def wrong(place: int) -> int:
        return sum(y > level for _, y in ordered[:place]) + sum(y <= level for _, y in ordered[place:])

    best = min(range(len(ordered) + 1), key=wrong)
    if best in (0, len(ordered)):
        return None
    return (ordered[best - 1][0] + ordered[best][0]) / 2


def tick(played: Played) -> float:
    """The least time by which two readings of the clock differ."""
    readings = sorted({round(1e9 * reading) for trace in played.traces for span in trace for reading in span})
    return 1e-9 * min(b - a for a, b in itertools.pairwise(readings))
