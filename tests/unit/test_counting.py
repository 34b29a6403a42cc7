"""Counts are the same each time, grow with the work, and leave tracers as they were."""

from __future__ import annotations

import sys

from bench.counting import calls, instructions


def work(times: int) -> int:
    return sum(abs(-n) for n in range(times))


def test_instructions() -> None:
    counts = [instructions(lambda n=n: work(n)) for n in (10, 10, 20, 30)]
    assert counts[0] == counts[1]
    assert counts[3] - counts[2] == counts[2] - counts[1] > 0


def test_calls() -> None:
    counts = [calls(lambda n=n: [abs(-1) for _ in range(n)]) for n in (10, 10, 20)]
    assert counts[0] == counts[1]
    assert counts[2] - counts[1] == 10


def test_tracers_are_put_back_even_after_a_failure() -> None:
    before = sys.gettrace(), sys.getprofile()
    for count in (instructions, calls):
        try:
            count(lambda: 1 / 0)
        except ZeroDivisionError:
            continue
        raise AssertionError
    assert (sys.gettrace(), sys.getprofile()) == before
