"""Exceptions reach whoever started the process that raised them: pickled and copied, they say the same."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import opara_backend
from opara_backend.fallback import Fallback, FallbackReason, OparaFallbackError


def own() -> list[type[Exception]]:
    """Every exception class that a module of the package defines."""
    found: dict[type[Exception], None] = {}
    for module in pkgutil.walk_packages(opara_backend.__path__, "opara_backend."):
        if module.name.endswith("__main__"):
            continue
        held = importlib.import_module(module.name)
        found |= {
            kind: None
            for kind in vars(held).values()
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == module.name
        }
    return [*found]


def pickled(error: Any, protocol: int) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, *(lambda e, p=p: pickled(e, p) for p in (0, 2, 5))])
@pytest.mark.parametrize("kind", own(), ids=lambda kind: kind.__name__)
def test_exceptions_survive_the_way_to_another_process(
    kind: type[Exception], again: Callable[[Exception], Exception]
) -> None:
    fallback = Fallback(FallbackReason.HOST_KERNEL, "aten.add touches the CPU", "RuntimeError: no")
    error = kind(fallback if kind is OparaFallbackError else "what is wrong")  # type: ignore[arg-type]
    error.seen_by = "somebody"  # type: ignore[attr-defined]
    found = again(error)
    assert type(found) is kind
    assert str(found) == str(error)
    assert found.args == error.args
    assert vars(found) == vars(error)


def test_the_step_down_arrives_with_the_error() -> None:
    fallback = Fallback(FallbackReason.TRAINING, "the graph computes gradients")
    assert pickled(OparaFallbackError(fallback), pickle.HIGHEST_PROTOCOL).fallback == fallback
