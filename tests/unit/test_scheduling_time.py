"""Nobody waits longer for a schedule than with the paper's own code."""

from __future__ import annotations

import itertools

import pytest

from bench import scheduling_time
from bench.recorded import load_all
from bench.scheduling_time import PAPER, main, measure, timed
from tests.gpu_profiles import tiny_recording


def test_the_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls that take 1, 5 and 2 seconds."""
    clock = itertools.accumulate([0.0, 1.0, 0.0, 5.0, 0.0, 2.0])
    monkeypatch.setattr(scheduling_time.time, "perf_counter", lambda: next(clock))
    assert timed(lambda: "made", runs=3) == ("made", 2000.0)


def test_only_models_of_the_paper_are_timed() -> None:
    (times,) = measure([tiny_recording(), tiny_recording(model="googlenet")], runs=1)
    assert (times.model, times.kernels) == ("googlenet", 3)


def test_scheduling_takes_no_longer_than_the_paper_says() -> None:
    found = measure(load_all())
    assert {"bert_base", "googlenet", "inception_v3", "t5_small"} <= {times.model for times in found}
    for times in found:
        opara, nimble = PAPER[times.model]
        assert times.opara <= opara, times
        assert times.nimble <= nimble, times


def test_the_table_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scheduling_time, "load_all", lambda: (tiny_recording(model="googlenet"),))
    assert main() == 0
    shown = capsys.readouterr().out
    assert "257.8" not in shown
    assert "not recorded: bert_base, inception_v3, nasnet_large, t5_small" in shown
