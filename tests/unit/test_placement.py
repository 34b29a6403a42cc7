"""Offsets for buffers of which some may not share bytes: legal, tight, and no smaller than the bound."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from opara_backend.placement import PROMOTIONS, STARTS, members, place, side_by_side


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sizes, areas and conflicts of up to ten buffers."""
    count = draw(st.integers(0, 10))
    names = [f"b{i}" for i in range(count)]
    sizes = {name: 512 * draw(st.integers(1, 5)) for name in names}
    areas = {name: sizes[name] * draw(st.integers(1, 9)) for name in names}
    conflicts = dict.fromkeys(names, 0)
    for i, j in itertools.combinations(range(count), 2):
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


@given(problems())
def test_nothing_tried_is_smaller_than_what_is_kept(
    problem: tuple[dict[str, int], dict[str, int], dict[str, int]],
) -> None:
    """Each order is tried with what ended on top first, as often as it says, unless the bound is met."""
    sizes, areas, conflicts = problem
    _, arena = place(sizes, areas, conflicts)
    found = []
    for weight in (sizes, areas):
        order = sorted(sizes, key=lambda n: (-weight[n], n))
        for _ in range(1 + PROMOTIONS):
            offsets = best_fit(order, sizes, conflicts)
            found.append(max((offsets[n] + sizes[n] for n in order), default=0))
            top = max(order, key=lambda n: (offsets[n] + sizes[n], n), default="")
            order.sort(key=lambda n: n != top)
    assert arena == min(found)


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
