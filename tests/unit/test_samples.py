"""Results files: what is written is read back, the older schema too, and what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import documents
from bench.samples import ABOUT, Results, Row, Samples, dumps, load, loaded, median, row_from, save, spread
from bench.summary import case_table, middle_half, problems
from bench.tables import console

ABOUT_TEST = dict.fromkeys(ABOUT, "x")
CASE = ("tiny", "float16", 1)


def row(backend: str = "opara", seconds: tuple[float, ...] = (1e-3, 2e-3, 3e-3), **more: Any) -> Row:
    made = Row(*CASE, backend, Samples(seconds, tuple(2 * s for s in seconds), seconds), 0.0, 1.5)
    return replace(made, **more)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    wrong = row("inductor", samples=None, problem="wrong: error 1 against eager", kinds={"triton": 3})
    results = Results(ABOUT_TEST, (row(), row(process=1, fallbacks=("host_kernel",)), wrong))
    save(tmp_path / "r.json", results)
    assert load(tmp_path / "r.json") == results
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == 2


@pytest.mark.parametrize("name", ["h200", "h200-whole", "h200-unrewritten", "compare-h200-before"])
def test_committed_files_are_read(name: str) -> None:
    results = load(documents.RESULTS / f"{name}.json")
    assert 0 in {r.process for r in results.rows}
    assert all(results.of(case, "opara") for case in results.cases())


def test_what_is_read_where_no_file_is_named() -> None:
    """Runs of a commit; those that `compare` is tested with, one of them slowed on purpose, are none."""
    found = loaded((), pytest.fail)
    assert found == [load(documents.RESULTS / f"{name}.json") for name in ("h200-unrewritten", "h200-whole", "h200")]
    assert not any("--planted" in results.about["command"] for results in found)


def as_json() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(dumps(row()))
    return loaded


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"schema": 99}, "has schema 99; this version reads 2 and 1"),
        ({"driver": None, "device": ...}, "lacks device"),
        ({"rows": [{}]}, "row 0: unknown fields [], missing fields ['model'"),
        (
            {"rows": [{**as_json(), "colour": 1}]},
            "unknown fields ['colour']",
        ),
        ({"rows": [{**as_json(), "batch": "one"}]}, "'batch' takes a int"),
        ({"rows": [{**as_json(), "samples": None}]}, "must say its problem"),
        (
            {"rows": [{**as_json(), "samples": {"wall": [1, 0]}}]},
            "samples.wall takes seconds",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, edit: dict[str, Any], said: str) -> None:
    path = tmp_path / "r.json"
    document = {"schema": 2, **ABOUT_TEST, "rows": [], **edit}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"r\.json") as error:
        load(path)
    assert said in str(error.value)


def test_a_row_of_the_older_schema() -> None:
    """As it was written before there were processes."""
    old = {"model": "m", "dtype": "float16", "batch": 1, "backend": "opara", "error": 0.0, "first_call_seconds": 1.0}
    samples = {"gpu": None, "wall": [1.0], "wall_p90": [1.0]}
    found = row_from({**old, "samples": samples, "kernels": 3, "streams": 2, "captured": 1, "fallbacks": []})
    assert (found.process, found.replays, found.kernels, found.fallbacks) == (0, None, 3, ())


def test_medians_over_processes() -> None:
    rows = (row(seconds=(1.0, 2.0, 9.0)), row(seconds=(4.0, 4.0, 4.0), process=1), row(seconds=(3.0,), process=2))
    assert median(rows) == 3.0
    assert median(rows, "wall") == 6.0
    assert spread(rows) == pytest.approx(1.0)
    assert spread(rows[:1]) == 0.0
    assert middle_half((1.0, 2.0, 3.0, 4.0, 5.0)) == pytest.approx(2 / 3)
    assert middle_half((1.0,)) == 0.0


def test_a_figure_that_is_wrong_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = row("opara", samples=None, problem="wrong: error 3.00e-01 against eager, 2e-02 allowed")
    results = Results(ABOUT_TEST, (row("inductor"), row("inductor", process=1), wrong))
    console().print(case_table(results, CASE))
    shown = capsys.readouterr().out
    assert "NOT REPORTED: wrong: error 3.00e-01" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("│ opara")]
    assert "ms" not in line
    assert not any(letter.isdigit() for letter in line)
    assert problems(results) == [wrong]


def test_none_of_this_needs_torch() -> None:
    program = "import sys, bench.samples, bench.summary, bench.report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"
