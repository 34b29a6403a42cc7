"""How torch's caching allocator cuts memory into segments and blocks, on one stream.

Takes: allocations and frees in order. Gives: bytes it has reserved. Must not change: anything. Imports no torch.

As of `c10/cuda/CUDACachingAllocator.cpp` (torch 2.11 to 2.14), its settings left alone. The smallest free block that is
large enough is taken, and cut if more than a sliver is left; neighbours that are free are one. Where there is none, a
segment is reserved: 2 MiB for a block of up to 1 MiB, 20 MiB for one below 10, else what it takes itself. Small blocks
and large ones are never of one segment. A segment is never given back while its pool lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

GRAIN, SMALL, LARGE = 512, 1 << 20, 10 << 20
_SMALL_SEGMENT, _LARGE_SEGMENT, _ROUND = 2 << 20, 20 << 20, 2 << 20


@dataclass(eq=False)
class Segment:
    """Blocks side by side. small: True if it is for small ones."""

    small: bool
    blocks: list[Block] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    """A piece of a segment: its bytes, and whether it is free."""

    nbytes: int
    segment: Segment
    free: bool = True


def one_segment(nbytes: int) -> int:
    """Bytes of the smallest segment of at least `nbytes` that the allocator cuts no larger than it is asked to."""
    return segment_bytes(max(nbytes, LARGE))


def segment_bytes(nbytes: int) -> int:
    """Bytes the allocator reserves for a block of `nbytes` where nothing is cached."""
    nbytes = -(-nbytes // GRAIN) * GRAIN
    if nbytes <= SMALL:
        return _SMALL_SEGMENT if nbytes else 0
    return _LARGE_SEGMENT if nbytes < LARGE else -(-nbytes // _ROUND) * _ROUND


class Pool:
    """What one stream has of a memory pool.

    first: bytes of a segment for large blocks that is there from the beginning, as if somebody had allocated and freed
    so much. peak: how many of them have been in use at most, counted from its beginning.
    """

    def __init__(self, first: int = 0) -> None:
        self._segments: list[Segment] = []
        self.peak = 0
        if first:
            self.free(self.allocate(first))
            self.peak = 0

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(block.nbytes for segment in self._segments for block in segment.blocks)

    def copy(self) -> Pool:
        """Another that is the same from here on; blocks in use stay so there."""
        made = Pool()
        made.peak = self.peak
        for segment in self._segments:
            alike = Segment(segment.small)
            alike.blocks += [Block(block.nbytes, alike, block.free) for block in segment.blocks]
            made._segments.append(alike)
        return made

    def allocate(self, nbytes: int) -> Block:
        """A block of at least `nbytes`; nothing is reserved for none."""
        if not nbytes:
            return Block(0, Segment(True), False)
        rounded = -(-nbytes // GRAIN) * GRAIN
        small = rounded <= SMALL
        number, place, least = -1, 0, math.inf
        for n, segment in enumerate(self._segments):
            if segment.small == small:
                for at, block in enumerate(segment.blocks):
                    if block.free and rounded <= block.nbytes < least:
                        number, place, least = n, at, block.nbytes
        if number < 0:
            self._segments.append(made := Segment(small))
            made.blocks.append(Block(segment_bytes(rounded), made))
        segment = self._segments[number]
        block = segment.blocks[place]
        left = block.nbytes - rounded
        if left >= GRAIN if small else left > SMALL:
            block.nbytes = rounded
            segment.blocks.insert(place + 1, Block(left, segment))
        block.free = False
        if number == 0:
            self.peak = max(self.peak, sum(one.nbytes for one in segment.blocks[: place + 1]))
        return block

    def free(self, block: Block) -> None:
        """Take back a block that `allocate` gave."""
        block.free = True
        merged: list[Block] = []
        for one in block.segment.blocks:
            if merged and one.free and merged[-1].free:
                merged[-1].nbytes += one.nbytes
            else:
                merged.append(one)
        block.segment.blocks[:] = merged
