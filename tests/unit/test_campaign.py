"""The full run's plan: what comes first, what is compiled once, and that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import campaign, models
from bench.__main__ import main
from bench.campaign import PAPER_MODELS, Kept, backends_of, missing, plan, programs
from bench.run import Job
from bench.samples import Row, Samples, load
from bench.variants import variant

FULL = plan(models.names(), ("float16", "float32"), (1, 8, 32), 3, 7)
ONE = Samples((1.0,), (1.0,), (1.0,))
SMALL = ["--models", "two_tower", "deepfm", "--dtypes", "float32", "--batches", "1", "--processes", "2", "--small"]


def test_every_case_once_a_process_and_the_interesting_first() -> None:
    keys = [(*job.case, job.process) for job in FULL]
    assert len(set(keys)) == len(keys)
    assert {job.model for job in FULL} == set(models.names())
    order = [(job.process, job.batch, job.dtype) for job in FULL]
    assert order == sorted(order, key=lambda key: (key[0], key[1], key[2] != "float16"))
    assert {job.batch for job in FULL if job.model == "nasnet_large"} == {1, 8}


def test_every_backend_is_known() -> None:
    for job in FULL:
        for backend in (*job.backends, *backends_of(job.model, job.batch, on_gpu=False)):
            assert variant(backend).name == backend
    assert "cudagraph" in backends_of(PAPER_MODELS[0], 1, on_gpu=True)
    assert "cudagraph" not in backends_of("resnet50", 1, on_gpu=True)


def test_policies_of_the_same_kernels_are_compiled_once() -> None:
    made = programs([job for job in FULL if job.case == ("googlenet", "float16", 1)])
    assert [job.backends for job in made] == [
        ("reduce-overhead",),
        ("opara:sequential",),
        ("opara:sequential-unfused",),
    ]


def test_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    jobs = plan(("two_tower",), ("float32",), (1,), 2, 1)
    kept = Kept(tmp_path)
    kept.add(
        [Row(*jobs[0].case, "opara", ONE, 0.0, 1.0), Row(*jobs[0].case, "eager", None, None, None, problem="none")]
    )
    with kept.path.open("a") as file:
        file.write('{"model": "half a li')
    again = Kept(tmp_path)
    assert again.rows == kept.rows
    assert missing(jobs, again.rows) == jobs[1:]
    again.add([Row(*jobs[1].case, "opara", ONE, 0.0, 1.0, process=1)])
    assert missing(jobs, Kept(tmp_path).rows) == []
    again.drop_problems()
    assert missing(jobs, Kept(tmp_path).rows) == jobs[:1]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers that do nothing; what they were asked for."""
    asked: list[str] = []

    def together(jobs: list[Job], **options: Any) -> Iterator[Row]:
        for job in jobs:
            asked.append(f"compile {job.model} {job.backends[0]}")
            yield Row(*job.case, job.backends[0], None, 0.0, 1.0)

    def measured(jobs: list[Job], **options: Any) -> Iterator[list[Row]]:
        for job in jobs[: 1 if "stop" in asked else None]:
            asked.append(f"measure {job.model} {job.process}")
            yield [Row(*job.case, b, ONE, 0.0, 1.0, process=job.process) for b in job.backends]

    monkeypatch.setattr(campaign, "together", together)
    monkeypatch.setattr(campaign, "measured", measured)
    return asked


def test_it_compiles_first_stops_and_goes_on(fakes: list[str], tmp_path: Path) -> None:
    command = ["campaign", "--out", str(tmp_path), *SMALL]
    fakes.append("stop")
    assert main(command) == 3
    measures = [text for text in fakes if text.startswith("measure")]
    assert measures == ["measure two_tower 0", "measure two_tower 1"]
    assert fakes.index(measures[0]) == 1 + sum(text.startswith("compile") for text in fakes)
    fakes.clear()
    assert main(command) == 0
    assert fakes == ["measure deepfm 0", "measure deepfm 1"]  # compiled is compiled
    results = load(tmp_path / "results.json")
    assert len(results.cases()) == 2
    assert {row.process for row in results.rows} == {0, 1}
    assert str(tmp_path) not in str(results.about["command"])


def test_what_could_not_be_reported_is_said(
    fakes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(jobs: list[Job], **options: Any) -> Iterator[list[Row]]:
        for job in jobs:
            yield [Row(*job.case, "opara", None, 1.0, 1.0, process=job.process, problem="wrong: error 1")]

    monkeypatch.setattr(campaign, "measured", failing)
    assert main(["campaign", "--out", str(tmp_path), *SMALL]) == 1
    assert "not reported: deepfm float32 1 under opara: wrong: error 1" in capsys.readouterr().out
