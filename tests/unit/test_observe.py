"""What a results file says of one model, from the records of its graphs."""

from __future__ import annotations

import pytest

from bench.observe import facts
from opara_backend.options import Options
from opara_backend.report.record import GraphRecord
from tests.strategies import graph_of

ON_GPU = {"profile": 1.0, "schedule": 0.25, "plan": 0.125, "capture": 2.0, "search": 4.0}


def record(**seconds: float) -> GraphRecord:
    made = GraphRecord(graph_of(), Options())
    made.spent(compile=100.0, lowering=100.0, first_run=100.0, **seconds)
    return made


def test_search_is_everything_from_the_first_profile_to_the_kept_capture() -> None:
    found = facts([record(**ON_GPU), record(**ON_GPU)])
    assert found.search_seconds == pytest.approx(2 * 7.375)
    assert found.profile_seconds == pytest.approx(2.0)


def test_on_a_cpu_one_schedule_is_planned_and_none_is_searched() -> None:
    on_cpu = record(schedule=0.25, plan=0.125)
    for records in ([], [on_cpu]):
        assert facts(records).search_seconds is None
        assert facts(records).profile_seconds is None
    assert facts([on_cpu, record(**ON_GPU)]).search_seconds == pytest.approx(7.375)
