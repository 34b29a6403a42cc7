"""Tests that need a CUDA device; all are skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opara_backend.execution import winners

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def nothing_remembered() -> Iterator[None]:
    """Every test searches for itself; those of what is remembered start processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winners, "place", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    # Threads that call models compiled with dynamic=True restore each other's settings.
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=True):
        yield
    torch._dynamo.reset()
