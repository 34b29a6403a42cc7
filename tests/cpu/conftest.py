"""What the tests that compile on the CPU share: comparing with eager twins, and running Python in fresh processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from opara_backend.report.record import GraphRecord, collect
from opara_backend.scheduling.schedule import verify

Make = Callable[[int], tuple[Any, ...]]
"""Makes the arguments of call number n; different numbers give different values."""


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Every test compiles from scratch (Inductor's caches on disk stay) and starts from one random state."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _same(actual: Any, expected: Any, what: str, exact: bool) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    # Words compare as they are, and only numbers and tensors have strides.
    actual, expected = (tree_map_only(str, lambda text: list(text.encode()), value) for value in (actual, expected))
    torch.testing.assert_close(
        actual, expected, **tolerance, equal_nan=True, check_stride=True, msg=lambda text: f"{what}: {text}"
    )


def _state(model: Callable[..., Any]) -> dict[str, Any]:
    return dict(model.state_dict()) if isinstance(model, nn.Module) else {}


def _assert_planned(record: GraphRecord) -> None:
    assert record.fallbacks == []
    assert record.plans, "the graph was lowered but never planned"
    assert len(record.graph) > 1, f"too small to show anything: {record.graph}"
    record.graph.verify()
    for plan, captured in record.plans.values():
        assert not captured
        verify(plan.graph, plan.schedule)


@pytest.fixture
def agree() -> Callable[..., list[GraphRecord]]:
    """Check that a compiled model does what its eager twin does, call after call, and that our path did it."""

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
    ) -> list[GraphRecord]:
        """Returns the records of the graphs compiled.

        Compared after each call: outputs, arguments (both may have been written) and the model's state; after the
        last call: that outputs of earlier calls kept their values. `records`: how many graphs are to be compiled;
        None: any number. `planned`: whether each of them is to have a plan. `seed`: seeds torch before every call.
        """
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, backend="opara", options=options, dynamic=dynamic, fullgraph=fullgraph)
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
        assert not torch._dynamo.utils.counters["opara"], "stepped down"
        if records is not None:
            assert len(found) == records
        if planned:
            for record in found:
                _assert_planned(record)
        return found

    return check


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run source text in a fresh interpreter; what its last line of output says, read as JSON."""
    folder = tmp_path_factory.mktemp("processes")
    # With an empty cache directory, checking what vectors the compiler knows takes longer than compiling without.
    quick = {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}

    def run(
        source: str, *arguments: str, cache: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Any:
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache is not None else {}
        script = folder / "script.py"
        script.write_text(source)
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **quick, **folders, **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
