"""What a results file says of one model, from the records of its graphs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bench.observe import facts
from bench.samples import Row, dumps, row_from
from opara_backend.memory import plan_memory
from opara_backend.options import Options
from opara_backend.profiling.profile import build_profile
from opara_backend.report.record import GraphRecord, Timed
from opara_backend.scheduling.policies import in_a_row
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


def test_rewrites_are_those_of_what_shapes_run_by_and_lowerings_those_that_raced() -> None:
    made = replace(record(), rewrites=("join_small",))
    profile = build_profile(made.graph, [0.0] * len(made.graph), None, None)
    schedule = in_a_row(made.graph)
    plan: Any = SimpleNamespace(
        graph=made.graph, profile=profile, schedule=schedule, memory=plan_memory(made.graph, schedule)
    )
    for key in ((1,), (2,), (3,)):
        made.plans[key] = (plan, True)
    made.rewritten[(1,)] = ("fuse_gemv", "join_small")
    made.rewritten[(2,)] = ()
    made.lowerings[(1,)] = (Timed((), 2e-6), Timed(("fuse_gemv", "join_small"), 1e-6))
    found = facts([made])
    assert found.rewrites == ("fuse_gemv", "join_small")
    assert found.lowerings == (((), 2e-6), (("fuse_gemv", "join_small"), 1e-6))
    row = Row("m", "float16", 1, "opara", None, None, None, rewrites=found.rewrites, lowerings=found.lowerings)
    assert row_from(json.loads(dumps(row))) == row
