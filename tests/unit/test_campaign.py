"""The full run: what comes first, what is compiled once, how many at once, and that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import campaign, models, precompile
from bench.__main__ import main
from bench.campaign import (
    MOST_PREPARING,
    PAPER_MODELS,
    PLAIN_IN_A_ROW,
    backends_of,
    missing,
    plan,
    preparing,
    visible_gpus,
)
from bench.kept import Kept
from bench.precompile import MOST_THREADS, compiled, largest_first, program, programs, size, surroundings, threads
from bench.run import Job
from bench.samples import LEAN, Row, Samples, load
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
    without_gpu = {backend for job in FULL for backend in backends_of(job.model, job.batch, on_gpu=False)}
    for backend in without_gpu | {backend for job in FULL for backend in job.backends}:
        assert variant(backend).name == backend
    assert "cudagraph" in backends_of(PAPER_MODELS[0], 1, on_gpu=True)
    assert "cudagraph" not in backends_of("resnet50", 1, on_gpu=True)
    assert [batch for batch in (1, 8, 32) if "dynamo" in backends_of("resnet50", batch, on_gpu=True)] == [1]
    assert [batch for batch in (1, 8, 32) if LEAN in backends_of("resnet50", batch, on_gpu=True)] == [1, 8]


def test_policies_of_the_same_kernels_are_compiled_once() -> None:
    made = programs([job for job in FULL if job.case == ("googlenet", "float16", 1)])
    assert [job.backends for job in made] == [
        ("reduce-overhead",),
        ("opara:sequential",),
        (PLAIN_IN_A_ROW,),
        ("opara:sequential-unfused",),
    ]


def test_a_pass_is_measured_batch_by_batch_and_of_each_the_largest_first() -> None:
    """Or the last cases of a pass are those that take minutes, each alone."""
    jobs = largest_first(FULL)
    assert sorted(map(repr, jobs)) == sorted(map(repr, FULL))
    others = [(job.process, job.batch) for job in jobs if job.model != "nasnet_large"]
    assert others == sorted(others)
    sizes = [[size(job.model) for job in jobs if (job.process, job.batch) == part] for part in dict.fromkeys(others)]
    assert all(found == sorted(found, reverse=True) for found in sizes)


def test_what_takes_minutes_to_trace_begins_at_once_in_every_process() -> None:
    """Else the second and third would not be done before time is up."""
    for batch in (1, 8):
        jobs = [job for job in largest_first(FULL) if job.batch == batch]
        assert {(job.model, job.process) for job in jobs[:6]} == {("nasnet_large", process) for process in range(3)}
    later = largest_first(job for job in FULL if job.process > 0)
    assert {(job.model, job.process) for job in later[:4]} == {("nasnet_large", 1), ("nasnet_large", 2)}


def test_the_largest_programs_come_first_and_with_more_threads() -> None:
    jobs = largest_first(programs(FULL))
    assert {job.model for job in jobs[:6]} == {"nasnet_large"}
    assert [job.batch for job in jobs] == sorted(job.batch for job in jobs)
    assert sorted(map(program, jobs)) == sorted(map(program, programs(FULL)))
    environment = surroundings(jobs, ("0", "1"), 31)
    given = [environment(job, len(jobs) - place) for place, job in enumerate(jobs)]
    count = [int(one["TORCHINDUCTOR_COMPILE_THREADS"]) for one in given]
    assert count[0] == MOST_THREADS
    assert count[len(count) // 2] == 1
    assert count[-1] == MOST_THREADS  # the last one has the machine to itself
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given[:3]] == ["0", "1", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in surroundings(jobs, (None,), 1)(jobs[0], 1)
    assert [threads(150, 150.0, left, 31) for left in (100, 15, 8, 1)] == [1, 2, 3, MOST_THREADS]


def test_a_case_is_measured_once_all_its_programs_are_there() -> None:
    job = plan(("googlenet",), ("float16",), (1,), 1, 1)[0]
    needed = [program(own) for own in programs([job])]
    assert len(needed) == 4
    assert compiled(job, set(needed))
    assert not any(compiled(job, set(needed) - {one}) for one in needed)


def test_how_many_prepare_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preparing(None, gpus=2, cores=32) == MOST_PREPARING == 14
    assert preparing(None, gpus=4, cores=64) == 10, "of three others, half the cores"
    assert preparing(None, gpus=1, cores=8) == 4
    assert preparing(None, gpus=1, cores=64) == MOST_PREPARING
    assert preparing(None, gpus=4, cores=4) == 1
    assert preparing(3, gpus=1, cores=2) == 3
    assert preparing(3, gpus=0, cores=32) == 1  # the processor is what is measured
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5c2e")
    assert visible_gpus() == ("3", "GPU-5c2e")


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

    def in_turns(jobs: list[Job], **options: Any) -> Iterator[list[Row]]:
        for job in jobs[: 2 if "stop" in asked else None]:
            asked.append(f"measure {job.model} {job.process}")
            yield [Row(*job.case, b, ONE, 0.0, None, process=job.process) for b in job.backends]

    monkeypatch.setattr(precompile, "together", together)
    monkeypatch.setattr(campaign, "in_turns", in_turns)
    return asked


def test_it_compiles_first_stops_and_goes_on(fakes: list[str], tmp_path: Path) -> None:
    command = ["campaign", "--out", str(tmp_path), *SMALL]
    fakes.append("stop")
    assert main(command) == 3
    measures = [text for text in fakes if text.startswith("measure")]
    assert measures == ["measure two_tower 0", "measure deepfm 0"]
    assert fakes.index(measures[0]) == 1 + sum(text.startswith("compile") for text in fakes)
    fakes.clear()
    assert main(command) == 0
    assert fakes == ["measure two_tower 1", "measure deepfm 1"]  # compiled is compiled
    results = load(tmp_path / "results.json")
    assert len(results.cases()) == 2
    assert {row.process for row in results.rows} == {0, 1}
    assert str(tmp_path) not in str(results.about["command"])


def test_it_goes_on_from_results_where_the_folder_is_gone(
    fakes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.append("stop")
    assert main(["campaign", "--out", str(tmp_path / "gone"), "--commit", "abc1234", *SMALL]) == 3
    fakes.clear()
    results = str(tmp_path / "gone" / "results.json")
    command = ["campaign", "--out", str(tmp_path / "new"), "--go-on", results, *SMALL]
    assert main([*command, "--commit", "def5678"]) == 2
    assert "its commit is abc1234, here it is def5678" in capsys.readouterr().out
    assert fakes == []
    for expected in (["measure two_tower 1", "measure deepfm 1"], []):
        fakes.clear()
        assert main([*command, "--commit", "abc1234"]) == 0
        assert [text for text in fakes if text.startswith("measure")] == expected
    whole = load(tmp_path / "new" / "results.json")
    assert sorted({(row.model, row.process) for row in whole.rows}) == [
        (model, process) for model in ("deepfm", "two_tower") for process in (0, 1)
    ]
    assert len(whole.rows) == 2 * len(load(tmp_path / "gone" / "results.json").rows)
    assert "go-on" not in str(whole.about["command"])


def test_what_was_not_compiled_in_time_is_left_for_the_next_run(
    fakes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = precompile.together

    def cut_off(jobs: list[Job], **options: Any) -> Iterator[Row]:
        yield from whole([job for job in jobs if job.model != "deepfm"], **options)

    command = ["campaign", "--out", str(tmp_path), *SMALL]
    with monkeypatch.context() as patched:
        patched.setattr(precompile, "together", cut_off)
        assert main(command) == 3
    assert "2 are not compiled yet" in capsys.readouterr().out
    assert {text for text in fakes if "deepfm" in text} == set()
    assert main(command) == 0
    assert [text for text in fakes if text.startswith("measure deepfm")] == ["measure deepfm 0", "measure deepfm 1"]
    assert [case[0] for case in load(tmp_path / "results.json").cases()] == ["deepfm", "two_tower"]


def test_what_could_not_be_reported_is_said(
    fakes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(jobs: list[Job], **options: Any) -> Iterator[list[Row]]:
        for job in jobs:
            yield [Row(*job.case, "opara", None, 1.0, 1.0, process=job.process, problem="wrong: error 1")]

    monkeypatch.setattr(campaign, "in_turns", failing)
    assert main(["campaign", "--out", str(tmp_path), *SMALL]) == 1
    assert "not reported: deepfm float32 1 under opara: wrong: error 1" in capsys.readouterr().out
