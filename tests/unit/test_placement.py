"""Offsets for buffers of which some may not share bytes: legal, tight, and no smaller than the bound."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend import placement
from opara_backend.placement import STARTS, TRIES, members, place, side_by_side


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sizes, areas and conflicts of up to ten buffers; some are said to conflict with themselves."""
    count = draw(st.integers(0, 10))
    names = [f"b{i}" for i in range(count)]
    sizes = {name: 512 * draw(st.integers(1, 5)) for name in names}
    areas = {name: sizes[name] * draw(st.integers(1, 9)) for name in names}
    conflicts = dict.fromkeys(names, 0)
    for i, j in itertools.combinations_with_replacement(range(count), 2):
        if draw(st.booleans()):
            conflicts[names[i]] |= 1 << j
            conflicts[names[j]] |= 1 << i
    return sizes, areas, conflicts


def heaviest_together(sizes: dict[str, int], conflicts: dict[str, int]) -> int:
    """Bytes of the heaviest set of buffers that all conflict with each other, by trying all sets."""
    names = list(sizes)
    together = (
        chosen
        for bits in range(1 << len(names))
        if (chosen := list(members(bits))) is not None
        and all(conflicts[names[i]] >> j & 1 for i, j in itertools.combinations(chosen, 2))
    )
    return max(sum(sizes[names[i]] for i in chosen) for chosen in together)


def grown(sizes: dict[str, int], conflicts: dict[str, int], starts: int) -> int:
    """The same, grown from each of the `starts` largest buffers by the largest that conflicts with all chosen."""
    names = list(sizes)
    heavy = sorted(range(len(names)), key=lambda i: -sizes[names[i]])
    best = 0
    for start in heavy[:starts]:
        chosen = [start]
        for i in heavy:
            if i != start and all(conflicts[names[c]] >> i & 1 for c in chosen):
                chosen.append(i)
        best = max(best, sum(sizes[names[i]] for i in chosen))
    return best


@given(problems())
def test_buffers_that_conflict_lie_apart_and_the_arena_ends_with_the_last(
    problem: tuple[dict[str, int], dict[str, int], dict[str, int]],
) -> None:
    sizes, areas, conflicts = problem
    offsets, arena = place(sizes, areas, conflicts)
    assert offsets.keys() == sizes.keys()
    names = list(sizes)
    for i, j in itertools.combinations(range(len(names)), 2):
        if conflicts[names[i]] >> j & 1:
            one, other = sorted((names[i], names[j]), key=lambda n: offsets[n])
            assert offsets[one] + sizes[one] <= offsets[other]
    assert arena == max((offsets[n] + sizes[n] for n in names), default=0)


@given(problems())
def test_the_bound_is_that_of_buffers_that_really_conflict(
    problem: tuple[dict[str, int], dict[str, int], dict[str, int]],
) -> None:
    sizes, areas, conflicts = problem
    for starts in (1, 3, len(sizes)):
        assert side_by_side(sizes, conflicts, starts) == grown(sizes, conflicts, starts)
    best = heaviest_together(sizes, conflicts)
    assert side_by_side(sizes, conflicts, STARTS) <= best <= place(sizes, areas, conflicts)[1]


def tried(sizes: dict[str, int], areas: dict[str, int], conflicts: dict[str, int]) -> list[tuple[dict[str, int], int]]:
    """What comes of each order, with what ended on top first the next time, until the bound is met."""
    bound = grown(sizes, conflicts, STARTS)
    found = []
    for weight in (sizes, areas):
        order = sorted(sizes, key=lambda n: (-weight[n], n))
        for _ in range(TRIES):
            offsets = best_fit(order, sizes, conflicts)
            found.append((offsets, max((offsets[n] + sizes[n] for n in order), default=0)))
            if found[-1][1] <= bound:
                return found
            top = max(order, key=lambda n: (offsets[n] + sizes[n], n))
            order.sort(key=lambda n: n != top)
    return found


@given(problems())
def test_the_smallest_arena_tried_is_kept(problem: tuple[dict[str, int], dict[str, int], dict[str, int]]) -> None:
    assert place(*problem) == min(tried(*problem), key=lambda pair: pair[1])


@pytest.mark.parametrize("seed", range(30))
def test_so_it_is_in_a_crowd(seed: int) -> None:
    """Buffers enough that orders differ, each alive for some time, as in a program."""
    problem = crowd(random.Random(seed), 24)
    assert place(*problem) == min(tried(*problem), key=lambda pair: pair[1])


def crowd(rng: random.Random, count: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sizes, areas and conflicts of buffers of which those alive at one time conflict."""
    names = [f"b{i}" for i in range(count)]
    lives = [sorted(rng.sample(range(2 * count), 2)) for _ in names]
    sizes = {name: 512 * rng.randint(1, 9) for name in names}
    areas = {name: sizes[name] * (end - begin + 1) for name, (begin, end) in zip(names, lives, strict=True)}
    conflicts = dict.fromkeys(names, 0)
    for i, j in itertools.permutations(range(count), 2):
        if lives[i][0] <= lives[j][1] and lives[j][0] <= lives[i][1]:
            conflicts[names[i]] |= 1 << j
    return sizes, areas, conflicts


def ring(count: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Buffers each of which conflicts with its two neighbours: of an odd number, more than two lie side by side."""
    names = [f"b{i}" for i in range(count)]
    conflicts = {name: 1 << (i + 1) % count | 1 << (i - 1) % count for i, name in enumerate(names)}
    return dict.fromkeys(names, 512), dict.fromkeys(names, 512), conflicts


@pytest.mark.parametrize(("count", "expected"), [(3, 1), (5, 2 * TRIES), (7, 2 * TRIES), (9, 10), (19, 2), (23, 2)])
def test_placing_takes_no_more_tries_than_it_says(count: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One if it meets the bound, else as many as the text says; with many buffers fewer, one an order at last."""
    tries = []
    best_fit = placement._best_fit
    monkeypatch.setattr(placement, "_best_fit", lambda *args: tries.append(1) or best_fit(*args))  # type: ignore[func-returns-value]
    monkeypatch.setattr(placement, "MANY", 7)
    sizes, areas, conflicts = ring(count)
    assert place(sizes, areas, conflicts)[1] == 3 * 512
    assert len(tries) == expected


def best_fit(order: list[str], sizes: dict[str, int], conflicts: dict[str, int]) -> dict[str, int]:
    """In turn, each in the smallest gap of 512-byte blocks that is large enough, the lowest of several alike."""
    index = {name: i for i, name in enumerate(sizes)}
    found: dict[str, int] = {}
    for name in order:
        busy: set[int] = set()
        for other, offset in found.items():
            if conflicts[name] >> index[other] & 1:
                busy.update(range(offset // 512, (offset + sizes[other]) // 512))
        behind = max(busy, default=-1) + 1
        gaps = []
        for block in range(behind):
            if block not in busy and (block == 0 or block - 1 in busy):
                gaps.append((next(n for n in range(behind) if block + n in busy), block))
        fitting = [gap for gap in gaps if gap[0] >= sizes[name] // 512]
        found[name] = (min(fitting)[1] if fitting else behind) * 512
    return found
