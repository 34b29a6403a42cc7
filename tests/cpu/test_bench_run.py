"""The runner, for real on the CPU: interleaved variants, several processes, and what it refuses to report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import workers
from bench.__main__ import main
from bench.first_calls import first_calls
from bench.planted import slowed
from bench.run import Job, _as_close_as_eager, caches, distance, run_job
from bench.samples import Row, Samples, load
from bench.timing import wall_seconds
from bench.variants import Variant, variant
from bench.workers import Worker, WorkerError, failed, measured

JOB = Job("two_tower", "float32", 1, ("eager", "inductor", "opara", "opara:paper-unfused"), rounds=2, small=True)


def test_one_case() -> None:
    rows = {row.backend: row for row in run_job(JOB)}
    assert list(rows) == list(JOB.backends)
    for row in rows.values():
        assert row.samples is not None
        assert row.samples.gpu is None
        assert len(row.samples.wall) == 2
        assert row.error is not None
        assert row.error < 1e-5
    assert rows["opara"].graphs == 1
    assert rows["opara"].search_seconds is None
    assert set(rows["opara"].kinds) - {"extern"}
    assert rows["opara:paper-unfused"].kinds.keys() == {"extern"}
    assert rows["opara:paper-unfused"].policy == "opara/opara"
    assert rows["eager"].kernels == 0


def test_dynamo_alone_runs_no_kernel() -> None:
    """The second call gives back what the first one made, whatever the weights are by then."""
    model = torch.nn.Linear(4, 4)
    compiled, x = variant("dynamo").compile(model), torch.ones(2, 4)
    with torch.no_grad():
        first = compiled(x)
        torch.testing.assert_close(first, model(x))
        model.weight.zero_()
        assert compiled(x) is first


def test_its_time_is_none_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Samples((1.0,), (2.0,), (3.0,))
    monkeypatch.setattr("bench.run.measure", lambda calls, **options: dict.fromkeys(calls, seen))
    rows = {row.backend: row for row in run_job(replace(JOB, backends=("eager", "dynamo")))}
    assert rows["dynamo"].samples == replace(seen, gpu=None)
    assert rows["eager"].samples == seen
    assert rows["dynamo"].error == 0.0


def test_a_planted_slowdown_is_every_backends_but_the_firsts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}

    def slow(call: Callable[[], object], share: float, device: torch.device) -> Callable[[], object]:
        seen[str(len(seen))] = share
        return call

    monkeypatch.setattr("bench.run.slowed", slow)
    run_job(replace(JOB, planted=0.05))
    assert list(seen.values()) == [0.05] * (len(JOB.backends) - 1)


def test_where_eager_is_all_rounding_double_precision_decides() -> None:
    """Parts that cancel: 2048 + 1 is 2048 in float16, so eager's difference is off by all of it."""

    class Cancels(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1) - x

    model, inputs = Cancels(), (torch.full((1,), 2048.0, dtype=torch.float16),)
    eager, exact = [model(*inputs).double()], [torch.ones(1, dtype=torch.float64)]
    assert distance(eager, exact) == 1
    for found, agrees in ((1.0, True), (0.3, True), (-0.5, False), (2.1, False), (float("nan"), False)):
        assert _as_close_as_eager([torch.full((1,), found).double()], eager, model, inputs, 2e-2) is agrees


def test_a_slowed_call_takes_longer_and_returns_the_same() -> None:
    def call() -> str:
        time.sleep(0.002)
        return "found"

    slower = slowed(call, 0.5, torch.device("cpu"))
    assert slower() == "found"
    times = [statistics.median(wall_seconds(c, torch.device("cpu"))) for c in (call, slower)]
    assert times[1] > 1.4 * times[0]


def test_more_variants_than_dynamo_keeps_by_itself() -> None:
    """None of them is compiled again, or left eager, while the others are timed."""
    backends = ("inductor", *(f"opara:streams={n}" for n in range(1, 11)))
    rows = run_job(Job("deepfm", "float32", 1, backends, rounds=1, small=True))
    assert [row.backend for row in rows] == list(backends)
    assert all(row.samples is not None and row.graphs == 1 for row in rows[1:])


