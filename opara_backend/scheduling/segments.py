"""How torch's caching allocator cuts memory into segments and blocks, on one stream.

Takes: allocations and frees in order. Gives: bytes it has reserved. Must not change: anything. Imports no torch.

As of `c10/cuda/CUDACachingAllocator.cpp` (torch 2.11 to 2.14), its settings left alone: blocks of up to 1 MiB are cut
from segments of 2 MiB, larger ones from segments of 20 MiB, those of 10 MiB and more get a segment of their own. The
smallest free block that is large enough is taken, and cut if more than a sliver is left; neighbours that are free are
one. A segment is never given back while its pool lives.
"""

from __future__ import annotations

from dataclasses import dataclass

GRAIN, SMALL, LARGE = 512, 1 << 20, 10 << 20
_SMALL_SEGMENT, _LARGE_SEGMENT, _ROUND = 2 << 20, 20 << 20, 2 << 20


@dataclass(eq=False)
class Block:
    """A piece of a segment. small: of one for small blocks; before, behind: its neighbours there."""

    nbytes: int
    small: bool
    free: bool = False
    before: Block | None = None
    behind: Block | None = None


def segment_bytes(nbytes: int) -> int:
    """Bytes the allocator reserves for a block of `nbytes` where nothing is cached."""
    nbytes = -(-nbytes // GRAIN) * GRAIN
    if nbytes <= SMALL:
        return _SMALL_SEGMENT if nbytes else 0
    return _LARGE_SEGMENT if nbytes < LARGE else -(-nbytes // _ROUND) * _ROUND


class Pool:
    """What one stream has of a memory pool. reserved: bytes, all segments."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: list[Block] = []

    def allocate(self, nbytes: int) -> Block:
        """A block of at least `nbytes`; nothing is reserved for none."""
        if not nbytes:
            return Block(0, True)
        rounded = -(-nbytes // GRAIN) * GRAIN
        small = rounded <= SMALL
        fits = [block for block in self._free if block.small == small and block.nbytes >= rounded]
        if fits:
            block = min(fits, key=lambda block: block.nbytes)
            self._free.remove(block)
        else:
            block = Block(segment_bytes(rounded), small)
            self.reserved += block.nbytes
        block.free = False
        left = block.nbytes - rounded
        if left >= GRAIN if small else left > SMALL:
            rest = Block(left, small, free=True, before=block, behind=block.behind)
            if rest.behind is not None:
                rest.behind.before = rest
            block.nbytes, block.behind = rounded, rest
            self._free.append(rest)
        return block

    def free(self, block: Block) -> None:
        """Take back a block that `allocate` gave."""
        if not block.nbytes:
            return
        block.free = True
        for first, second in ((block.before, block), (block, block.behind)):
            if first is None or second is None or not (first.free and second.free):
                continue
            other = first if second is block else second
            self._free.remove(other)
            block.nbytes += other.nbytes
            if other is first:
                block.before = other.before
                if block.before is not None:
                    block.before.behind = block
            else:
                block.behind = other.behind
                if block.behind is not None:
                    block.behind.before = block
        self._free.append(block)
