"""The incremental happens-before relation against its definition, launch by launch."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from opara_backend.scheduling.happens_before import HappensBefore

STREAMS = 4


class Launches(RuleBasedStateMachine):
    """Launches kernels one by one and keeps the relation by its definition: transitive closure, pair by pair."""

    def __init__(self) -> None:
        super().__init__()
        self.relation = HappensBefore(STREAMS)
        self.before: dict[int, set[int]] = {}
        self.last_on: dict[int, int] = {}
        self.stream: dict[int, int] = {}

    @rule(stream=st.integers(0, STREAMS - 1), data=st.data())
    def launch(self, stream: int, data: st.DataObject) -> None:
        kernel = len(self.before)
        waits = data.draw(st.lists(st.sampled_from(sorted(self.before)), max_size=3)) if self.before else []
        direct = set(waits) | ({self.last_on[stream]} if stream in self.last_on else set())
        self.before[kernel] = direct.union(*(self.before[k] for k in direct))
        self.last_on[stream] = kernel
        self.stream[kernel] = stream
        self.relation.launch(kernel, stream, waits)

    @invariant()
    def agrees_with_the_definition(self) -> None:
        for second, earlier in self.before.items():
            for first in self.before:
                assert self.relation.ordered(first, second) == (first in earlier)

    @invariant()
    def the_next_kernel_comes_after_its_stream(self) -> None:
        for stream in range(STREAMS):
            last = self.last_on.get(stream)
            expected = self.before[last] | {last} if last is not None else set()
            clock = self.relation.next_clock(stream)
            assert {k for k in self.before if self.relation.precedes(k, clock)} == expected


Launches.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLaunches = Launches.TestCase


def test_waiting_for_what_was_not_launched() -> None:
    with pytest.raises(KeyError):
        HappensBefore(1).launch(1, 0, [0])
