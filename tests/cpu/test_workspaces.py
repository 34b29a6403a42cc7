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


@pytest.mark.parametrize(
    ("by_stream", "expected"),
    [(True, ["all", "all", "all"]), (False, ["all", "of graphs", "all"])],
    ids=["of one stream", "of all threads"],
)
def test_after_workspaces_were_forgotten(
    given_back: list[str], monkeypatch: pytest.MonkeyPatch, by_stream: bool, expected: list[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(cuda_graph.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(upstream, "clears_cublas_workspaces_by_stream", lambda: by_stream)
    cuda_graph.give_back_unused()
    cuda_graph.give_up_workspaces([])
    cuda_graph.give_back_unused()
    now[0] += cuda_graph._LAUNCHED
    cuda_graph.give_back_unused()
    assert given_back == expected
