"""Offsets in one arena for buffers of which some may not share bytes.

Takes: sizes, weights and conflicts. Gives: an offset for each buffer, and the size of the arena.
Must not change: anything; knows nothing of kernels. Imports no torch. Sets of buffers are the bits of one int.

Finding the smallest arena is hard (it is 2-D packing with one coordinate given); best fit, tried in a few orders until
it meets a bound that no placement can beat, comes within a few per cent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Offsets = Mapping[str, int]

STARTS = 8  # buffers from which a set that must lie side by side is grown
TRIES = 9  # with each order, the buffer that ended on top of the arena given the first choice in the next
MANY = 160  # buffers above which there are fewer, as the time each takes grows with their square


def place(sizes: Mapping[str, int], areas: Mapping[str, int], conflicts: Mapping[str, int]) -> tuple[Offsets, int]:
    """Offsets and bytes of the smallest arena found; `sizes` in the arena's grain, in bytes.

    areas: how much of memory over time each buffer takes. conflicts: for each buffer, those it may not share with, as
    bits in the order of `sizes`. Tried: largest first, largest area first, then whatever ended on top first.
    """
    index = {name: i for i, name in enumerate(sizes)}
    bound = side_by_side(sizes, conflicts, STARTS)
    tries = max(1, min(TRIES, TRIES * MANY**2 // max(1, len(sizes)) ** 2))
    by_name = sorted(sizes)
    by_size = sorted(by_name, key=lambda n: sizes[n], reverse=True)
    by_area = sorted(by_name, key=lambda n: areas[n], reverse=True)
    tried: list[tuple[Offsets, int]] = []
    for order in (by_size, by_area):
        for _ in range(tries):
            found, arena = _best_fit(order, sizes, conflicts, index)
            if arena <= bound:
                return found, arena
            tried.append((found, arena))
            top = max(order, key=lambda n: (found[n] + sizes[n], n))
            order.remove(top)
            order.insert(0, top)
    return min(tried, key=lambda pair: pair[1])


def side_by_side(sizes: Mapping[str, int], conflicts: Mapping[str, int], starts: int) -> int:
    """Bytes of the heaviest set found of buffers that all conflict with each other: no arena is smaller.

    Grown greedily from each of the `starts` largest buffers.
    """
    names = list(sizes)
    heavy = sorted(range(len(names)), key=lambda i: sizes[names[i]], reverse=True)
    best = 0
    for start in heavy[:starts]:
        together, candidates = sizes[names[start]], conflicts[names[start]] & ~(1 << start)
        for i in heavy:
            if candidates >> i & 1:
                together += sizes[names[i]]
                candidates &= conflicts[names[i]]
        best = max(best, together)
    return best


def _best_fit(
    names: Sequence[str], sizes: Mapping[str, int], conflicts: Mapping[str, int], index: Mapping[str, int]
) -> tuple[Offsets, int]:
    """Each of `names` in turn in the tightest gap that is free for it; offsets, and bytes of the arena."""
    span: dict[int, tuple[int, int]] = {}  # from its offset to behind its end, of each buffer placed
    placed = arena = 0
    for name in names:
        busy = sorted([span[i] for i in members(placed & conflicts[name])])
        offset = _tightest_gap(busy, sizes[name])
        span[index[name]] = offset, offset + sizes[name]
        placed |= 1 << index[name]
        arena = max(arena, offset + sizes[name])
    return {name: span[index[name]][0] for name in names}, arena


def _tightest_gap(busy: Sequence[tuple[int, int]], nbytes: int) -> int:
    """Offset of the smallest free gap of at least `nbytes` between `busy` spans (ascending), else behind them all."""
    tightest, found, end = -1, 0, 0
    for start, stop in busy:
        gap = start - end
        if gap >= nbytes and (tightest < 0 or gap < tightest):
            tightest, found = gap, end
        if stop > end:
            end = stop
    return found if tightest >= 0 else end


def members(bits: int) -> Iterator[int]:
    """The members of a bit set, ascending."""
    digits = bin(bits)[:1:-1]  # the smallest member first, and `find` looks through them in C
    place = digits.find("1")
    while place >= 0:
        yield place
        place = digits.find("1", place + 1)
