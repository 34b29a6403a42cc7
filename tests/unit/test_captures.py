"""Which captures are kept: the most recently used of those somebody can still call, never more than the limit."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.execution import captures
from opara_backend.execution.captures import Captures


@dataclass(eq=False)
class Fake:
    """A capture that reads its parameter at `address`, which is in `freed` once it is gone."""

    address: int
    freed: set[int]
    resets: int = field(default=0)

    def accepts(self, args: tuple[int, ...]) -> bool:
        return args[0] == self.address

    def expired(self) -> bool:
        return self.address in self.freed

    def reset(self) -> None:
        self.resets += 1


def serve(kept: Captures, key: tuple[int, ...], address: int, freed: set[int]) -> Fake:
    """One call, as the lane makes it; returns the capture that served it or was made after it."""
    found = kept.find(key, (address,))
    if found is None:
        kept.give_up_expired()
        kept.make_room()
        found = Fake(address, freed)
        kept.add(key, found)
    return found


calls = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from(["call", "free"])), max_size=60)


@given(calls, st.integers(1, 5))
def test_kept_are_the_last_used_that_can_be_called(history: list[tuple[int, int, str]], limit: int) -> None:
    kept, freed, made = Captures(limit, lambda key: None), set(), []
    order: list[Fake] = []  # least recently used first
    for key, address, what in history:
        if what == "free":
            freed.add(address)
            continue
        freed.discard(address)  # the allocator gave it out again: to the capture it is the same tensor
        found = serve(kept, (key,), address, freed)
        if found in order:
            order.remove(found)
        else:
            made.append(found)
            order = [f for f in order if f.address not in freed]
            order = order[max(0, len(order) - (limit - 1)) :]
        order.append(found)
        assert set(map(id, kept)) == set(map(id, order))
        assert len(kept) == len(order) <= limit
    assert all(f.resets == (f not in order) for f in made), "given up once, or still there"
    kept.clear()
    assert not len(kept)
    assert all(f.resets == 1 for f in made)


def test_two_owners_of_one_shape_both_stay() -> None:
    kept, freed = Captures(4, lambda key: None), set()
    one, two = serve(kept, (), 1, freed), serve(kept, (), 2, freed)
    for _ in range(10):
        assert serve(kept, (), 1, freed) is one
        assert serve(kept, (), 2, freed) is two
    assert len(kept) == 2


def test_a_shape_is_forgotten_with_its_last_capture() -> None:
    forgotten: list[tuple[int, ...]] = []
    kept, freed = Captures(2, forgotten.append), set()
    serve(kept, (1,), 1, freed)
    serve(kept, (1,), 2, freed)
    serve(kept, (2,), 1, freed)
    assert forgotten == []
    serve(kept, (3,), 1, freed)
    assert forgotten == [(1,)]


@pytest.mark.parametrize("limit", [1, 4])
def test_captures_beyond_the_allowance_are_earned_by_replays(limit: int) -> None:
    kept, freed, address = Captures(limit, lambda key: None), set(), 0
    while kept.may_make_another():
        freed.add(address)
        address += 1
        serve(kept, (), address, freed)
        assert address <= captures.CAPTURES_PER_SLOT * limit + 1, "there is no end"
    assert address == captures.CAPTURES_PER_SLOT * limit
    for _ in range(captures.REPLAYS_PER_CAPTURE):
        serve(kept, (), address, freed)
    assert kept.may_make_another()
