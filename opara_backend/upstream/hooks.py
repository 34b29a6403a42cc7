"""Hooks into Inductor's code generation that are process-wide while they are in place, and are put back after."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Seen 2.11, 2.13, 2.15. Which code generator serves a device. Without it our wrapper is never asked.
from torch._inductor.codegen.common import device_codegens, init_backend_registration

from opara_backend.upstream.inductor import ForeachKernelSchedulerNode, TritonKernel, V

__all__ = [
    "joining_kernels_by",
    "waiting_whatever_ran_before",
    "wrapper_codegen_for",
]

_REGISTRATION = threading.RLock()


@contextlib.contextmanager
def wrapper_codegen_for(devices: tuple[str, ...], codegen: type) -> Iterator[None]:
    """Let `codegen` write the wrappers for `devices` while the block runs, then put back what was there.

    The registry is process-wide, so `codegen.create` must itself decide whether the asking thread is ours.
    """
    with _REGISTRATION:
        init_backend_registration()
        before = {device: device_codegens[device] for device in devices if device in device_codegens}
        try:
            for device, registered in before.items():
                device_codegens[device] = dataclasses.replace(registered, wrapper_codegen=codegen)
            yield
        finally:
            device_codegens.update(before)


@contextlib.contextmanager
def waiting_whatever_ran_before() -> Iterator[None]:
    """Let kernels of programmatic dependent launch (`triton.enable_pdl`) wait before they touch any memory.

    Such a kernel may start before the one ahead of it in its stream has ended, and waits before it reads what that one
    wrote. Inductor takes that to be the kernel it generated last; a schedule may put any other there.
    Seen 2.11, 2.13; where kernels are written differently, nothing is changed.
    """
    original: Any = getattr(TritonKernel, "_handle_pdl_before_access", None)
    if original is None:
        yield
        return

    def wait_first(kernel: Any, *args: Any, **kwargs: Any) -> None:
        scheduler: Any = V.graph.scheduler
        if scheduler is None:
            return original(kernel, *args, **kwargs)
        last, scheduler.previous_node = scheduler.previous_node, None  # then Inductor can rule nothing out
        try:
            original(kernel, *args, **kwargs)
        finally:
            scheduler.previous_node = last

    with _REGISTRATION:
        TritonKernel._handle_pdl_before_access = wait_first
        try:
            yield
        finally:
            TritonKernel._handle_pdl_before_access = original


@contextlib.contextmanager
def joining_kernels_by(groups: Callable[[Any], list[list[Any]]], asked: Callable[[], bool]) -> Iterator[None]:
    """Let `groups` say which kernels of a scheduler are joined under `combo_kernels`, where `asked()` says so.

    Process-wide, so that `asked` must itself decide whether the asking thread is ours.
    Seen 2.11, 2.13, 2.15. Without it small kernels are not joined: Inductor's own choice joins large ones.
    """
    kind = ForeachKernelSchedulerNode
    with _REGISTRATION:
        original = kind.group_algorithm_for_combo_kernels
        kind.set_group_algorithm_for_combo_kernels(lambda nodes: groups(nodes) if asked() else original(nodes))
        try:
            yield
        finally:
            kind.set_group_algorithm_for_combo_kernels(original)
