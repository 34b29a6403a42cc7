"""Plots are drawn from results alone, the committed ones are up to date, and nothing depends on when they are drawn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import documents
from bench.plots import batches, charts, draw, gap, makespans, memory, speed_up
from bench.samples import ABOUT, OURS, STOCK, Results, Row, Samples, loaded
from tests.gpu_profiles import tiny_recording

PLOTS = documents.RESULTS / "plots"


def results() -> Results:
    rows = []
    for batch, ours, stock in ((1, 1e-3, 2e-3), (8, 2e-3, 3e-3)):
        for backend, seconds in ((OURS, ours), (STOCK, stock)):
            rows.append(Row("tiny", "float16", batch, backend, Samples((seconds,), (seconds,), (seconds,)), 0.0, 1.0))
    return Results(dict.fromkeys(ABOUT, "x"), tuple(rows))


def test_what_is_drawn() -> None:
    bars = speed_up([results()])
    assert (bars.labels, bars.series) == (("tiny",), (("float16 (mean 2.00x)", (2.0,)),))
    assert batches([results()]).series == (("tiny float16", ((1, 2.0), (8, 1.5))),)
    assert makespans([results()]).series == (("tiny float16", ((1, 1.0), (8, 2.0))),)
    found = dict(gap([tiny_recording((4e-6, 2e-6))]).series)
    assert found["one stream"][0] == pytest.approx(2.0)
    assert found["schedule kept"][0] == pytest.approx(1.0)
    row = {"graph": "tiny-float16", "policy": "sequential/program on 1", "arena_bytes": 25, "unshared_bytes": 100}
    assert memory([row]).series == (("one stream", (25.0,)),)


def test_a_line_is_of_one_run() -> None:
    """Another run of the same model has another machine or commit behind it."""
    other = Results(results().about, tuple(r for r in results().rows if r.batch == 1))
    for documents_ in ([other, results()], [results(), other]):
        assert batches(documents_).series == (("tiny float16", ((1, 2.0), (8, 1.5))),)


def test_lines_are_of_the_run_with_most_batches() -> None:
    """Wherever it stands among the files."""
    more = [replace(row, batch=4 * row.batch) for row in results().rows if row.batch == 8]
    full = Results(results().about, (*results().rows, *more))
    for documents_ in ([full, results()], [results(), full]):
        assert batches(documents_).series == (("tiny float16", ((1, 2.0), (8, 1.5), (32, 1.5))),)


def test_one_batch_is_no_line() -> None:
    one = Results(results().about, tuple(r for r in results().rows if r.batch == 1))
    assert batches([one]).series == ()


def test_pictures_are_written_and_do_not_depend_on_the_clock(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = draw(batches([results()]), tmp_path / "a", "batches")
    again = draw(batches([results()]), tmp_path / "b", "batches")
    assert [path.name for path in made] == ["batches.png", "batches.svg"]
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in again]
    assert draw(batches([]), tmp_path, "nothing") == []


def test_committed_plots_show_the_committed_results() -> None:
    """Every figure of the speed-up plot; text is drawn as shapes, so the data are compared through its comments."""
    found = charts(loaded((), pytest.fail))
    for name, chart in found.items():
        drawn = bool(chart.series)
        assert (PLOTS / f"{name}.png").exists() == (PLOTS / f"{name}.svg").exists() == drawn, "run python -m bench plot"
        if drawn:
            comments = re.findall(r"<!-- (.*?) -->", (PLOTS / f"{name}.svg").read_text())
            assert chart.title in comments
            for label, _ in chart.series:
                assert label in comments
