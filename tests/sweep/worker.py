"""One process that judges what it is sent, one job after another.

Takes: a pipe that brings `Job`s, None at the end. Gives: through it, the list of `Result`s of each.
Must not change: the process that started it; a sample that crashes takes only this process with it.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection

from tests.sweep.limits import describe
from tests.sweep.records import FAULTS, Case, Job, Result, Setting


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
        try:
            results = work(job, setting)
        except Exception as error:  # ours, not a backend's, so it must not pass for a verdict
            results = [Result(case, "unjudged", describe(error)) for case in job.cases]
        connection.send(results)
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def work(job: Job, setting: Setting) -> list[Result]:
    """The results of one job. Where samples compiled together come out wrong, each is judged alone as well."""
    import torch

    from tests.sweep import samples, verdict

    ours = "inductor" if job.only_theirs else "opara"
    config = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True} if setting.unbacked else {}
    with torch._dynamo.config.patch(config):

        def judge(cases: tuple[Case, ...], both: bool) -> list[Result]:
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
            if alone.verdict == "agrees" and result.verdict in FAULTS:  # it takes company to go wrong
                alone = replace(result, detail=f"only together with others: {result.detail}")
            results.append(alone)
        return results
