"""The full run for real, on the CPU with two reduced models: compiled in parallel, then measured, then complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.samples import load


@pytest.mark.slow
def test_a_small_campaign(tmp_path: Path) -> None:
    words = ["--models", "two_tower", "deepfm", "--dtypes", "float32", "--batches", "1", "--processes", "2", "--small"]
    command = ["campaign", "--out", str(tmp_path), *words, "--rounds", "1", "--minutes", "9", "--workers", "2"]
    assert main(command) == 0
    results = load(tmp_path / "results.json")
    assert len(results.rows) == 2 * 2 * 5
    assert all(row.samples is not None for row in results.rows)
    assert all(row.first_call_seconds is None for row in results.rows)  # they tell nothing of a machine in use
    assert main([*command, "--minutes", "0"]) == 0  # nothing is left to do
