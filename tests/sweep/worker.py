"""One process that judges what it is sent, one job after another.

Takes: a pipe that brings `Job`s, None at the end. Gives: through it, the list of `Result`s of each.
Must not change: the process that started it; a sample that crashes takes only this process with it.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from tests.sweep.samples import Case


@dataclass(frozen=True)
class Setting:
    """What all jobs of a sweep share. unbacked: compile data-dependent shapes too, instead of breaking the graph."""

    device: str
    both: bool = False
    limit: float = 120.0
    unbacked: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Job:
    """Samples to be compiled together. only_theirs: leave `opara` out, to see whether inductor survives them."""

    cases: tuple[Case, ...]
    only_theirs: bool = False


def serve(connection: Connection, setting: Setting) -> None:
    """Work until told to stop. What operators print or warn of goes nowhere."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    import torch

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        connection.send(work(job, setting))
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def work(job: Job, setting: Setting) -> list[Any]:
    """The results of one job. Where samples compiled together come out wrong, each is judged alone as well."""
    import torch

    from tests.sweep import samples, verdict

    ours = "inductor" if job.only_theirs else "opara"
    config = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True} if setting.unbacked else {}
    with torch._dynamo.config.patch(config):

        def judge(cases: tuple[Case, ...], both: bool) -> list[verdict.Result]:
            return verdict.judge(
                samples.load(cases, setting.device),
                setting.device,
                ours=ours,
                both=both,
                options=dict(setting.options) or None,
                limit=setting.limit,
            )

        found = judge(job.cases, setting.both)
        if len(job.cases) == 1:
            return found
        results = []
        for result in found:
            if result.verdict in ("agrees", "skipped"):
                results.append(result)
                continue
            (alone,) = judge((result.case,), True)
            if alone.verdict == "agrees" and result.verdict in verdict.FAULTS:  # it takes company to go wrong
                alone = replace(result, detail=f"only together with others: {result.detail}")
            results.append(alone)
        return results
