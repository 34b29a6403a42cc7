"""Blocks and segments as torch's allocator cuts them; tests/gpu/test_reserved.py holds this to the allocator itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.scheduling.segments import GRAIN, SMALL, Block, Pool, one_segment, segment_bytes

MIB = 1 << 20
SIZES = st.one_of(st.integers(0, 4096), st.integers(1, 3 * MIB), st.integers(1, 40 * MIB))


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        *((0, 0), (1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - GRAIN, 20), (10 * MIB - 1, 10)),
        *((10 * MIB, 10), (32 * MIB, 32), (32 * MIB + 1, 34)),
    ],
)
def test_what_the_allocator_reserves_for_a_block(nbytes: int, reserved: int) -> None:
    """reserved: MiB."""
    assert segment_bytes(nbytes) == reserved * MIB
    pool = Pool()
    pool.allocate(nbytes)
    assert pool.reserved == reserved * MIB


def test_a_freed_block_serves_the_next_and_is_cut_for_less() -> None:
    pool = Pool()
    pool.free(pool.allocate(9 * MIB))
    first, second = pool.allocate(8 * MIB), pool.allocate(8 * MIB)
    assert pool.reserved == 20 * MIB
    pool.free(first)
    pool.free(second)
    pool.allocate(20 * MIB)
    assert pool.reserved == 20 * MIB, "neighbours that are free are one block"


def test_small_blocks_and_large_ones_have_segments_of_their_own() -> None:
    pool = Pool()
    pool.free(pool.allocate(19 * MIB))
    pool.allocate(1000)
    assert pool.reserved == 22 * MIB


def test_a_sliver_stays_with_its_block() -> None:
    """Of a large segment no piece up to 1 MiB is cut, which only small blocks could use."""
    pool = Pool()
    pool.free(pool.allocate(11 * MIB))
    assert pool.reserved == 12 * MIB
    pool.allocate(11 * MIB + 1)
    assert pool.reserved == 12 * MIB
    pool.allocate(GRAIN * 2 + SMALL)
    assert pool.reserved == 32 * MIB


def test_what_is_there_first_serves_all_and_tells_how_much_of_it_they_take() -> None:
    """7 MiB, and 3 behind it; then 5 where the 7 were, 4 behind the 3, and 2 behind the 5."""
    pool = Pool(40 * MIB)
    assert (pool.reserved, pool.peak) == (40 * MIB, 0)
    first, _ = pool.allocate(7 * MIB), pool.allocate(3 * MIB)
    assert pool.peak == 10 * MIB
    pool.free(first)
    pool.allocate(5 * MIB)
    assert pool.peak == 10 * MIB
    pool.allocate(4 * MIB)
    pool.allocate(2 * MIB)
    assert (pool.reserved, pool.peak) == (40 * MIB, 14 * MIB)
    pool.allocate(1000)
    assert (pool.reserved, pool.peak) == (42 * MIB, 14 * MIB), "small ones have their own"
    assert pool.copy().peak == 14 * MIB
    assert one_segment(pool.peak) == 14 * MIB
    assert one_segment(1) == segment_bytes(10 * MIB)


@given(st.lists(st.tuples(st.integers(0, 5), SIZES), max_size=40))
def test_no_more_is_reserved_than_ever_asked_for_apart_nor_less_than_is_held(steps: list[tuple[int, int]]) -> None:
    """Each step frees one of the blocks held, or allocates another."""
    pool = Pool()
    held: list[tuple[Block, int]] = []
    apart = most = 0
    for which, nbytes in steps:
        if which < len(held):
            pool.free(held.pop(which)[0])
        else:
            block = pool.allocate(nbytes)
            assert block.nbytes >= nbytes
            assert not block.free
            held.append((block, nbytes))
            apart += segment_bytes(nbytes)
        most = max(most, sum(asked for _, asked in held))
        assert most <= pool.reserved <= apart
    for block, _ in held:
        pool.free(block)
    before = pool.reserved
    twin = pool.copy()
    assert all(pool.allocate(segment).nbytes == segment for segment in _segments(pool))
    assert pool.reserved == before, "all that was cut is whole again"
    assert [twin.allocate(segment).nbytes for segment in _segments(pool)] == _segments(pool), "a copy has its own"
    assert twin.reserved == before


def _segments(pool: Pool) -> list[int]:
    return sorted((sum(b.nbytes for b in s.blocks) for s in pool._segments if not s.small), reverse=True)
