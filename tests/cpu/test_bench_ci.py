"""The gate that needs no GPU: its fast part for real, and what it says when something got worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ci, documents
from bench.__main__ import main

FOUND: ci.Found = {
    ("call", "m"): {"functions called over inductor": 2.0, "time over inductor": 1.5},
    ("import", "opara_backend"): {"modules imported": 19.0, "import time over torch": 0.02},
}


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A baseline of two made-up rows, which is also what is measured."""
    monkeypatch.setattr(ci, "measure", lambda fast, rounds: ({k: dict(v) for k, v in FOUND.items()}, []))
    monkeypatch.setattr(ci.schedule_quality, "main", lambda words: 0)
    path = tmp_path / "ci.json"
    assert main(["ci", "--baseline", str(path), "--update"]) == 0
    return path


def edit(path: Path, row: int, figure: str, factor: float) -> None:
    document = documents.read(path, ci.SCHEMA)
    document["rows"][row]["figures"][figure] *= factor
    documents.write(path, document)


def test_the_committed_baseline_holds() -> None:
    """For real, and all that is counted; with other versions than the baseline's, that outputs are right."""
    assert main(["ci", "--fast"]) == 0


def test_as_good(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ci", "--baseline", str(baseline)]) == 0
    assert "as good as the baseline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "figure", "factor", "code"),
    [
        (0, "functions called over inductor", 0.85, 1),
        (0, "functions called over inductor", 1 / 1.05, 1),
        (0, "functions called over inductor", 0.97, 0),
        (0, "time over inductor", 0.5, 1),
        (0, "time over inductor", 0.85, 0),  # what is timed may vary more
        (1, "modules imported", 0.85, 1),
        (1, "modules imported", 1.5, 0),
    ],
)
def test_worse(
    baseline: Path, row: int, figure: str, factor: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(baseline, row, figure, factor)
    assert main(["ci", "--baseline", str(baseline)]) == code
    shown = capsys.readouterr().out
    assert ("WORSE than the baseline" in shown) == bool(code)
    if code:
        (line,) = [line for line in shown.partition("WORSE")[2].splitlines() if figure in line]
        assert f"{1 / factor - 1:+.1%}" in line


def test_other_versions_and_other_files(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = documents.read(baseline, ci.SCHEMA)
    documents.write(baseline, {**document, "rows": [{**r, "versions": "Python 2.7"} for r in document["rows"]]})
    assert main(["ci", "--baseline", str(baseline)]) == 0
    assert "nothing was compared; known: Python 2.7" in capsys.readouterr().out
    baseline.write_text("{}")
    assert main(["ci", "--baseline", str(baseline)]) == 2


def test_wrong_outputs_fail_and_are_no_baseline(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = baseline.read_bytes()
    monkeypatch.setattr(ci, "measure", lambda fast, rounds: (FOUND, ["m under opara: wrong: error 1 against eager"]))
    assert main(["ci", "--baseline", str(baseline), "--update"]) == 1
    assert baseline.read_bytes() == before
