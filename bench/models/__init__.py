"""The models of the benchmark, by name.

Each family is a module with a tuple ``MODELS`` of ``BenchModel`` entries; this one joins them. All are plain torch
with seeded weights, in eval mode, and compile as one graph. Looking a name up builds nothing.
"""

from __future__ import annotations

import difflib

from bench.models import decode, encoder, nasnet, randwire, recommend, rnn, t5, vision
from bench.models.entry import BenchModel

__all__ = ["BenchModel", "get", "names"]

_FAMILIES = (vision, nasnet, randwire, recommend, encoder, t5, decode, rnn)
_MODELS: dict[str, BenchModel] = {model.name: model for family in _FAMILIES for model in family.MODELS}


def names() -> tuple[str, ...]:
    """Every model's name, family by family."""
    return tuple(_MODELS)


def get(name: str) -> BenchModel:
    """The entry called ``name``; a ``ValueError`` that suggests the nearest name if there is none."""
    if name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(name, _MODELS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no benchmark model is called {name!r}; {hint}known: {', '.join(_MODELS)}")
