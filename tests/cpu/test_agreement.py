"""Benchmark models in reduced size: what they return and the state they keep is eager's, call after call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from bench import models
from opara_backend.report.record import GraphRecord

Agree = Callable[..., list[GraphRecord]]
RecordOf = Callable[[str], GraphRecord]

CALLS, BATCH = 3, 2
BRANCHY = (
    "googlenet",
    "inception_v3",
    "deepfm",
    "bert_base",
    "t5_small",
    "moe_decode",
    "llama_decode",
    "bilstm_tagger",
)
OPTIONS: dict[str, Any] = {"policy": "opara", "launch_order": "opara"}
SLOW = ("nasnet_large", "randwire", "inception_v3")

# Tests of one file share what a model was compiled to; compiling it is what takes time.
_records: dict[str, GraphRecord] = {}


def rows(model: models.BenchModel, call: int) -> tuple[Tensor, ...]:
    """The arguments of call number `call`: rows nobody else got; what has no batch dimension (a position) goes up."""
    everything = model.inputs(CALLS * BATCH)
    start = call * BATCH
    return tuple(t[start : start + BATCH].clone() if len(t) == CALLS * BATCH else t + call for t in everything)


@pytest.fixture
def record_of(agree: Agree) -> RecordOf:
    """The record of the model with this name, after it was found to agree with eager."""

    def record(name: str) -> GraphRecord:
        if name not in _records:
            model = models.get(name).reduced()
            make = functools.partial(rows, model)
            (_records[name],) = agree(model.build(), make, calls=CALLS, options=OPTIONS, named=True)
        return _records[name]

    return record


def over(*names: str) -> pytest.MarkDecorator:
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in dict.fromkeys(names) if name in SLOW]
    return pytest.mark.parametrize("name", [*(n for n in names if n not in SLOW), *slow])


@over(*BRANCHY, *SLOW)
def test_model_agrees_with_eager_on_every_call(name: str, record_of: RecordOf) -> None:
    record = record_of(name)
    assert len(record.plans) == 1, "one shape, one plan"


@over(*BRANCHY, *SLOW)
def test_branches_get_streams_of_their_own(name: str, record_of: RecordOf) -> None:
    record = record_of(name)
    ((plan, _),) = record.plans.values()
    assert 1 < plan.schedule.streams <= record.options.streams
    assert plan.schedule.wait_count > 0


@over("googlenet", "inception_v3", "nasnet_large")
def test_launch_order_leaves_program_order(name: str, record_of: RecordOf) -> None:
    """By turns over kernels that are ready together: with four branches in a block program order is no candidate."""
    record = record_of(name)
    ((plan, _),) = record.plans.values()
    assert plan.schedule.order != tuple(range(len(record.graph)))


@over("googlenet", "inception_v3", "bert_base", "t5_small", "nasnet_large")
def test_buffers_share_memory(name: str, record_of: RecordOf) -> None:
    record = record_of(name)
    ((plan, _),) = record.plans.values()
    assert 0 < plan.memory.arena_bytes < plan.memory.requested_bytes


@over("googlenet", "inception_v3", "deepfm", "bert_base", "moe_decode", "bilstm_tagger")
def test_every_kernel_names_the_line_it_comes_from(name: str, record_of: RecordOf) -> None:
    record = record_of(name)
    unknown = [k.call for k in record.graph.kernels if ".py:" not in k.source]
    assert unknown == []
