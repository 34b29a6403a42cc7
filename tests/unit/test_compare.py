"""Comparing two results: a planted slowdown is found, noise alone is not, and no machine drifts into the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import main
from bench.compare import BROKEN, FASTER, GONE, SAME, SLOWER, compare, groups, verdict
from bench.samples import ABOUT, Results, Row, Samples, save
from bench.stats import Ratio, beyond, center, process_noise, ratio, relative, usual_noise

SECONDS = st.floats(1e-6, 10.0)
GROUPS = st.lists(st.lists(SECONDS, min_size=1, max_size=5), min_size=1, max_size=3)


def results(
    seed: int, slower: float = 1.0, drift: float = 1.0, cases: int = 20, noise: float = 0.005, backend: str = "opara"
) -> Results:
    """Cases in three processes of seven rounds, as a GPU gives them: 0.5 % between rounds and between processes.

    slower: planted in the first case's `backend`; drift: the whole machine is so much slower.
    """
    random = Random(seed)
    rows = []
    for case in range(cases):
        for process in range(3):
            own = random.gauss(1.0, noise)
            for name in ("stock", backend):
                level = drift * (1e-3 + case * 1e-4) * own * (slower if case == 0 and name == backend else 1.0)
                samples = tuple(level * random.gauss(1.0, noise) for _ in range(7))
                rows.append(
                    Row(f"m{case}", "float16", 1, name, Samples(samples, samples, samples), 0.0, 1.0, process=process)
                )
    return Results(dict.fromkeys(ABOUT, "x"), tuple(rows))


def slower(before: Results, after: Results, base: str | None = None) -> list[tuple[str, str]]:
    return [(m.case[0], m.backend) for m in compare(before, after, base=base) if m.verdict == SLOWER]


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_slowdown_of_5_per_cent_is_found_and_nothing_else(seed: int) -> None:
    before = results(seed)
    assert slower(before, results(seed + 100, slower=1.05)) == [("m0", "opara")]
    assert slower(before, results(seed + 200)) == []


def test_noise_as_large_as_the_slowdown_is_no_verdict() -> None:
    assert slower(results(7, noise=0.05), results(8, noise=0.05)) == []


def test_variants_that_are_noisy_hide_no_slowdown_of_others() -> None:
    """Neither those that wait for the host, nor a case in which processes chose different kernels."""

    def noisy(seed: int, slowed: float = 1.0) -> Results:
        found = results(seed, slower=slowed)
        rows = [replace(row, replays=1) for row in found.rows]
        for number, row in enumerate(results(seed, noise=0.2, backend="eager").rows):
            if row.backend == "eager" or row.model == "m19":
                rows.append(
                    replace(row, backend=row.backend + str(number % 2), replays=0 if row.backend == "eager" else 1)
                )
        return replace(found, rows=tuple(rows))

    before = noisy(1)
    assert slower(before, noisy(2)) == []
    assert slower(before, noisy(3, 1.05)) == [("m0", "opara")]


def test_a_case_is_judged_by_its_own_noise_where_that_is_more() -> None:
    quiet = [r for r in results(0).rows if r.backend == "opara"]
    fast, slow = (Samples((t,) * 7, (t,) * 7, (t,) * 7) for t in (1.0, 1.09))
    changing = [replace(quiet[0], model="other", process=p, samples=s) for p, s in enumerate((fast, slow, slow))]
    before = replace(results(0), rows=(*quiet, *changing))
    after = replace(
        before, rows=(*quiet, *(replace(r, samples=Samples((1.1,) * 7, (1.1,) * 7, (1.1,) * 7)) for r in changing))
    )
    (moved,) = (m for m in compare(before, after) if m.case[0] == "other")
    assert moved.verdict == SAME
    assert moved.limit > 1.1 > 1.05 > max(m.limit for m in compare(before, after) if m.case[0] != "other")


def test_a_planted_gain_is_told() -> None:
    moved = list(compare(results(0), results(1, slower=1 / 1.06)))
    assert [(m.case[0], m.backend) for m in moved if m.verdict == FASTER] == [("m0", "opara")]


def test_relative_to_a_base_a_slower_machine_is_no_regression() -> None:
    before, after = results(0), results(1, slower=1.08, drift=1.4)
    assert len(slower(before, after)) == 40
    assert slower(before, after, base="stock") == [("m0", "opara")]


def test_a_variant_that_leaves_the_gpu_idle_is_compared_by_the_wall() -> None:
    """Its wall time is never divided by another's time on the GPU, nor is it missed on that clock."""

    def with_idle(seed: int) -> Results:
        found = results(seed, cases=3)
        idle = (
            replace(row, backend="dynamo", samples=replace(row.samples, gpu=None, wall=(2e-4,) * 7))
            for row in found.rows
            if row.backend == "opara" and row.samples is not None
        )
        walls = (replace(row, samples=replace(row.samples, wall=(4e-4,) * 7)) for row in found.rows if row.samples)
        return replace(found, rows=(*walls, *idle))

    before = with_idle(0)
    assert {m.backend for m in compare(before, with_idle(1), clock="gpu")} == {"stock", "opara"}
    assert {m.backend for m in compare(before, with_idle(1))} == {"stock", "opara", "dynamo"}
    assert groups(before, ("m0", "float16", 1), "dynamo", "stock", "best_clock") == [[0.5] * 7] * 3


