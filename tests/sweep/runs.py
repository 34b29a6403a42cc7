"""Runs samples: eagerly, or compiled together as one function, every call on memory of its own.

Takes: samples, a device, a backend. Gives: a `Run`, what all calls returned and did to their arguments.
Must not change: the samples.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from opara_backend import upstream
from tests.sweep.limits import TimeLimit, describe, time_limit
from tests.sweep.samples import Sample

Backend = str | Callable[..., Any]

# Which arguments each call gets: the sample's, or those with changed values. On CUDA the first call runs plainly, the
# next replay a captured graph; a graph that still reads the first call's memory shows in the last two.
CALLS = {"cpu": ("first", "changed"), "cuda": ("first", "first", "first", "changed", "again")}

BROKEN = 70  # exit status of a process whose device has failed


@dataclass
class Run:
    """What one way of running did: per call, per sample, outputs and arguments afterwards; or what it raised."""

    calls: list[list[tuple[Any, Any]]] = field(default_factory=list)
    raised: str = ""


def arguments_of(sample: Sample) -> dict[str, Any]:
    """Copies for each kind of call, each in memory of its own, views among them kept as views."""
    changed = sample.arguments if sample.changed is None else sample.changed
    return {name: _copied(changed if name == "changed" else sample.arguments) for name in CALLS["cuda"]}


def _copied(value: Any) -> Any:
    """`value` in memory of its own; views in it stay views, of copies."""
    leaves = pytree.tree_leaves(value)
    if all(leaf.layout == torch.strided for leaf in leaves if isinstance(leaf, torch.Tensor)):
        return copy.deepcopy(value)
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)  # not every sparse layout has a deep copy


def run_eager(sample: Sample, device: str) -> Run:
    """All calls of one sample, uncompiled."""
    run = Run()
    given = arguments_of(sample)
    try:
        with torch.no_grad():
            for number, which in enumerate(CALLS[device]):
                torch.manual_seed(number)
                outputs = sample.call(*given[which])
                run.calls.append([(outputs, _copied(given[which]))])
            _synchronize(device)
    except Exception as error:
        run.raised = describe(error)
        _leave_if_broken(device)
    return run


def run_compiled(
    samples: Sequence[Sample], device: str, backend: Backend, options: dict[str, Any] | None, limit: float
) -> Run:
    """All calls of `samples` compiled as one function."""
    functions = [sample.call for sample in samples]

    def program(arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [function(*given) for function, given in zip(functions, arguments, strict=True)]

    run = Run()
    given = [arguments_of(sample) for sample in samples]
    torch._dynamo.reset()
    known = options if backend == "opara" else _inductor_only(options)
    compiled = torch.compile(program, backend=backend, options=known)
    try:
        with time_limit(limit), torch.no_grad():
            for number, which in enumerate(CALLS[device]):
                torch.manual_seed(number)
                arguments = [copies[which] for copies in given]
                outputs = compiled(arguments)
                after = [_copied(given) for given in arguments]
                run.calls.append(list(zip(outputs, after, strict=True)))
            _synchronize(device)
    except TimeLimit:
        run.raised = f"more than {limit:.0f} seconds"
    except Exception as error:
        run.raised = describe(error)
        _leave_if_broken(device)
    torch._dynamo.reset()
    return run


def _inductor_only(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options that stock Inductor knows."""
    if options is None:
        return None
    known = upstream.inductor_option_names()
    return {key: value for key, value in options.items() if key in known}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _leave_if_broken(device: str) -> None:
    """End the process if its device answers no more: nothing that follows in it would say anything."""
    try:
        _synchronize(device)
    except Exception:
        os._exit(BROKEN)
