"""The way to be alone on a GPU, from the side of the one that asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import gate
from bench.gate import Gate
from opara_backend.execution import lane
from opara_backend.upstream import CachingAutotuner


def recorded(answer: str = "0") -> tuple[Gate, list[str]]:
    """A gate, and all that happens at it."""
    seen: list[str] = []

    def hear() -> str:
        seen.append("hear")
        return answer

    return Gate(seen.append, hear, lambda: seen.append("finish")), seen


INSIDE = ["finish", '"enter"', "hear", "inside", "finish", '"leave"']


def test_without_a_gate_blocks_just_run() -> None:
    before = lane.capture_fastest
    with gate.alone(), gate.searching_alone():
        assert lane.capture_fastest is before


def test_its_own_work_is_done_before_it_asks_and_before_it_leaves() -> None:
    way, seen = recorded()
    with gate.through(way):
        with gate.alone(), gate.alone():  # the inner one is in already
            seen.append("inside")
        with contextlib.suppress(ValueError), gate.alone():
            seen.append("inside")
            raise ValueError
    assert seen == INSIDE * 2


def test_a_search_asks_and_nothing_stays_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    way, seen = recorded()

    def search(what: str) -> str:
        seen.append(what)
        return "found"

    monkeypatch.setattr(lane, "capture_fastest", search)
    with gate.through(way):
        with gate.searching_alone():
            assert lane.capture_fastest("inside") == "found"
        assert lane.capture_fastest is search
    assert seen == INSIDE


@pytest.mark.parametrize("broken", ["say", "hear"])
def test_it_ends_when_nobody_grants_any_more(broken: str) -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError

    say: Callable[[str], None] = gone if broken == "say" else lambda text: None
    with gate.through(Gate(say, lambda: "", lambda: None)), pytest.raises(SystemExit, match="has gone"), gate.alone():
        raise AssertionError("it was not granted")


def test_kernels_are_tuned_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by several processes: each opens the file anew, and a lock belongs to an open file."""
    inside, most, lock = 0, 0, tmp_path / "caches" / "tuning-0.lock"

    def tune(self: object, word: str) -> str:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return word

    monkeypatch.setattr(CachingAutotuner, "benchmark_all_configs", tune)
    before = CachingAutotuner.benchmark_all_configs
    tuner = CachingAutotuner.__new__(CachingAutotuner)
    for way, expected in ((lock, 1), (None, 4)):
        with gate.tuning_alone(way), ThreadPoolExecutor(4) as pool:
            most = 0
            assert list(pool.map(tuner.benchmark_all_configs, "abcd")) == list("abcd")
        assert most == expected
        assert CachingAutotuner.benchmark_all_configs is before
