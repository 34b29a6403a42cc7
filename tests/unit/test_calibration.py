"""How prediction and measurement are compared, and how well the simulator does on what was recorded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import calibration, documents
from bench.calibration import TRIED, WIDTH, Calibration, attainable, calibrate, cross_validate, fit, ranks, spearman
from bench.recorded import Measured, Recording, load_all
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.costs import CostModel
from opara_backend.scheduling.policies import build
from opara_backend.scheduling.search import candidates
from opara_backend.scheduling.simulator import simulate
from tests.gpu_profiles import GPU, kernel, tiny_recording
from tests.strategies import graph_with_edges

VALUES = st.lists(st.integers(0, 5).map(float), min_size=2, max_size=8)
TRUTH = CostModel(ramp=1.4e-6, interference=0.5)


def measured_by(costs: CostModel) -> Recording:
    """Forks and joins on one to four streams, measured on a GPU that does as the simulator with `costs` says."""
    graph = graph_with_edges(9, [(0, k) for k in range(1, 8)] + [(k, 8) for k in range(1, 8)])
    profile = Profile(tuple(kernel(1e-6 * (3 + k), 60 + 20 * k, threads=512) for k in range(9)), GPU)
    schedules = [
        build(graph, profile, policy=policy, launch_order=order, streams=streams)
        for policy in ("list_k", "opara")
        for order in ("critical_path", "program")
        for streams in (1, 2, 3, 4)
    ]
    seconds = [round(simulate(graph, profile, schedule, GPU, costs).makespan, 12) for schedule in schedules]
    return Recording(tiny_recording().about, graph, profile, tuple(map(Measured, schedules, seconds)))


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks([30.0, 10.0, 20.0, 20.0]) == [4.0, 1.0, 2.5, 2.5]
    assert ranks([7.0, 7.0, 7.0]) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 200.0, 201.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0], 0.6),  # 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1))
        ([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], 0.9486833),  # by Pearson on 1, 2.5, 2.5, 4 and 1, 2, 3, 4
        ([5.0, 5.0, 5.0], [1.0, 2.0, 3.0], 0.0),
    ],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float) -> None:
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(second, first) == pytest.approx(expected)


@given(VALUES)
def test_a_ranking_agrees_with_itself(values: list[float]) -> None:
    assert spearman(values, [v**3 for v in values]) == pytest.approx(1.0 if len(set(values)) > 1 else 0.0)


def test_what_differs_less_than_the_noise_cannot_be_ranked() -> None:
    assert attainable([1.0, 1.1, 1.2, 1.3]) == 1.0
    assert 0.3 < attainable([1.0 + 0.001 * step for step in range(10)]) < 0.9
    assert attainable([1.0, 1.0]) == 0.0, "equal values have no ranks"


# --- one recording ---------------------------------------------------------------------------------------------------


def test_a_gpu_that_does_as_predicted_is_predicted_perfectly() -> None:
    found = calibrate(measured_by(CostModel()))
    assert (found.schedules, found.spearman, found.error, found.first_choice) == (16, 1.0, 0.0, 1.0)
    assert found.spread > 1.0


def test_what_the_figures_mean() -> None:
    """Two streams are predicted to be faster; measured they take 6 us, one stream takes 3, as predicted."""
    recording = tiny_recording((3e-6, 6e-6))
    predicted = simulate(recording.graph, recording.profile, recording.measured[1].schedule, GPU).makespan
    assert calibrate(recording) == Calibration(
        graph="tiny-float16",
        schedules=2,
        spearman=-1.0 if predicted < 3e-6 else 1.0,
        attainable=1.0,
        error=pytest.approx(abs(predicted / 6e-6 - 1) / 2, abs=1e-4),
        first_choice=2.0 if predicted < 3e-6 else 1.0,
        best_tried=1.0,
        best_picked=1.0,  # one stream; the search picks others beside it
        spread=1.0,
    )


@pytest.mark.parametrize(
    "recording",
    [
        tiny_recording(seconds=(1e-6,)),
        replace(tiny_recording(), profile=replace(tiny_recording().profile, device=None)),
    ],
)
def test_what_cannot_be_calibrated_is_an_error(recording: Recording) -> None:
    with pytest.raises(ValueError, match="tiny-float16: a GPU and two schedules are needed"):
        calibrate(recording)


def test_the_fit_finds_constants_that_rank_better() -> None:
    recordings = [measured_by(TRUTH)]
    start = CostModel(stream_latency=0.0)
    found, score = fit(recordings, start)
    assert score == calibrate(recordings[0], found).spearman > calibrate(recordings[0], start).spearman
    assert fit(recordings, start) == (found, score)
    assert fit(recordings, TRUTH) == (TRUTH, 1.0), "the best constants stay"


def test_a_recording_is_ranked_with_constants_that_only_others_were_fitted_to() -> None:
    found = measured_by(TRUTH)
    true = replace(found, about={**found.about, "model": "true"})
    plain = replace(measured_by(CostModel()), about={**found.about, "model": "plain"})
    assert cross_validate([true, plain], CostModel()) == [
        calibrate(true, fit([plain], CostModel())[0]).spearman,
        calibrate(plain, fit([true], CostModel())[0]).spearman,
    ]
    alone = cross_validate([true, replace(true), plain], CostModel())
    assert alone[0] == alone[1] == calibrate(true, CostModel()).spearman, "nor is its other element type"


def test_the_best_tried_is_the_best_of_one_stream_and_the_best_predicted() -> None:
    recording = measured_by(CostModel())
    seconds = [item.seconds for item in recording.measured]
    last = max(range(len(seconds)), key=lambda i: (recording.measured[i].schedule.streams > 1, seconds[i]))
    altered = list(recording.measured)
    altered[last] = replace(altered[last], seconds=min(seconds) / 2)  # predicted worst and measured best: not tried
    found = calibrate(replace(recording, measured=tuple(altered)))
    assert found.first_choice == found.best_tried == 2.0


def test_the_best_picked_is_the_best_of_what_the_search_would_measure() -> None:
    recording = measured_by(CostModel())
    picked = candidates(recording.graph, recording.profile, count=TRIED, streams=WIDTH)
    assert 1 < len(picked) <= TRIED
    tried = {schedule.launches for schedule in picked}
    other = next(item.schedule for item in recording.measured if item.schedule.launches not in tried)
    measured = [Measured(schedule, 3e-6 + i * 1e-6) for i, schedule in enumerate(picked)]
    renamed = [replace(item, schedule=replace(item.schedule, policy="as recorded")) for item in measured]
    best = Measured(other, 2e-6)
    assert calibrate(replace(recording, measured=(best, *reversed(renamed)))).best_picked == 1.5
    assert calibrate(replace(recording, measured=(best, *renamed[1:]))).best_picked == 2.0, (
        "without what nobody measured"
    )


# --- what was recorded on a GPU --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[Calibration]:
    return [calibrate(recording) for recording in load_all()]


def test_most_graphs_are_ranked_well(found: list[Calibration]) -> None:
    assert sum(row.spearman >= 0.8 for row in found) >= 0.65 * len(found)
    assert sum(row.spearman for row in found) / len(found) >= 0.8
    assert all(row.spearman > 0.3 for row in found)


def test_what_is_ranked_first_is_good_and_the_best_tried_nearly_the_best(found: list[Calibration]) -> None:
    assert all(row.first_choice <= 1.08 for row in found)
    assert sum(row.first_choice for row in found) / len(found) <= 1.015
    assert all(row.best_tried <= 1.03 for row in found)
    assert all(row.best_picked is not None and row.best_picked <= 1.06 for row in found)
    assert all(row.error <= 0.2 for row in found)
    assert sum(row.error for row in found) / len(found) <= 0.085


def test_the_committed_figures_are_these(found: list[Calibration]) -> None:
    committed = documents.read(calibration.RESULT, calibration.SCHEMA)
    assert committed["costs"] == asdict(CostModel()), "renew it with python -m bench.calibration"
    assert committed["rows"] == [asdict(row) for row in found], "renew it with python -m bench.calibration"


def test_the_command_writes_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "load_all", lambda: (measured_by(TRUTH),))
    assert calibration.main(["--json", str(tmp_path / "out.json"), "--fit"]) == 0
    shown = capsys.readouterr().out
    assert "tiny-float16" in shown
    assert "best constants: CostModel(" in shown
    assert "fitted to the other models: mean Spearman" in shown
    assert [row["schedules"] for row in documents.read(tmp_path / "out.json", calibration.SCHEMA)["rows"]] == [16]
