"""Judges samples: what a backend makes of them, compared with eager, and with another backend where it differs.

Takes: samples, compiled together as one function when there are several. Gives: one `Result` each.
Must not change: the samples; every run has copies of its own.

`theirs` is compiled only where the result of `ours` is not plainly right (or with `both`): what agrees with eager in
values, structure and strides needs no second witness. Where ours differs, theirs decides: only what it gets right can
be our fault. Strides, and numbers drawn at random, are whatever theirs says they are.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from opara_backend import upstream
from opara_backend.report.record import collect
from tests.sweep.compare import Kind, Problem, difference
from tests.sweep.limits import TimeLimit, describe, time_limit
from tests.sweep.records import Case, Result
from tests.sweep.samples import Sample

Backend = str | Callable[..., Any]

# Which arguments each call gets: the sample's, or those with changed values. On CUDA the first call runs plainly, the
# next replay a captured graph; a graph that still reads the first call's memory shows in the last two.
CALLS = {"cpu": ("first", "changed"), "cuda": ("first", "first", "first", "changed", "again")}

BROKEN = 70  # exit status of a process whose device has failed


@dataclass
class _Run:
    """What one way of running did: per call, per sample, outputs and arguments afterwards; or what it raised."""

    calls: list[list[tuple[Any, Any]]] = field(default_factory=list)
    raised: str = ""
    counts: dict[str, Any] = field(default_factory=dict)


def judge(
    samples: Sequence[Sample],
    device: str,
    *,
    ours: Backend = "opara",
    theirs: Backend = "inductor",
    both: bool = False,
    options: dict[str, Any] | None = None,
    limit: float = 120.0,
) -> list[Result]:
    """Judge `samples`, compiled together.

    options: of `torch.compile`; other backends get those that Inductor knows. limit: seconds for each backend.
    """
    begun = time.monotonic()
    results: dict[Case, Result] = {}
    kept: list[Sample] = []
    expected: dict[Case, _Run] = {}
    for sample in samples:
        run = _run_eager(sample, device)
        if run.raised and sample.changed is not None:  # perhaps it takes only certain values
            sample = replace(sample, changed=None)
            run = _run_eager(sample, device)
        expected[sample.case] = run
        if run.raised:
            results[sample.case] = Result(sample.case, "skipped", f"eager raises: {run.raised}", sample.dtype)
        else:
            kept.append(sample)
    if kept:
        with collect() as records:
            upstream.counters["opara"].clear()
            our_run = _run_compiled(kept, device, ours, options, limit)
        counts: dict[str, Any] = {
            "graphs": sum(len(record.graph) > 0 for record in records),
            "captured": sum(any(captured for _, captured in record.plans.values()) for record in records),
            "replays": sum(record.replays for record in records),
            "fallbacks": dict(sorted(upstream.counters["opara"].items())),
        }
        ours_found = _problems(kept, our_run, expected)
        their_run = None
        if both or our_run.raised or any(ours_found):
            their_run = _run_compiled(kept, device, theirs, options, limit)
        theirs_found = _problems(kept, their_run, expected) if their_run else [None] * len(kept)
        for place, sample in enumerate(kept):
            found, witness = ours_found[place], theirs_found[place]
            verdict, detail = _weigh(sample, place, device, (our_run, found), (their_run, witness))
            said = "not asked" if their_run is None else their_run.raised or str(witness or "agrees")
            results[sample.case] = Result(
                sample.case, verdict, detail, sample.dtype, theirs=said, together=len(kept), **counts
            )
    seconds = round((time.monotonic() - begun) / max(1, len(samples)), 2)
    return [Result(**{**vars(results[sample.case]), "seconds": seconds}) for sample in samples]


def _weigh(
    sample: Sample,
    place: int,
    device: str,
    ours: tuple[_Run, Problem | None],
    theirs: tuple[_Run | None, Problem | None],
) -> tuple[str, str]:
    """The verdict, and the words for it, from both runs and how each differs from eager."""
    (our_run, found), (their_run, witness) = ours, theirs
    if not our_run.raised and found is None:
        return "agrees", ""
    assert their_run is not None
    if our_run.raised:
        if their_run.raised:
            return "both_wrong", f"raises {our_run.raised}; inductor raises {their_run.raised}"
        if witness is not None and witness.kind is not Kind.STRIDES:
            return "both_wrong", f"raises {our_run.raised}; inductor differs, {witness}"
        return "opara_raises", our_run.raised
    if their_run.raised:
        return "both_wrong", f"{found}; inductor raises {their_run.raised}"
    apart = _apart(our_run, their_run, place, sample.initialised)
    if apart is None and found is not None and found.kind is Kind.STRIDES:
        return "agrees", "strides as inductor's"
    if witness is None or witness.kind is Kind.STRIDES or (apart is not None and _draws(sample, device)):
        # Operators that leave some of what they return unwritten differ from themselves, under any backend.
        if witness is not None and witness.kind is Kind.VALUES and _unsteady(sample, device):
            return "both_wrong", f"{found}; eager differs from itself, too"
        return "opara_wrong", f"{found}; from inductor: {apart}"
    if apart is None and witness.kind is Kind.VALUES and _draws(sample, device):
        return "agrees", "random numbers as inductor's"
    return "both_wrong", f"{found}; from inductor: {apart or 'nothing'}"


def _unsteady(sample: Sample, device: str) -> bool:
    """True if eager, run twice on the same arguments from the same seeds, gives different values."""
    first, second = _run_eager(sample, device), _run_eager(sample, device)
    return first.raised == second.raised == "" and _apart(first, second, 0, values=True) is not None


def _apart(ours: _Run, theirs: _Run, place: int, values: bool) -> Problem | None:
    for mine, other in zip(ours.calls, theirs.calls, strict=True):
        if problem := difference(mine[place], other[place], values=values):
            return problem
    return None


def _problems(samples: Sequence[Sample], run: _Run, expected: dict[Case, _Run]) -> list[Problem | None]:
    """How each sample of `run` first differs from eager; nothing for a run that raised."""
    found: list[Problem | None] = []
    for place, sample in enumerate(samples):
        problem = None
        for number, call in enumerate(run.calls if not run.raised else ()):
            outputs, arguments = call[place]
            (right, right_arguments) = expected[sample.case].calls[number][0]
            problem = difference(outputs, right, values=sample.initialised) or difference(arguments, right_arguments)
            if problem is not None:
                problem = Problem(problem.kind, f"call {number + 1}: {problem.text}")
                break
        found.append(problem)
    return found


def _arguments(sample: Sample) -> dict[str, Any]:
    """Copies for each kind of call, each in memory of its own, views among them kept as views."""
    changed = sample.arguments if sample.changed is None else sample.changed
    return {name: _copied(changed if name == "changed" else sample.arguments) for name in CALLS["cuda"]}


def _copied(value: Any) -> Any:
    """`value` in memory of its own; views in it stay views, of copies."""
    leaves = pytree.tree_leaves(value)
    if all(leaf.layout == torch.strided for leaf in leaves if isinstance(leaf, torch.Tensor)):
        return copy.deepcopy(value)
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)  # not every sparse layout has a deep copy


def _run_eager(sample: Sample, device: str) -> _Run:
    """All calls of one sample, uncompiled."""
    run = _Run()
    given = _arguments(sample)
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


def _run_compiled(
    samples: Sequence[Sample], device: str, backend: Backend, options: dict[str, Any] | None, limit: float
) -> _Run:
    """All calls of `samples` compiled as one function."""
    functions = [sample.call for sample in samples]

    def program(arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [function(*given) for function, given in zip(functions, arguments, strict=True)]

    run = _Run()
    given = [_arguments(sample) for sample in samples]
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


class _SeesRandom(TorchDispatchMode):
    """Notes whether an operator that draws random numbers ran."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _draws(sample: Sample, device: str) -> bool:
    """True if the sample draws random numbers, which are not the same compiled as eager."""
    with torch.no_grad(), _SeesRandom() as mode:
        sample.call(*_arguments(sample)["first"])
    return mode.seen
