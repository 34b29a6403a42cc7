"""What a search found is kept on disk, whole, and read back only by those it fits."""

from __future__ import annotations

import concurrent.futures
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend import upstream
from opara_backend.execution import winners
from opara_backend.execution.program import Program
from opara_backend.execution.winners import Winner
from opara_backend.kernel_graph import KernelGraph
from opara_backend.options import Options
from opara_backend.profiling.profile import Profile
from opara_backend.scheduling.policies import build
from tests.gpu_profiles import GPU, Scheduled, gpu_schedules, kernel
from tests.strategies import graph_with_edges

FORK = graph_with_edges(4, [(0, 1), (0, 2), (1, 3), (2, 3)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(upstream, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(winners, "current_device_spec", lambda index: GPU)
    return tmp_path


def program(graph: KernelGraph) -> Program:
    return Program(lambda *_: iter(()), graph.to_json())


def winner_of(problem: Scheduled) -> Winner:
    graph, profile, schedule = problem
    other = build(graph, profile, policy="sequential", launch_order="program", streams=1)
    return Winner(profile, schedule, ((other, 2e-4), (schedule, 1e-4)))


@given(gpu_schedules())
def test_what_is_kept_comes_back(tmp_path_factory: pytest.TempPathFactory, problem: Scheduled) -> None:
    path = tmp_path_factory.mktemp("winners") / "opara" / "w.json"
    winner = winner_of(problem)
    winners.keep(path, winner)
    assert winners.find(path, problem[0]) == winner
    assert [p.name for p in path.parent.iterdir()] == ["w.json"]


def test_every_difference_that_counts_has_a_place_of_its_own(folder: Path) -> None:
    larger = replace(FORK, buffers=tuple(replace(b, nbytes=12345) for b in FORK.buffers))
    longer, options = graph_with_edges(5, [(0, 1)]), Options()
    places = [
        winners.place(program(FORK), FORK, (), options),
        winners.place(program(FORK), FORK, (7,), options),
        winners.place(program(FORK), larger, (), options),
        winners.place(program(longer), longer, (), options),
        *(
            winners.place(program(FORK), FORK, (), replace(options, **change))
            for change in ({"policy": "nimble"}, {"streams": 3}, {"candidates": 2}, {"in_place": False})
        ),
    ]
    assert len(set(places)) == len(places)
    assert winners.place(program(FORK), FORK, (), replace(options, copy_outputs=False, annotate=True)) == places[0]
    assert all(p is not None and p.parent == folder / "opara" for p in places)


def test_off_by_option_and_with_inductors_caches(folder: Path) -> None:
    assert winners.place(program(FORK), FORK, (), Options(remember=False)) is None
    assert winners.place(program(FORK), FORK, (), Options(policy="of my own")) is None
    assert winners.place(program(FORK), FORK, (), Options(launch_order="of my own")) is None
    with upstream.inductor_config.patch(force_disable_caches=True):
        assert winners.place(program(FORK), FORK, (), Options()) is None
    winners.keep(None, None)  # type: ignore[arg-type]  # nothing happens
    assert winners.find(None, FORK) is None
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": 0}',
        '{"schema": 1}',
        '{"schema": 1, "profile": 3, "schedule": 4, "tried": []}',
        "\xff",
    ],
)
def test_what_cannot_be_read_is_no_winner(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_bytes(text.encode("latin-1"))
    with caplog.at_level("INFO", logger="opara_backend"):
        assert winners.find(path, FORK) is None
    assert "searching anew" in caplog.text


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("peak_flops", '[["int3",1.0]]'),
        ("duration", "NaN"),
        ("duration", "9" * 5000),
        ("duration", "9" * 400),
        ("duration", "[" * 100_000 + "]" * 100_000),
    ],
    ids=["refused by its class", "no number", "too many digits", "too large", "too deep"],
)
def test_nothing_that_a_file_may_hold_is_an_error(tmp_path: Path, figure: str, value: str) -> None:
    """It would be taken for a failed capture, in every process, as long as the file is there."""
    path = tmp_path / "w.json"
    profile = Profile(tuple(kernel(1e-6, 20) for _ in range(len(FORK))), GPU)
    winners.keep(path, Winner(profile, build(FORK, profile, policy="opara", launch_order="opara", streams=4)))
    text, number = re.subn(
        rf'"{figure}":(\[\[.*?\]\]|[^,]+)', lambda _: f'"{figure}":{value}', path.read_text(), count=1
    )
    assert number == 1
    path.write_text(text)
    assert winners.find(path, FORK) is None


def test_what_was_tried_is_verified_too(tmp_path: Path) -> None:
    profile = Profile(tuple(kernel(1e-6, 20) for _ in range(len(FORK))), GPU)
    schedule = build(FORK, profile, policy="opara", launch_order="opara", streams=4)
    broken = replace(schedule, waits=((),) * len(FORK))
    winners.keep(tmp_path / "w.json", Winner(profile, schedule, ((broken, 1e-4), (schedule, 2e-4))))
    found = winners.find(tmp_path / "w.json", FORK)
    assert found is not None
    assert found.tried == ((schedule, 2e-4),)


@given(gpu_schedules(), st.integers(1, 3))
def test_a_winner_of_another_graph_is_none(
    tmp_path_factory: pytest.TempPathFactory, problem: Scheduled, more: int
) -> None:
    path = tmp_path_factory.mktemp("winners") / "w.json"
    winners.keep(path, winner_of(problem))
    assert winners.find(path, graph_with_edges(len(problem[0]) + more, [])) is None


def test_where_nothing_can_be_written_nothing_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "opara").write_text("a file where the folder should be")
    with caplog.at_level("INFO", logger="opara_backend"):
        winners.keep(tmp_path / "opara" / "w.json", Winner(*_small()))
    assert "not remembered" in caplog.text


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    winner = Winner(*_small())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        seen = [pool.submit(lambda: (winners.keep(path, winner), winners.find(path, FORK))[1]) for _ in range(64)]
    assert all(future.result() == winner for future in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["w.json"]


def _small() -> tuple[object, object]:
    from opara_backend.profiling.profile import Profile
    from tests.gpu_profiles import kernel

    profile = Profile(tuple(kernel(1e-6, 10) for _ in range(4)), GPU)
    return profile, build(FORK, profile, policy="opara", launch_order="opara", streams=4)
