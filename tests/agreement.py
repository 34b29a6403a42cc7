"""A compiled model beside its eager twin, call after call: outputs, arguments, state, and who served the calls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import opara_backend.backend
from opara_backend.fallback import FallbackReason
from opara_backend.report.record import GraphRecord, collect
from opara_backend.scheduling.schedule import verify

Make = Callable[[int], tuple[Any, ...]]
"""Makes the arguments of call number n; different numbers give different values."""

Agree = Callable[..., list[GraphRecord]]


def _same(actual: Any, expected: Any, what: str, exact: bool) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    # Words compare as they are, and only numbers and tensors have strides.
    actual, expected = (tree_map_only(str, lambda text: list(text.encode()), value) for value in (actual, expected))
    torch.testing.assert_close(
        actual, expected, **tolerance, equal_nan=True, check_stride=True, msg=lambda text: f"{what}: {text}"
    )


def _state(model: Callable[..., Any]) -> dict[str, Any]:
    return dict(model.state_dict()) if isinstance(model, nn.Module) else {}


def _assert_planned(record: GraphRecord, captured: bool, allowed: Collection[FallbackReason]) -> None:
    assert {step.reason for step in record.fallbacks} <= set(allowed), [str(step) for step in record.fallbacks]
    assert record.plans or record.fallbacks, "the graph was lowered but never planned"
    assert len(record.graph) > 1, f"too small to show anything: {record.graph}"
    record.graph.verify()
    for plan, was_captured in record.plans.values():
        assert was_captured == (captured and not record.fallbacks)
        verify(plan.graph, plan.schedule)


def agreement(*, captured: bool, allowed: Collection[FallbackReason] = ()) -> Agree:
    """A check of a model against its eager twin, for one device.

    captured: whether planned graphs are to be captured. allowed: steps down the ladder that are as they should be.
    """

    def check(
        model: Callable[..., Any],
        make: Make,
        *,
        calls: int = 3,
        records: int | None = 1,
        planned: bool = True,
        exact: bool = False,
        options: dict[str, Any] | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = True,
        seed: int | None = None,
        mode: Callable[[], Any] = torch.no_grad,
        named: bool = False,
    ) -> list[GraphRecord]:
        """Returns the records of the graphs compiled.

        Compared after each call: outputs, arguments (both may have been written) and the model's state; after the
        last call: that outputs of earlier calls kept their values. `records`: how many graphs are to be compiled;
        None: any number. `planned`: whether each of them is to have a plan. `seed`: seeds torch before every call.
        `named`: from caches only what came from the same lines, as under `explain`; elsewhere names may be missing.
        """
        twin = copy.deepcopy(model)
        backend = functools.partial(opara_backend.backend.compiled, named=True) if named else "opara"
        compiled = torch.compile(model, backend=backend, options=options, dynamic=dynamic, fullgraph=fullgraph)
        held: list[tuple[Any, Any]] = []
        with mode(), collect() as found:
            for call in range(calls):
                ours, theirs = make(call), make(call)
                if seed is not None:
                    torch.manual_seed(seed + call)
                expected = twin(*theirs)
                if seed is not None:
                    torch.manual_seed(seed + call)
                actual = compiled(*ours)
                _same(actual, expected, f"outputs of call {call}", exact)
                _same(ours, theirs, f"arguments after call {call}", exact)
                _same(_state(model), _state(twin), f"state after call {call}", exact)
                held.append((actual, expected))
        for call, (actual, expected) in enumerate(held):
            _same(actual, expected, f"outputs of call {call}, looked at after the last", exact)
        stepped_down = {FallbackReason(name) for name in torch._dynamo.utils.counters["opara"]}
        assert stepped_down <= set(allowed), f"stepped down: {stepped_down}"
        if records is not None:
            assert len(found) == records
        if planned:
            for record in found:
                _assert_planned(record, captured, allowed)
        return found

    return check
