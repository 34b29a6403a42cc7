"""The gate on schedule quality: what counts as worse, what is said about it, and that the committed baseline holds."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import documents, schedule_quality
from bench.regressions import Change, compare
from bench.schedule_quality import COMBINATIONS, COMPARED, SCHEMA, main, measure
from tests.gpu_profiles import tiny_recording

MODULES = ("schedule_quality", "calibration", "scheduling_time", "recorded")


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The baseline of one tiny recording, which is all that is measured."""
    monkeypatch.setattr(schedule_quality, "load_all", lambda: (tiny_recording(),))
    path = tmp_path / "baseline.json"
    assert main(["--baseline", str(path), "--update"]) == 0
    return path


def edit(path: Path, row: int, **figures: object) -> None:
    document = documents.read(path, SCHEMA)
    document["rows"][row].update(figures)
    documents.write(path, document)


# --- what counts as worse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "worse", "better"),
    [
        (100.0, 100.0, False, False),
        (100.0, 101.0, False, False),
        (100.0, 101.1, True, False),
        (100.0, 99.5, False, False),
        (100.0, 98.0, False, True),
        (0.0, 0.0, False, False),
        (0.0, 1.0, True, False),
        (1.0, 0.0, False, True),
    ],
)
def test_a_change_beyond_the_limit_counts(before: float, after: float, worse: bool, better: bool) -> None:
    found = compare({("g", "p"): {"waits": before}}, {("g", "p"): {"waits": after}}, limit=0.01)
    change = (Change(("g", "p"), "waits", before, after),)
    assert found.worse == (change if worse else ())
    assert found.better == (change if better else ())
    assert found.accepted is not worse


def test_what_is_gone_is_not_accepted_and_what_is_new_is() -> None:
    found = compare({("g", "old"): {}, ("g", "both"): {}}, {("g", "both"): {}, ("g", "new"): {}}, limit=0.01)
    assert (found.gone, found.new) == ((("g", "old"),), (("g", "new"),))
    assert not found.accepted
    assert compare({}, {("g", "new"): {}}, limit=0.01).accepted


def test_a_row_of_the_table() -> None:
    assert Change(("g", "p"), "arena_bytes", 1_000_000, 1_500_000).row() == (
        *("g", "p", "arena_bytes", "1,000,000", "1,500,000", "+50.0%"),
    )
    assert Change(("g", "p"), "waits", 0, 2).row()[-3:] == ("0", "2", "-")


# --- one recording ---------------------------------------------------------------------------------------------------


def test_what_is_measured() -> None:
    """Three kernels, the third after both others, each with a buffer of 4096 bytes, of which nothing can share."""
    found = {quality.policy: quality for quality in measure(tiny_recording())}
    assert len(found) == len(COMBINATIONS)
    sequential, opara = found["sequential/program on 1"], found["opara/opara on 8"]
    assert (sequential.streams, sequential.waits) == (1, 0)
    assert (opara.streams, opara.waits) == (2, 1)
    assert (opara.arena_bytes, opara.unshared_bytes) == (3 * 4096, 3 * 4096)
    assert sequential.makespan_over_bound == pytest.approx(1.5)
    assert opara.makespan_over_bound > 1
    assert opara.scheduling_ms > 0


def test_without_a_gpu_nothing_is_measured() -> None:
    recording = tiny_recording()
    with pytest.raises(ValueError, match="tiny-float16 was recorded without a GPU"):
        list(measure(replace(recording, profile=replace(recording.profile, device=None))))


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_a_baseline(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline.unlink()
    assert main(["--baseline", str(baseline)]) == 2
    assert "write one with --update" in capsys.readouterr().out
    baseline.write_text("{}")
    assert main(["--baseline", str(baseline)]) == 2
    assert "has schema None; this version reads 1" in capsys.readouterr().out


def test_as_good_as_the_baseline(baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--baseline", str(baseline), "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "as good as the baseline" in shown
    assert "list_k/critical_path on 4" in shown
    assert (tmp_path / "out.json").read_bytes() == baseline.read_bytes()
    assert "scheduling_ms" not in baseline.read_text()


@pytest.mark.parametrize("figure", COMPARED)
def test_worse_than_the_baseline(baseline: Path, figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What was, less a tenth, makes what is now worse."""
    row = documents.read(baseline, SCHEMA)["rows"][0]
    edit(baseline, 0, **{figure: row[figure] * 0.9})
    assert main(["--baseline", str(baseline)]) == 1
    lines = capsys.readouterr().out.partition("WORSE than the baseline")[2].splitlines()
    (offender,) = [line for line in lines if "tiny-float16" in line]
    for word in (row["policy"], figure, f"{row[figure] * 0.9:,.10g}", f"{row[figure]:,.10g}", "+11.1%"):
        assert word in offender
    assert main(["--baseline", str(baseline), "--update"]) == 0
    assert main(["--baseline", str(baseline)]) == 0


def test_better_than_the_baseline(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(baseline, 0, makespan_over_bound=9.0)
    assert main(["--baseline", str(baseline)]) == 0
    assert "Better than the baseline" in capsys.readouterr().out


def test_other_combinations_than_the_baseline(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(baseline, 0, policy="retired")
    assert main(["--baseline", str(baseline)]) == 1
    shown = capsys.readouterr().out
    assert "new: tiny-float16, opara/opara on 8" in shown
    assert "gone: tiny-float16, retired" in shown


# --- what is committed -----------------------------------------------------------------------------------------------


def test_the_committed_baseline_holds_and_nothing_depends_on_how_strings_hash(tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.json"
        done = subprocess.run(
            [sys.executable, "-m", "bench.schedule_quality", "--json", str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_none_of_this_needs_torch() -> None:
    imports = ", ".join(f"bench.{name}" for name in MODULES)
    program = f"import sys, {imports}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "bench.schedule_quality" in loaded
    assert "torch" not in loaded
