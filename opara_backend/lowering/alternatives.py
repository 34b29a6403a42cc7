"""A graph lowered several times: as asked for, and again with each rewrite that would find something to do in it.

Takes: an AOT graph, and how to lower one. Gives: what the first lowering gives; its Runtime knows the others as
`alternatives`, which it times against itself. Must not change: the first lowering, whatever becomes of the others.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from opara_backend import fallback, options, upstream
from opara_backend.fallback import why_host
from opara_backend.options import REWRITES, Options
from opara_backend.report.record import unheard

log = logging.getLogger(__name__)

Lower = Callable[[torch.fx.GraphModule, tuple[str, ...], bool], Any]
"""Lowers a graph module, which it changes, with the rewrites named; finds out which others are possible, if told to."""


def lowered(gm: torch.fx.GraphModule, lower: Lower, asked: tuple[str, ...]) -> Any:
    """What `lower` makes of `gm` with the rewrites `asked`, others tried beside it.

    Those are what is lowered where nothing is tried, the rewrites that are on by default; and, of what is possible,
    each of these left out and each other one added.
    """
    compilation = options.current()
    pristine = _kept(gm)
    first = lower(gm, asked, True)
    runtime = compilation.bound[-1] if compilation.bound else None
    if pristine is None or runtime is None or not _may_be_captured(runtime):
        return first
    if any("unbacked_bindings" in node.meta for node in pristine.graph.nodes):
        return first  # it names sizes that are known only when it runs, which can be named once
    found: list[Any] = []
    free = tuple(name for name in runtime.generated.possible if name not in compilation.options.given)
    for every in _sets(asked, free):
        made = _another(_copied(pristine), lower, every, compilation)
        if made is None:
            continue
        if not _is_alternative(runtime, made[1]) or made[0].output_strides != first.output_strides:
            log.info("not tried with %s: it cannot stand in for the graph as it is", ", ".join(every))
        elif made[1].generated.source not in {known.generated.source for known in found}:
            found.append(made[1])
    runtime.alternatives = tuple(found)
    for other in found:
        other.record = runtime.record  # what is done for one call is told as one
    return first


def _may_be_captured(runtime: Any) -> bool:
    return bool(runtime.plannable and runtime.options.cuda_graph and why_host(runtime.graph) is None)


def _is_alternative(first: Any, other: Any) -> bool:
    """True if another program takes what the first does, and does not turn out to be the same."""
    one, two = first.generated, other.generated
    alike = (one.inputs, one.dynamic_inputs, one.number_inputs) == (two.inputs, two.dynamic_inputs, two.number_inputs)
    return alike and _may_be_captured(other) and set(two.rewrites) != set(one.rewrites)


def _sets(asked: tuple[str, ...], possible: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The sets of rewrites to lower with, but for `asked` alone, which there is."""
    usual = {*asked, *(name for name in possible if getattr(Options(), name))}
    for wanted in (usual, *(usual ^ {name} for name in possible)):
        if wanted != {*asked}:
            yield tuple(name for name in REWRITES if name in wanted)


def _another(
    gm: torch.fx.GraphModule, lower: Lower, rewrites: tuple[str, ...], compilation: options.Compilation
) -> tuple[Any, Any] | None:
    """Inductor's graph and our Runtime for `gm` lowered with `rewrites`; None, and said, if that cannot be."""
    strict = replace(compilation.options, fallback="error")  # one rung down is no alternative, and nobody's fallback
    try:
        with (
            unheard(),
            fallback.unheard(),
            upstream.own_output_strides(),
            options.using(strict, compilation.labels) as inner,
        ):
            made = lower(gm, rewrites, False)
    except Exception as error:
        log.warning("not tried with %s: %s: %s", ", ".join(rewrites), type(error).__name__, error)
        log.debug("where that came from", exc_info=error)
        return None
    compilation.lowering_seconds += inner.lowering_seconds
    return (made, inner.bound[-1]) if inner.bound else None


def _kept(gm: torch.fx.GraphModule) -> torch.fx.GraphModule | None:
    """A copy of `gm`, which is about to change; None, and said, if that cannot be."""
    try:
        return _copied(gm)
    except Exception as error:
        log.warning("no rewrites are tried: %s: %s", type(error).__name__, error, exc_info=error)
        return None


def _copied(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm` with graphs of its own, and the same tensors."""
    made = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)
    made.meta = dict(gm.meta)
    for name, child in _graphs(gm.named_children()):
        setattr(made, name, _copied(child))
    return made


def _graphs(children: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[tuple[str, torch.fx.GraphModule]]:
    for name, child in children:
        if isinstance(child, torch.fx.GraphModule):
            yield name, child