def test_a_wrong_result_a_failure_and_a_missing_gpu_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1)

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    fakes = {"inductor": Wrong(), "opara": broken}
    monkeypatch.setattr(Variant, "compile", lambda self, model, **_: fakes.get(self.kind, model))
    path = tmp_path / "r.json"
    words = ["--models", "two_tower", "--small", "--rounds", "1", "--out", str(path)]
    assert main(["run", *words, "--backends", "eager", "inductor", "opara", "cudagraph"]) == 1
    rows = {row.backend: row for row in load(path).rows}
    assert rows["eager"].samples is not None
    assert all(row.samples is None for name, row in rows.items() if name != "eager")
    assert rows["inductor"].problem is not None
    assert rows["inductor"].problem.startswith("wrong: error 1.00e+00 against eager")
    assert rows["opara"].problem == "RuntimeError: no such kernel"
    if not torch.cuda.is_available():
        assert rows["cudagraph"].problem == "needs a GPU"
    assert "not reported: two_tower float32 1 under inductor: wrong" in capsys.readouterr().out


def test_a_backend_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--backends", "opera"]) == 2
    assert "unknown backend 'opera'" in capsys.readouterr().out


def test_several_processes_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    words = ["--models", "two_tower", "--small", "--rounds", "1", "--out", str(path), "--processes", "2"]
    assert main(["run", *words, "--backends", "eager"]) == 0
    results = load(path)
    assert [row.process for row in results.rows] == [0, 1]
    assert str(tmp_path) not in path.read_text()
    assert "procs" in capsys.readouterr().out


def test_a_worker_that_dies_loses_its_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        made = 0

        def __init__(self) -> None:
            Fake.made += 1

        def send(self, job: Job) -> None:
            self.job = job

        def receive(self, timeout: float | None) -> list[Row]:
            if self.job.model == "dies":
                raise WorkerError("the process ended with exit code -9")
            return [Row(*self.job.case, "eager", None, None, None, problem="none")]

        def stop(self) -> None:
            pass

    monkeypatch.setattr(workers, "Worker", Fake)
    jobs = [Job(name, "float32", 1, ("eager",)) for name in ("one", "dies", "two", "three")]
    found = [rows[0] for rows in measured(jobs)]
    assert [row.problem for row in found] == ["none", "the process ended with exit code -9", "none", "none"]
    assert Fake.made == 2


def test_a_worker_that_takes_too_long() -> None:
    with Worker() as worker:
        worker.send(JOB)
        with pytest.raises(WorkerError, match="took longer than 0 s"):
            worker.receive(timeout=0.01)
    assert failed(JOB, "why")[1].problem == "why"


def test_first_calls_are_timed_cold_and_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def together(jobs: list[Job], **options: object) -> list[Row]:
        seen.append((jobs[0].backends, jobs[0].caches))
        return [Row(*jobs[0].case, jobs[0].backends[0], None, 0.0, 10.0 / len(seen))]

    monkeypatch.setattr("bench.first_calls.together", together)
    rows = [*first_calls(Job("m", "float32", 1, ("eager", "inductor", "opara"), caches="c"))]
    assert {row.backend: (row.cold_seconds, row.warm_seconds) for row in rows} == {
        "inductor": (10.0, 5.0),
        "opara": (pytest.approx(10 / 3), pytest.approx(10 / 4)),
    }
    assert len(set(seen)) == 2
    assert seen[0] == seen[1]


def test_stock_and_ours_share_caches_and_other_kernels_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    job = Job("m", "float16", 8, ("opara",), caches="root")
    found = {}
    for name in ("opara", "opara:nimble", "reduce-overhead", "opara:paper-unfused", "opara:max_autotune=True", "eager"):
        with caches(job, variant(name)):
            found[name] = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert found["opara"] == found["opara:nimble"] == found["reduce-overhead"] == "root/m-float16-8"
    assert found["opara:paper-unfused"] == "root/m-float16-8-unfused"
    assert found["opara:max_autotune=True"] == "root/m-float16-8-max_autotune=True"
    assert found["eager"] == os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


def test_distance() -> None:
    one, two = [torch.ones(3)], [torch.ones(3) * 2]
    assert distance(one, one) == 0
    assert distance(two, one) == pytest.approx(1.0)
    assert distance(one, [torch.ones(4)]) == float("inf")


def test_stock_inductor_takes_its_options() -> None:
    model = torch.nn.Linear(8, 8).eval()
    with torch.inference_mode():
        call = variant("inductor:freezing=True,max_fusion_size=4").compile(model)
        torch.testing.assert_close(call(torch.ones(2, 8)), model(torch.ones(2, 8)))
