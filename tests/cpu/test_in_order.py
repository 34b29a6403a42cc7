"""Planned programs on the CPU: which shapes are planned, and how much memory stays between calls."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opara_backend.execution import runtime as runtimes
from opara_backend.execution import sightings
from opara_backend.execution.in_order import Spare
from opara_backend.execution.sightings import Sightings
from opara_backend.report.record import collect
from tests.arguments import normal


def function(x: Tensor) -> Tensor:
    for _ in range(3):
        x = (x @ x.T).softmax(1) @ x
    return x.sum(0)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Each piece of memory that an arena was made of."""
    found: list[weakref.ref[Tensor]] = []
    take = Spare.take

    def watched(spare: Spare, nbytes: int) -> Tensor:
        piece = take(spare, nbytes)
        found.append(weakref.ref(piece))
        return piece

    monkeypatch.setattr(Spare, "take", watched)
    return found


def alive(pieces: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return list({id(piece): piece for ref in pieces if (piece := ref()) is not None}.values())


@pytest.mark.parametrize("threads", [1, 4])
def test_one_arena_stays_however_many_shapes_and_callers_there_are(
    pieces: list[weakref.ref[Tensor]], threads: int
) -> None:
    rows = range(2, 14)
    call = torch.compile(function, backend="opara", dynamic=True)
    together = threading.Barrier(threads)

    def serve(seed: int) -> None:
        together.wait()
        with torch.no_grad():
            for n in [*rows] * 3:
                x = normal(seed * 100 + n, n, 16)
                torch.testing.assert_close(call(x), function(x))

    with torch.no_grad(), collect() as records:
        call(normal(0, 5, 16))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(serve, range(threads)))
    assert len(records[0].plans) == len(rows)
    assert len(pieces) >= len(rows)
    (kept,) = alive(pieces)
    assert kept.numel() <= max(plan.memory.arena_bytes for plan, _ in records[0].plans.values())


def test_one_caller_soon_works_in_memory_that_was_there(pieces: list[weakref.ref[Tensor]]) -> None:
    call = torch.compile(function, backend="opara", dynamic=True)
    with torch.no_grad():
        for n in (4, 4, 4, 9, 9, 9, 6, 6, 6):
            call(normal(n, n, 16))
        (kept,) = alive(pieces)
        for n in (6, 4, 9, 4):
            call(normal(n, n, 16))
    assert alive(pieces) == [kept]
    assert len(pieces) == 3 + 4, "the second call of a shape plans it, and runs as the first did"


def test_an_arena_in_use_when_a_call_fails_goes_with_it(
    pieces: list[weakref.ref[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = False

    @torch.library.custom_op("opara_tests::perhaps", mutates_args=())
    def perhaps(x: Tensor) -> Tensor:
        if refuse:
            raise ArithmeticError("refused")
        return x.clone()

    @perhaps.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def fallible(x: Tensor) -> Tensor:
        return perhaps((x @ x).sin()) @ x @ x

    call, x = torch.compile(fallible, backend="opara", fullgraph=True), normal(0, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            expected = call(x)
        refuse = True
        with pytest.raises(ArithmeticError, match="refused"):
            call(x)
        refuse = False
        torch.testing.assert_close(call(x), expected)
    assert len(alive(pieces)) == 1


def test_a_shape_is_planned_when_it_comes_back_and_then_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "PLANS_KEPT", 3)
    call = torch.compile(function, backend="opara", dynamic=True)
    with torch.no_grad(), collect() as records:
        for n in range(2, 8):
            call(normal(n, n, 16))
        assert not records[0].plans, "none has come back"
        for _ in range(3):
            for n in range(2, 8):
                x = normal(n, n, 16)
                torch.testing.assert_close(call(x), function(x))
            assert len(records[0].plans) == 3, "others run as they are, and displace none"
        first = dict(records[0].plans)
        call(normal(9, 9, 16))
    assert records[0].plans == first
    assert records[0].other_calls == 6 + 18 + 1


def test_a_static_graph_is_planned_by_its_first_call() -> None:
    with torch.no_grad(), collect() as records:
        torch.compile(function, backend="opara")(normal(0, 4, 16))
    assert len(records[0].plans) == 1


@given(st.lists(st.integers(0, 8), max_size=60))
def test_only_what_came_back_within_what_is_remembered_was_seen(keys: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sightings, "SIGHTINGS_KEPT", 4)
        seen, last = Sightings(), list[int]()
        for key in keys:
            assert seen((key,)) == (key in last[-4:])
            last = [other for other in last if other != key] + [key]
    assert Sightings()(()), "a graph of one shape need not come back"


def test_spare_memory_is_one_piece() -> None:
    spare = Spare()
    first, second = spare.take(100), spare.take(200)
    assert first.data_ptr() != second.data_ptr(), "callers side by side have one each"
    spare.give(second)
    spare.give(first)
    gone = weakref.ref(second)
    del second
    assert gone() is None
    address = first.data_ptr()
    small = weakref.ref(first)
    del first
    assert spare.take(50).data_ptr() == address
    assert small() is None, "it was not given back"
    spare.give(spare.take(100))
    assert spare.take(1000).numel() == 1000
