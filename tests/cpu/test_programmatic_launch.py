"""Kernels of programmatic dependent launch wait before their first access, whatever Inductor generated before them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from opara_backend import upstream
from opara_backend.upstream import IndentedBuffer, TritonKernel, V


def waits(kernel: Any, previous: Any) -> bool:
    """True if Inductor lets `kernel` wait before it reads `buf7`, generated after `previous`, which wrote `buf1`."""
    text = IndentedBuffer()
    scheduler = SimpleNamespace(previous_node=previous)
    with V.set_graph_handler(SimpleNamespace(scheduler=scheduler)), V.set_kernel_handler(kernel):
        TritonKernel._handle_pdl_before_access(kernel, text, "buf7")
    assert scheduler.previous_node is previous
    return TritonKernel.GDC_WAIT in text.getvalue()


@pytest.fixture
def kernel() -> Any:
    return SimpleNamespace(
        _enable_pdl_codegen=lambda: True,
        GDC_WAIT=TritonKernel.GDC_WAIT,
        inside_reduction=False,
        current_node=SimpleNamespace(mutation_renames={}),
    )


def test_a_kernel_waits_even_for_what_another_order_puts_ahead_of_it(kernel: Any) -> None:
    previous = SimpleNamespace(read_writes=SimpleNamespace(writes=[SimpleNamespace(name="buf1")], reads=[]))
    assert not waits(kernel, previous)  # in Inductor's own order, what wrote `buf7` has surely ended
    with upstream.waiting_whatever_ran_before():
        assert waits(kernel, previous)
        assert waits(kernel, None)
    assert not waits(kernel, previous)