def test_what_is_gone_or_broken_is_not_accepted() -> None:
    before = results(0, cases=2)
    rows = [r for r in before.rows if r.case[0] != "m1"]
    broken = [replace(r, samples=None, problem="wrong") if r.backend == "opara" else r for r in rows]
    found = {(m.case[0], m.backend): m.verdict for m in compare(before, replace(before, rows=tuple(broken)))}
    assert found[("m0", "opara")] == BROKEN
    assert found[("m1", "opara")] == found[("m1", "stock")] == GONE
    assert found[("m0", "stock")] == SAME


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Ratio(1.05, 1.01, 1.09), SLOWER),
        (Ratio(1.05, 0.99, 1.09), SAME),  # beyond the threshold, within the noise
        (Ratio(1.02, 1.01, 1.03), SAME),  # beyond the noise, within the threshold
        (Ratio(0.95, 0.91, 0.98), FASTER),
        (Ratio(0.95, 0.91, 1.01), SAME),
    ],
)
def test_both_the_threshold_and_the_noise_must_be_passed(found: Ratio, expected: str) -> None:
    assert verdict(found, 0.03) == expected


@given(GROUPS, GROUPS)
def test_the_interval_holds_the_ratio_and_is_the_same_each_time(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> None:
    found = ratio(before, after)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(center(after) / center(before))
    assert ratio(before, after) == found


@given(GROUPS, st.floats(0.1, 10.0))
def test_scaling_one_side_scales_the_ratio(groups: Sequence[Sequence[float]], factor: float) -> None:
    scaled = [[factor * s for s in group] for group in groups]
    assert ratio(groups, scaled).value == pytest.approx(factor)
    for own, expected in zip(relative(scaled, groups), groups, strict=True):
        assert own == pytest.approx([factor] * len(expected))


def test_noise_is_pooled_over_cases() -> None:
    rows = results(3).rows
    sides = [[[r.samples.gpu[0]] for r in rows if r.model == f"m{c}" and r.backend == "opara"] for c in range(20)]
    for noise in (process_noise(sides), usual_noise(sides)):
        assert noise == pytest.approx(0.007, rel=0.3)  # between processes and of one round, 0.5 % each
    assert process_noise([[[1.0, 2.0]]]) == usual_noise([[[1.0, 2.0]]]) == usual_noise([]) == 0.0
    one, three = [[1.0]], [[1.0]] * 3
    limits = [beyond(noise, one, other, confidence=0.99, comparisons=9) for other in (one, three)]
    assert limits[0] > limits[1] > 1
    assert beyond(0.0, one, one, confidence=0.99, comparisons=9) == 1.0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, same, worse = (tmp_path / f"{name}.json" for name in ("before", "same", "worse"))
    save(before, results(0, cases=3))
    save(same, results(1, cases=3))
    save(worse, results(2, slower=1.05, cases=3))
    assert main(["compare", str(before), str(same)]) == 0
    assert "no regression" in capsys.readouterr().out
    assert main(["compare", str(before), str(worse)]) == 1
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if SLOWER in line]
    assert "m0 float16 1" in line
    assert shown.rstrip().endswith("1 slower")
    assert main(["compare", str(before), str(tmp_path / "none.json")]) == 2
    assert main(["compare", str(before), str(worse), "--threshold", "0.2"]) == 0


def test_part_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is only in the first file is not slower, and says so."""
    whole, part = results(0, cases=3), results(1, cases=1)
    paths = [tmp_path / "whole.json", tmp_path / "part.json"]
    for path, found in zip(paths, (whole, part), strict=True):
        save(path, found)
    words = list(map(str, paths))
    assert main(["compare", *words]) == 1
    shown = capsys.readouterr().out
    assert "only in the first file" in shown
    assert "slower" not in shown
    assert main(["compare", *words, "--allow-missing"]) == 0


def test_what_makes_figures_hard_to_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    first = results(0, cases=1)
    save(one, replace(first, rows=tuple(r for r in first.rows if r.process == 0)))
    save(two, replace(first, about={**first.about, "torch": "other"}))
    main(["compare", str(one), str(two)])
    shown = capsys.readouterr().out
    assert "not the same torch: x before, other after" in shown
    assert "one process on a side" in shown
