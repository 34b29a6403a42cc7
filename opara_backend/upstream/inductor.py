"""What is opened of Inductor's: its settings, and who writes wrappers, kernels and joined kernels.

Takes: what is to stand in the place of Inductor's own while a block runs; names of settings. Gives: contexts; what
Inductor says of its settings. Must not change: anything for good, what a block replaces is put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from opara_backend.upstream.private import (
    ForeachKernelSchedulerNode,
    TritonKernel,
    V,
    cache_dir,
    device_codegens,
    inductor_config,
    init_backend_registration,
)

# Seen 2.13, 2.15: `post_grad_custom_pre_pass` takes a list, too, and passes that are told whether the graph is for
# inference. 2.11 takes one pass.
TAKES_SEVERAL_PASSES = hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes")

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


def inductor_option_names() -> tuple[str, ...]:
    """Every configuration key of Inductor, dotted, sorted. Seen 2.11, 2.13, 2.15."""
    return tuple(sorted(inductor_config.get_config_copy()))


def cache_directory() -> Path:
    """Where Inductor keeps what it compiled. Seen 2.13, 2.15; without it `cache` and `doctor` know no place."""
    return Path(cache_dir())


def check_inductor_option(key: str, value: Any) -> None:
    """Raise ValueError if `value` is not of the type Inductor declares for `key`. Seen 2.11, 2.13, 2.15."""
    declared = inductor_config.get_type(key)
    # Parametrised types (Optional, Literal, Callable) are left to Inductor, as torch.compile leaves them.
    if getattr(declared, "__origin__", None) is None and isinstance(declared, type) and not isinstance(value, declared):
        raise ValueError(
            f"Inductor option {key!r} takes a {declared.__name__}, got {value!r} of type {type(value).__name__}"
        )
