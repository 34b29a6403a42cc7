"""First calls: in processes of their own, on cores of their own, cold and then warm, and the table that pages show."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import first_calls, run
from bench.run import Job
from bench.samples import Row
from bench.starts import Start, compared, load, markdown, rows, save


def given(tmp_path: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    first_calls.add(parser.add_subparsers())
    out = tmp_path / "starts.json"
    return parser.parse_args(["first-calls", "--small", "--dtypes", "float32", "--out", str(out), *more])


def test_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that compiles, one that finds what it left."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    out = tmp_path / "starts.json"
    words = ["first-calls", "--models", "deepfm", "--dtypes", "float32", "--backends", "opara", "--repeats", "1"]
    assert bench.main([*words, "--small", "--out", str(out)]) == 0
    about, (start,) = load(out)
    assert (start.case, start.backend, start.process) == (("deepfm", "float32", 1), "opara", 0)
    assert 0 < start.warm < start.cold
    assert about["cores"] == len(os.sched_getaffinity(0))
    assert str(tmp_path) not in about["command"]


def test_every_case_has_cores_of_its_own_and_every_repeat_caches_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    seen: list[tuple[str, str, frozenset[int]]] = []

    def together(jobs: Sequence[Job], **options: object) -> list[Row]:
        (job,) = jobs
        assert job.caches is not None
        seen.append((job.model, job.caches, frozenset(os.sched_getaffinity(0))))
        return [Row(*job.case, job.backends[0], None, 0.0, 2.0 if job.backends == ("opara",) else 1.0)]

    monkeypatch.setattr(first_calls, "together", together)
    chosen = given(tmp_path, "--models", "deepfm", "dlrm", "--repeats", "3", "--at-once", "2")
    assert first_calls.main(chosen) == 0
    assert os.sched_getaffinity(0) == allowed, "the caller's own are as they were"
    assert {len(cores) for _, _, cores in seen} == {len(allowed) // 2}
    assert len({caches for _, caches, _ in seen}) == len(seen) / 2 == 2 * 2 * 3, "a cold call, then a warm one"
    _, starts = load(tmp_path / "starts.json")
    assert [figures for _, figures in compared(starts, "reduce-overhead", "opara")] == [
        (1.0, 2.0, 2.0, 1.0, 2.0, 2.0)
    ] * 2


def test_a_call_that_fails_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def together(jobs: Sequence[Job], **options: object) -> list[Row]:
        (job,) = jobs
        asked.append(job.backends)
        problem = "wrong: error 1.0" if job.backends == ("opara",) else None
        return [Row(*job.case, job.backends[0], None, 0.0, 1.0, problem=problem)]

    monkeypatch.setattr(first_calls, "together", together)
    assert first_calls.main(given(tmp_path, "--models", "deepfm", "--repeats", "1")) == 1
    assert "not reported: deepfm float32 1 under opara: wrong: error 1.0" in capsys.readouterr().out
    assert [start.backend for start in load(tmp_path / "starts.json")[1]] == ["reduce-overhead"]
    assert asked == [("reduce-overhead",), ("reduce-overhead",), ("opara",)], "and not once more, warm"


def test_a_call_that_never_ends_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_calls, "together", lambda jobs, **options: [])
    (row,) = first_calls.first_calls(Job("deepfm", "float32", 1, ("opara",), caches="c"))
    assert row.problem == "took longer than 1800 s"
    assert row.cold_seconds is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--backends", "eager"], "eager compiles nothing"),
        (["--backends", "none-such"], "unknown backend 'none-such'"),
        (["--at-once", "4096"], "--at-once 4096: this process may use"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_calls.main(given(tmp_path, *words)) == 2
    assert says in capsys.readouterr().out


def test_eager_computes_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries choose kernels for a shape when they first see it: the backend is to pay for it, whichever it is."""
    order: list[str] = []

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append("compiled" if torch.compiler.is_compiling() else "eager")
            return x + 1

    class Chosen:
        kind, compiles, needs_gpu, unfused, name = "opara", True, False, False, "opara"

        def compile(self, model: torch.nn.Module, **options: object) -> object:
            return lambda x: order.append("first call") or x + 1  # type: ignore[func-returns-value]

    monkeypatch.setattr(run, "prepare", lambda job: (Model(), (torch.ones(2),), torch.device("cpu")))
    monkeypatch.setattr(run, "variant", lambda name: Chosen())
    row = run.first_call(Job("deepfm", "float32", 1, ("opara",)))
    assert row.problem is None
    assert order == ["first call"] * run.CALLS + ["eager"]


def test_the_table(tmp_path: Path) -> None:
    path = tmp_path / "starts.json"
    cold = {"reduce-overhead": (10.0, 30.0, 20.0), "opara": (22.0, 21.0, 26.0)}
    starts = [
        Start("googlenet", "float16", 1, backend, process, seconds, seconds / 10)
        for backend, found in cold.items()
        for process, seconds in enumerate(found)
    ]
    alone = Start("only_ours", "float16", 1, "opara", 0, 1.0, 1.0)
    about = {"device": "a GPU", "driver": "1", "torch": "2", "commit": "abc", "command": "python -m bench", "cores": 5}
    save(path, about, [*starts, alone])
    assert markdown(path).splitlines()[2:] == [
        "| googlenet float16, batch 1 | 20.00 | 22.00 | 1.10x | 2.00 | 2.20 | 1.10x |",
        "| geometric mean of 1 |  |  | 1.10x |  |  | 1.10x |",
        "",
        "Medians of 1 to 3, 5 cores each. a GPU, driver 1, torch 2, commit abc: `python -m bench`",
    ]


def test_the_first_backend_is_compared_with_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {"inductor": 2.0, "opara": 3.0, "opara:plain": 5.0}

    def together(jobs: Sequence[Job], **options: object) -> list[Row]:
        (job,) = jobs
        (backend,) = job.backends
        return [Row(*job.case, backend, None, 0.0, seconds[backend])]

    monkeypatch.setattr(first_calls, "together", together)
    assert first_calls.main(given(tmp_path, "--models", "deepfm", "--repeats", "1", "--backends", *seconds)) == 0
    said = capsys.readouterr().out
    assert "deepfm float32 1 under opara:plain: cold 5.00 s, warm 5.00 s" in said
    assert all(
        f"{name}, cold s" in said and ratio in said for name, ratio in (("opara", "1.50x"), ("opara:plain", "2.50x"))
    )
    _, starts = load(tmp_path / "starts.json")
    assert [row[0] for row in rows(starts, "inductor", "opara")] == ["deepfm float32, batch 1", "geometric mean of 1"]


def test_results_of_another_kind_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "starts.json"
    save(path, {}, [])
    assert bench.main(["compare", str(path), str(path)]) == 2
    assert "has schema 'first calls, 1'" in capsys.readouterr().out
