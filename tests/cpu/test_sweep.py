"""The sweep itself: backends that are wrong on purpose are caught, and crashes are survived."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sweep import samples, table
from tests.sweep.limits import clean
from tests.sweep.pool import Pool
from tests.sweep.records import Case, Job, Result, Setting
from tests.sweep.samples import Sample
from tests.sweep.verdict import judge

Backend = Callable[..., Any]


def _sample(call: Callable[..., Any] = torch.exp, *, index: int = 0, initialised: bool = True) -> Sample:
    def with_packed(first: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(first, *args, **kwargs)

    first, other = torch.rand(3, 4), torch.rand(3, 4)
    return Sample(Case("operator", index), with_packed, (first, (), {}), (other, (), {}), initialised)


def _changing(change: Callable[[Any, int], Any]) -> Backend:
    """Eager, but with `change` made to every tensor that is returned, given the number of the call."""

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        numbers = itertools.count()

        def run(*args: Any) -> list[Any]:
            number = next(numbers)
            return [change(out, number) for out in gm(*args)]

        return run

    return backend


def _refusing(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    raise NotImplementedError("not lowered")


def _failing(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    def run(*args: Any) -> list[Any]:
        raise ZeroDivisionError("not computed")

    return run


def _overwriting(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Right, but it writes into what it is given."""

    def run(*args: Any) -> list[Any]:
        outputs = gm(*args)
        for arg in args:
            arg.zero_()
        return outputs

    return run


