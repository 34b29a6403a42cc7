"""Happens-before among launched kernels, grown one launch at a time.

Takes: kernels in launch order, each with its stream and the kernels it waits for. Gives: whether one kernel happens
before another. Must not change: anything it was given. Imports no torch. Errors: KeyError for a wait on a kernel that
has not been launched.

A vector clock per kernel: entry s counts the kernels of stream s that happen before the end of it, itself included.
Since streams run in launch order, the first n kernels of a stream are the n that are counted, so a kernel at place p of
stream s happens before another exactly if the other's clock says at least p for s. A launch costs O(streams x (waits +
1)), a question O(1).
"""

from __future__ import annotations

from collections.abc import Sequence

Clock = Sequence[int]


class HappensBefore:
    """The relation over the kernels launched so far, on streams 0 to `streams` - 1."""

    def __init__(self, streams: int) -> None:
        self._stream: dict[int, int] = {}
        self._place: dict[int, int] = {}  # of a kernel on its stream, from 1
        self._clock: dict[int, Clock] = {}
        self._latest: list[Clock] = [[0] * streams for _ in range(streams)]

    def launch(self, kernel: int, stream: int, waits: Sequence[int] = ()) -> None:
        """Launch `kernel` on `stream` behind the ends of `waits`."""
        clock = list(self._latest[stream])
        for awaited in waits:
            clock = self.merged(clock, awaited)
        clock[stream] += 1
        self._stream[kernel], self._place[kernel] = stream, clock[stream]
        self._clock[kernel] = self._latest[stream] = clock

    def ordered(self, first: int, second: int) -> bool:
        """True if `first` happens before `second`; both must have been launched."""
        return first != second and self.precedes(first, self._clock[second])

    def clock(self, kernel: int) -> Clock:
        """For each stream, how many of its kernels happen before the end of `kernel`, itself included."""
        return self._clock[kernel]

    def next_clock(self, stream: int) -> Clock:
        """What happens before a kernel launched next on `stream`, without waits of its own."""
        return self._latest[stream]

    def precedes(self, kernel: int, clock: Clock) -> bool:
        """True if `kernel` is among what `clock` counts."""
        return clock[self._stream[kernel]] >= self._place[kernel]

    def merged(self, clock: Clock, kernel: int) -> list[int]:
        """`clock` and everything up to the end of `kernel`."""
        return list(map(max, clock, self._clock[kernel]))
