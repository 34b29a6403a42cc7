"""Memory shared by arenas that are never in use at once."""

from __future__ import annotations

import gc

import torch

from opara_backend.execution.host import Arena, SharedMemory
from opara_backend.memory import MemoryPlan, Placement


def test_a_piece_that_is_large_enough_is_used_again() -> None:
    shared = SharedMemory(torch.device("cpu"))
    large, small = shared(1000), shared(100)
    assert small is large
    assert shared(2000) is not large


def test_the_tightest_piece_is_taken() -> None:
    shared = SharedMemory(torch.device("cpu"))
    held = [shared(100), shared(500), shared(1000)]
    assert [piece.numel() for piece in held] == [100, 500, 1000]
    assert shared(400) is held[1]
    assert shared(501) is held[2]


def test_pieces_go_with_the_arenas_in_them() -> None:
    shared = SharedMemory(torch.device("cpu"))
    plan = MemoryPlan((Placement("a", 0, 512),), 512, ())
    arenas = [Arena(plan, "cpu", shared) for _ in range(2)]
    first = arenas[0].bytes
    assert first is not None
    assert arenas[1].bytes is first
    address = first.data_ptr()
    del first, arenas[0]
    gc.collect()
    assert shared(512).data_ptr() == address, "the other arena still holds it"
    arenas.clear()
    gc.collect()
    assert shared._pieces[0]() is None


def test_without_a_supply_every_arena_has_memory_of_its_own() -> None:
    plan = MemoryPlan((Placement("a", 0, 512),), 512, ())
    one, other = Arena(plan, "cpu"), Arena(plan, "cpu")
    assert one.bytes is not None
    assert other.bytes is not None
    assert one.bytes.data_ptr() != other.bytes.data_ptr()