def _recycling(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Right, but every call overwrites what the last one returned."""
    memory: list[torch.Tensor] = []

    def run(*args: Any) -> list[torch.Tensor]:
        outputs = gm(*args)
        memory[:] = memory or [out.clone() for out in outputs]
        return [kept.copy_(out) for kept, out in zip(memory, outputs, strict=True)]

    return run


def _stale(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Computes from the memory of the first call whatever it is given later, as a captured graph might."""
    first: list[Any] = []

    def run(*args: Any) -> list[Any]:
        first[:] = first or args
        return gm(*first)

    return run


_WRONG: dict[str, Backend] = {
    "values": _changing(lambda out, call: out + 1e-2),
    "one value": _changing(lambda out, call: out.index_fill(0, torch.tensor(2), 7.0)),
    "second call": _changing(lambda out, call: out + 1e-2 * call),
    "nan": _changing(lambda out, call: out * float("nan")),
    "dtype": _changing(lambda out, call: out.double()),
    "shape": _changing(lambda out, call: out.unsqueeze(0)),
    "strides": _changing(lambda out, call: out.t().contiguous().t()),
    "input overwritten": _overwriting,
    "output overwritten": _recycling,
    "stale input": _stale,
}


@pytest.mark.parametrize("wrong", _WRONG)
def test_wrong_where_inductor_is_right(wrong: str) -> None:
    (result,) = judge([_sample()], "cpu", ours=_WRONG[wrong], theirs="eager")
    assert result.verdict == "opara_wrong", result
    assert result.theirs == "agrees"
    assert table.at_fault([result]) == [result]


@pytest.mark.parametrize("backend", [_refusing, _failing])
def test_raises_where_inductor_is_right(backend: Backend) -> None:
    (result,) = judge([_sample()], "cpu", ours=backend, theirs="eager")
    assert result.verdict == "opara_raises", result
    assert "not lowered" in result.detail or "not computed" in result.detail
    assert table.at_fault([result]) == [result]


def test_too_slow_counts_as_raising() -> None:
    def slow(out: Any, call: int) -> Any:
        time.sleep(5)
        return out

    (result,) = judge([_sample()], "cpu", ours=_changing(slow), theirs="eager", limit=0.5)
    assert (result.verdict, result.detail) == ("opara_raises", "more than 0 seconds")


@pytest.mark.parametrize("backend", [_WRONG["values"], _WRONG["shape"], _refusing])
def test_no_fault_of_ours_where_both_are_wrong(backend: Backend) -> None:
    (result,) = judge([_sample()], "cpu", ours=backend, theirs=backend)
    assert result.verdict == "both_wrong", result
    assert not table.at_fault([result])


def test_strides_are_what_inductor_makes_them() -> None:
    (result,) = judge([_sample()], "cpu", ours=_WRONG["strides"], theirs=_WRONG["strides"])
    assert (result.verdict, result.detail) == ("agrees", "strides as inductor's")


def test_wrong_strides_of_inductor_excuse_no_wrong_values() -> None:
    (result,) = judge([_sample()], "cpu", ours=_WRONG["values"], theirs=_WRONG["strides"])
    assert result.verdict == "opara_wrong"


def test_random_numbers_are_what_inductor_draws() -> None:
    def other_numbers(out: Any, call: int) -> Any:
        return torch.rand_like(out) + 1

    drawing = _sample(torch.bernoulli)
    (same,) = judge([drawing], "cpu", ours=_changing(other_numbers), theirs=_changing(other_numbers))
    assert (same.verdict, same.detail) == ("agrees", "random numbers as inductor's")
    (other,) = judge([drawing], "cpu", ours=_changing(lambda out, call: out * 0 + 3), theirs=_changing(other_numbers))
    assert other.verdict == "opara_wrong"


def test_uninitialised_memory_has_a_layout_only() -> None:
    blank = _sample(lambda first: torch.empty_like(first), initialised=False)
    (result,) = judge([blank], "cpu", ours=_changing(lambda out, call: out * 0 + 5), theirs="eager")
    assert result.verdict == "agrees"
    (result,) = judge([blank], "cpu", ours=_WRONG["shape"], theirs="eager")
    assert result.verdict == "opara_wrong"


def test_what_eager_refuses_is_skipped() -> None:
    (result,) = judge([_sample(lambda first: first @ first)], "cpu")
    assert result.verdict == "skipped"
    assert result.detail.startswith("eager raises: RuntimeError")


def test_of_samples_compiled_together_the_wrong_one_is_named() -> None:
    together = [_sample(torch.exp), _sample(torch.sin, index=1), _sample(torch.cos, index=2)]

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> list[Any]:
            first, second, third = gm(*args)
            return [first, second + 1, third]

        return run

    results = judge(together, "cpu", ours=backend, theirs="eager")
    assert [result.verdict for result in results] == ["agrees", "opara_wrong", "agrees"]
    assert {result.together for result in results} == {3}


def test_what_opara_scheduled_is_counted() -> None:
    (result,) = judge([_sample()], "cpu")
    assert (result.verdict, result.graphs, result.fallbacks) == ("agrees", 1, {})
    (result,) = judge([_sample()], "cpu", options={"nan_asserts": True})
    assert (result.verdict, result.graphs, result.fallbacks) == ("agrees", 0, {"unsupported_option": 1})


def test_inductor_alone_is_given_only_options_it_knows() -> None:
    (result,) = judge([_sample()], "cpu", ours="inductor", options={"search_seconds": 0.1, "cpp.threads": 1})
    assert (result.verdict, result.graphs) == ("agrees", 0)


def _crashing(connection: Connection, setting: Setting) -> None:
    """Stands in for a worker: `ours` dies of opara, `both` of either, everything else is well."""
    while (job := connection.recv()) is not None:
        names = {case.operator for case in job.cases}
        if "both" in names or ("ours" in names and not job.only_theirs):
            os._exit(3)
        if "hangs" in names and not job.only_theirs:
            time.sleep(60)
        connection.send([Result(case, "agrees") for case in job.cases])


def test_crashes_are_survived_and_blamed_on_who_caused_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sweep.pool._START", 10.0)
    cases = tuple(Case(name, 0) for name in ("before", "ours", "both", "hangs", "after"))
    pool = Pool(Setting("cpu", limit=1.5), 2, None, context="fork", work=_crashing)
    results = {r.case.operator: r for found in pool.run([Job(cases), Job((Case("alone", 0),))]) for r in found}
    assert {name: result.verdict for name, result in results.items()} == {
        "before": "agrees",
        "ours": "crashed",
        "both": "both_wrong",
        "hangs": "crashed",
        "after": "agrees",
        "alone": "agrees",
    }, results
    assert results["ours"].detail.startswith("process ended with 3")
    assert results["hangs"].detail.startswith("no answer in time")
    assert not pool.left


def test_out_of_time_leaves_the_rest() -> None:
    jobs = [Job((Case("add", index),)) for index in range(5)]
    pool = Pool(Setting("cpu"), 1, 0.0, context="fork", work=_crashing)
    assert list(pool.run(jobs)) == []
    assert list(pool.left) == jobs


def test_samples_are_the_same_in_every_draw() -> None:
    wanted = [Case("nn.functional.linear", 0), Case("add", 3), Case("add", 0)]
    torch.manual_seed(1)
    first = samples.load(wanted, "cpu")
    torch.manual_seed(2)
    second = samples.load(wanted, "cpu")
    assert [sample.case for sample in first] == wanted
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.arguments, other.arguments, rtol=0, atol=0)
        assert one.changed is not None
        assert not torch.equal(one.arguments[0], one.changed[0])


def test_the_table_does_not_depend_on_the_order_of_results(tmp_path: Path) -> None:
    results = [
        Result(Case("b", 0), "agrees", graphs=1, fallbacks={"host_kernel": 1}),
        Result(Case("a", 1), "opara_wrong", "values", graphs=1),
        Result(Case("a", 0), "skipped", "eager raises"),
    ]
    left = [Case("c", 0)]
    made = table.text(table.table(results, {"torch": "2"}, left))
    assert made == table.text(table.table(reversed(results), {"torch": "2"}, left))
    journal = table.Journal(tmp_path / "t.jsonl")
    journal.append(results[:2])
    journal.append(results[2:])
    with journal.path.open("a") as file:
        file.write('{"case": {"opera')
    assert journal.read() == {result.case: result for result in results}
    summary = table.table(results, {}, left)["summary"]
    assert (summary["samples"], summary["opara_wrong"], summary["skipped"], summary["unfinished"]) == (3, 1, 1, 1)


def test_nothing_of_the_machine_is_in_the_words() -> None:
    assert clean("no /home/me/a/b.py\nat 0x7f00aa") == "no b.py at 0x"


def test_the_database_leaves_the_process_its_settings() -> None:
    assert samples.operators()
    assert not torch.backends.flags_frozen()
