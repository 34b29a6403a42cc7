"""The first sample of every operator in PyTorch's own database, eight compiled as one function.

Operators are mixed by a hash of their names, so that kernels of different kinds meet in one schedule. Where samples
come out wrong together, each is compiled alone too. All samples: `tox -e sweep`.
"""

from __future__ import annotations

import functools

import pytest

from tests.sweep.__main__ import chosen_cases, jobs
from tests.sweep.records import Job, Setting
from tests.sweep.table import at_fault
from tests.sweep.worker import work

PARTS = 88
TOGETHER = 8

SETTING = Setting("cpu")


@functools.cache
def _jobs() -> list[Job]:
    return jobs(chosen_cases("cpu", "1", "0/1"), TOGETHER)


@pytest.mark.parametrize("part", range(PARTS))
def test_operators_agree_with_eager_wherever_inductor_does(part: int) -> None:
    mixed = _jobs()[part::PARTS]
    results = [result for job in mixed for result in work(job, SETTING)]
    assert results, "the database holds fewer operators than there are tests"
    assert not at_fault(results)
    if not any(result.graphs for result in results):  # one that Dynamo skips takes all others of its function with it
        results = [result for job in mixed for case in job.cases for result in work(Job((case,)), SETTING)]
        assert not at_fault(results)
    assert any(result.graphs for result in results), "opara scheduled nothing"
