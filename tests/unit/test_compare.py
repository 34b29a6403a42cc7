"""Comparing two results: a planted slowdown is found, noise alone is not, and no machine drifts into the verdict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.__main__ import main
from bench.compare import BROKEN, FASTER, GONE, SAME, SLOWER, Moved, compare, groups, verdict
from bench.documents import RESULTS
from bench.samples import ABOUT, Results, Row, Samples, load, save
from bench.stats import (
    Ratio,
    Weighted,
    beyond,
    center,
    mean_beyond,
    mean_ratio,
    process_noise,
    ratio,
    relative,
    usual_noise,
)

SECONDS = st.floats(1e-6, 10.0)
GROUPS = st.lists(st.lists(SECONDS, min_size=1, max_size=5), min_size=1, max_size=3)


def results(
    seed: int,
    slower: float = 1.0,
    drift: float = 1.0,
    cases: int = 20,
    noise: float = 0.005,
    backend: str = "opara",
    slowed: int = 1,
) -> Results:
    """Cases in three processes of seven rounds, as a GPU gives them: 0.5 % between rounds and between processes.

    slower: planted in `backend` of as many first cases as are `slowed`; drift: the whole machine is so much slower.
    """
    random = Random(seed)
    rows = []
    for case in range(cases):
        for process in range(3):
            own = random.gauss(1.0, noise)
            for name in ("stock", backend):
                level = drift * (1e-3 + case * 1e-4) * own * (slower if case < slowed and name == backend else 1.0)
                samples = tuple(level * random.gauss(1.0, noise) for _ in range(7))
                rows.append(
                    Row(f"m{case}", "float16", 1, name, Samples(samples, samples, samples), 0.0, 1.0, process=process)
                )
    return Results(dict.fromkeys(ABOUT, "x"), tuple(rows))


def slower(before: Results, after: Results, base: str | None = None) -> list[tuple[str, str]]:
    return [(m.case[0], m.backend) for m in compare(before, after, base=base) if m.case and m.verdict == SLOWER]


def together(before: Results, after: Results, base: str | None = None, clock: str = "best_clock") -> dict[str, Moved]:
    """What is said of each backend over all its cases."""
    return {m.backend: m for m in compare(before, after, base=base, clock=clock) if m.case is None}


def verdicts(before: Results, after: Results, **options: str) -> dict[str, str]:
    return {backend: moved.verdict for backend, moved in together(before, after, **options).items()}


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
    (moved,) = (m for m in compare(before, after) if m.case and m.case[0] == "other")
    assert moved.verdict == SAME
    assert moved.limit > 1.1 > 1.05 > max(m.limit for m in compare(before, after) if m.case and m.case[0] != "other")


def test_a_planted_gain_is_told() -> None:
    moved = list(compare(results(0), results(1, slower=1 / 1.06)))
    assert [(m.case[0], m.backend) for m in moved if m.verdict == FASTER] == [("m0", "opara")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("base", [None, "stock"])
def test_what_slows_every_case_a_little_is_found_over_all(seed: int, base: str | None) -> None:
    """Processes differ by 3 %, so that of single cases nothing is found."""
    before = results(seed, cases=8, noise=0.03)
    after = results(seed + 100, slower=1.05, cases=8, noise=0.03, slowed=8)
    assert slower(before, after) == []
    quiet = {} if base else {"stock": SAME}
    assert verdicts(before, after, base=base) == {**quiet, "opara": SLOWER}
    assert verdicts(after, before, base=base) == {**quiet, "opara": FASTER}
    assert verdicts(before, results(seed + 200, cases=8, noise=0.03), base=base) == {**quiet, "opara": SAME}


@pytest.mark.parametrize("clock", ["gpu", "wall", "best_clock"])
@pytest.mark.parametrize("base", [None, "reduce-overhead"])
def test_two_runs_of_one_commit_on_h200s_and_one_with_5_per_cent_planted(clock: str, base: str | None) -> None:
    """Five models, some of them so small that processes differ by 10 %; on the wall, by far more."""
    before, again, planted = (load(RESULTS / f"compare-h200-{name}.json") for name in ("before", "again", "planted"))
    others = [] if base else ["reduce-overhead"]
    for one, other in itertools.permutations((before, again)):
        assert {m.verdict for m in compare(one, other, base=base, clock=clock)} == {SAME}
        assert list(together(one, other, base, clock)) == [*others, "opara"]
    for one in (before, again):
        assert {m.verdict for m in compare(one, planted, base=base, clock=clock) if m.backend in others} <= {SAME}
        assert clock == "wall" or together(one, planted, base, clock)["opara"].verdict == SLOWER


def test_one_case_that_moved_is_no_verdict_over_all() -> None:
    """The mean is beyond the limit, and yet four of five cases are as they were."""
    before, after = results(0, cases=5, noise=1e-4), results(1, cases=5, noise=1e-4, slower=1.25)
    moved = together(before, after)["opara"]
    assert moved.ratio.value > moved.limit == pytest.approx(1.03)
    assert moved.verdict == SAME
    assert slower(before, after) == [("m0", "opara")]


def test_a_case_that_is_far_noisier_hides_nothing_over_all() -> None:
    """Nor is one without any noise all that counts."""

    def mixed(seed: int, slower: float = 1.0) -> Results:
        found = results(seed, cases=6, slower=slower, slowed=6)
        wild = [row for row in results(seed, cases=1, noise=0.3).rows if row.backend == "opara"]
        still = [replace(row, model="still", samples=Samples((1.0,), (1.0,), (1.0,))) for row in wild]
        return replace(found, rows=(*found.rows, *(replace(row, model="wild") for row in wild), *still))

    before = mixed(0)
    assert verdicts(before, mixed(1)) == {"stock": SAME, "opara": SAME}
    moved = together(before, mixed(2, slower=1.06))["opara"]
    assert (moved.verdict, moved.cases) == (SLOWER, 8)
    assert moved.ratio.value == pytest.approx(1.06 ** (6 / 7), rel=0.01)


def test_over_all_cases_noise_is_the_usual_or_their_own_where_that_is_more() -> None:
    calm, noisy = results(0, cases=8), results(0, cases=4, noise=0.05)
    stock = tuple(row for row in calm.rows if row.backend == "stock")
    mixed = replace(calm, rows=(*stock, *(row for row in noisy.rows if row.backend == "opara")))
    limits = {backend: moved.limit for backend, moved in together(mixed, mixed).items()}
    assert limits["stock"] == pytest.approx(1.03)
    assert limits["opara"] > 1.04
    alone = replace(noisy, rows=tuple(row for row in noisy.rows if row.backend == "stock" or row.process == 0))
    assert together(alone, alone)["opara"].limit > 1.05  # it has no noise of its own


def test_fewer_than_three_cases_are_judged_alone() -> None:
    assert together(results(0, cases=2), results(1, cases=2, slowed=2, slower=1.2)) == {}
    three = results(0, cases=3)
    assert {m.cases for m in together(three, three).values()} == {3}
    part = replace(three, rows=tuple(r for r in three.rows if r.model != "m2" or r.backend == "stock"))
    assert list(together(three, part)) == ["stock"]


def test_over_all_cases_without_a_gpu() -> None:
    def on_a_cpu(seed: int, slower: float = 1.0) -> Results:
        found = results(seed, cases=6, noise=0.02, slower=slower, slowed=6)
        return replace(found, rows=tuple(replace(r, samples=replace(r.samples, gpu=None)) for r in found.rows))

    assert verdicts(on_a_cpu(0), on_a_cpu(1)) == {"stock": SAME, "opara": SAME}
    assert verdicts(on_a_cpu(0), on_a_cpu(2, 1.06)) == {"stock": SAME, "opara": SLOWER}
    assert verdicts(on_a_cpu(0), on_a_cpu(2, 1.06), clock="gpu") == {}


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False), st.floats(0.1, 10.0), st.integers(0, 5))
def test_order_does_not_matter_and_what_is_scaled_scales_every_ratio(random: Random, factor: float, seed: int) -> None:
    def by_variant(before: Results, after: Results) -> dict[object, Moved]:
        return {(m.case, m.backend): m for m in compare(before, after)}

    def scaled(row: Row) -> Row:
        times = tuple(tuple(factor * s for s in getattr(row.samples, clock)) for clock in ("gpu", "wall", "wall_p90"))
        return replace(row, samples=Samples(*times))

    before, after = results(seed, cases=4, noise=0.02), results(seed + 1, cases=4, noise=0.02)
    rows = [scaled(row) for row in after.rows]
    random.shuffle(rows)
    mixed = random.sample(before.rows, len(before.rows))
    plain = by_variant(before, after)
    found = by_variant(replace(before, rows=tuple(mixed)), replace(after, rows=tuple(rows)))
    assert set(found) == set(plain)
    assert sum(case is None for case, _ in plain) == 2
    for variant, moved in found.items():
        for part in ("value", "low", "high"):
            assert getattr(moved.ratio, part) == pytest.approx(factor * getattr(plain[variant].ratio, part))
        assert moved.limit == pytest.approx(plain[variant].limit)


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


def test_cases_weigh_by_how_sure_they_are() -> None:
    def case(ratio: float, noise: float, processes: int = 2) -> Weighted:
        return ([[1.0]] * processes, [[ratio]] * processes), noise

    deviations = NormalDist().inv_cdf(1 - 0.005 / 2)

    def error(*cases: Weighted) -> float:
        return math.log(mean_beyond(cases, confidence=0.99, comparisons=2)) / deviations

    assert error(case(1.0, 0.05)) == pytest.approx(0.05)
    assert error(case(1.0, 0.05, 8)) == error(*[case(1.0, 0.05)] * 4) == pytest.approx(0.025)
    assert mean_ratio([case(1.2, 0.05), case(1.3, 0.05)]).value == pytest.approx(math.sqrt(1.2 * 1.3))
    assert mean_ratio([case(1.2, 0.01), case(1.3, 0.01, 6)]).value == pytest.approx((1.2 * 1.3**3) ** (1 / 4))
    assert mean_ratio([case(1.2, 0.01), case(1.3, 0.02)]).value == pytest.approx((1.2**4 * 1.3) ** (1 / 5))
    assert mean_ratio([case(1.2, 0.0)] * 3).value == pytest.approx(1.2)


def test_false_alarms_and_what_is_missed_over_all_cases() -> None:
    """Of many runs, five cases in three processes that differ by 5 %: chance passes the limit as rarely as it is to.
    Where they differ by 3 %, 5 % more is found nearly always, and mostly where they differ by 4 %."""
    random = Random(0)

    def share(noise: float, slower: float, runs: int) -> float:
        def side(level: float) -> list[list[float]]:
            return [[level * math.exp(random.gauss(0.0, noise))] for _ in range(3)]

        passed = 0
        for _ in range(runs):
            pairs = [(side(1.0), side(slower)) for _ in range(5)]
            usual = usual_noise(itertools.chain(*pairs))
            cases = [(sides, max(usual, process_noise(sides))) for sides in pairs]
            passed += mean_ratio(cases).value > mean_beyond(cases, confidence=0.99, comparisons=1)
        return passed / runs

    assert share(0.05, 1.0, 1000) <= 0.015
    assert share(0.03, 1.05, 200) >= 0.85
    assert share(0.04, 1.05, 200) >= 0.55


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
    every = tmp_path / "every.json"
    save(before, results(0, cases=8, noise=0.03))
    save(every, results(100, slower=1.05, cases=8, noise=0.03, slowed=8))
    assert main(["compare", str(before), str(every)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if SLOWER in line]
    assert "all 8 cases" in line
    assert "opara" in line
    save(before, results(0, cases=3))
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
