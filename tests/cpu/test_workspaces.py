"""What is given back to the device, and when: memory that a GEMM of another thread may be about to use is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from opara_backend import upstream
from opara_backend.execution import cuda_graph


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was given back each time: all that is unused, or only what graphs had."""
    found: list[str] = []
    inside: list[Any] = []

    @contextmanager
    def use_mem_pool(pool: Any) -> Iterator[None]:
        inside.append(pool)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("of graphs" if inside else "all"))
    monkeypatch.setattr(upstream, "clear_cublas_workspaces", lambda streams: None)
    monkeypatch.setattr(cuda_graph, "_WORKSPACES", cuda_graph._Workspaces())
    return found


def segment(pool: tuple[int, int], *states: str) -> dict[str, Any]:
    """One of `torch.cuda.memory_snapshot`, its blocks of 32 bytes in these states."""
    blocks = [{"address": 512 * place, "size": 32, "state": state} for place, state in enumerate(states)]
    return {"segment_pool_id": pool, "blocks": blocks}


USERS = segment((0, 0), "active_allocated")
HELD, FREED = segment((0, 1), "active_allocated"), segment((0, 1), "inactive")


@pytest.mark.parametrize(
    ("allocator", "by_stream", "before", "after", "freed", "expected"),
    [
        ("native", True, [], [], 0, ["all", "all", "all"]),
        ("native", False, [USERS], [], 32, ["all", "of graphs", "all"]),
        ("native", False, [], [], 32, ["all", "of graphs", "all"]),
        ("native", False, [USERS], [USERS], 0, ["all", "all", "all"]),
        ("native", False, [USERS, HELD], [USERS, FREED], 32, ["all", "all", "all"]),
        ("native", False, [HELD], [FREED], 64, ["all", "of graphs", "all"]),
        ("pluggable", False, [], [], 0, ["all", "of graphs", "all"]),
    ],
    ids=[
        *("of one stream", "somebody's", "one that nobody saw", "nobody's", "a graph's", "a graph's and another"),
        "nobody can tell",
    ],
)
def test_after_workspaces_were_forgotten(
    given_back: list[str],
    monkeypatch: pytest.MonkeyPatch,
    allocator: str,
    by_stream: bool,
    before: list[Any],
    after: list[Any],
    freed: int,
    expected: list[str],
) -> None:
    """What may be another thread's workspace stays mapped until that has surely launched what works in it."""
    snapshots, counts = [before, after], [1000, 1000 + freed]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshots.pop(0))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda,
        "memory_stats_as_nested_dict",
        lambda index: {"allocated_bytes": {"all": {"freed": counts.pop(0)}}},
    )
    now = [100.0]
    monkeypatch.setattr(cuda_graph.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(upstream, "clears_cublas_workspaces_by_stream", lambda: by_stream)
    cuda_graph.give_back_unused()
    cuda_graph.give_up_workspaces([])
    cuda_graph.give_back_unused()
    now[0] += cuda_graph._LAUNCHED
    cuda_graph.give_back_unused()
    assert given_back == expected
