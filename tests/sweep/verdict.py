"""Judges samples: what a backend makes of them, compared with eager, and with another backend where it differs.

Takes: samples, compiled together as one function when there are several. Gives: one `Result` each.
Must not change: the samples; every run has copies of its own.

`theirs` is compiled only where the result of `ours` is not plainly right (or with `both`): what agrees with eager in
values, structure and strides needs no second witness. Where ours differs, theirs decides: only what it gets right can
be our fault. Strides, and numbers drawn at random, are whatever theirs says they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opara_backend import upstream
from opara_backend.report.record import collect
from tests.sweep.compare import Kind, Problem, difference
from tests.sweep.records import Case, Result
from tests.sweep.runs import Backend, Run, arguments_of, run_compiled, run_eager
from tests.sweep.samples import Sample


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
    expected: dict[Case, Run] = {}
    for sample in samples:
        run = run_eager(sample, device)
        if run.raised and sample.changed is not None:  # perhaps it takes only certain values
            sample = replace(sample, changed=None)
            run = run_eager(sample, device)
        expected[sample.case] = run
        if run.raised:
            results[sample.case] = Result(sample.case, "skipped", f"eager raises: {run.raised}", sample.dtype)
        else:
            kept.append(sample)
    if kept:
        with collect() as records:
            upstream.counters["opara"].clear()
            our_run = run_compiled(kept, device, ours, options, limit)
        counts: dict[str, Any] = {
            "graphs": sum(len(record.graph) > 0 for record in records),
            "captured": sum(any(captured for _, captured in record.plans.values()) for record in records),
            "replays": sum(record.replays for record in records),
            "fallbacks": dict(sorted(upstream.counters["opara"].items())),
        }
        ours_found = _problems(kept, our_run, expected)
        their_run = None
        if both or our_run.raised or any(ours_found):
            their_run = run_compiled(kept, device, theirs, options, limit)
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
    ours: tuple[Run, Problem | None],
    theirs: tuple[Run | None, Problem | None],
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
    first, second = run_eager(sample, device), run_eager(sample, device)
    return first.raised == second.raised == "" and _apart(first, second, 0, values=True) is not None


def _apart(ours: Run, theirs: Run, place: int, values: bool) -> Problem | None:
    for mine, other in zip(ours.calls, theirs.calls, strict=True):
        if problem := difference(mine[place], other[place], values=values):
            return problem
    return None


def _problems(samples: Sequence[Sample], run: Run, expected: dict[Case, Run]) -> list[Problem | None]:
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


class _SeesRandom(TorchDispatchMode):
    """Notes whether an operator that draws random numbers ran."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _draws(sample: Sample, device: str) -> bool:
    """True if the sample draws random numbers, which are not the same compiled as eager."""
    with torch.no_grad(), _SeesRandom() as mode:
        sample.call(*arguments_of(sample)["first"])
    return mode.seen
