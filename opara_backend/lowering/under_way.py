"""The lowering that this thread is at: what it was asked for, and which rewrites found something to do so far.

Takes: a request, for as long as a block runs. Gives: what passes and code generators, called by Inductor, must know of
it. Must not change: anything else.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from opara_backend import upstream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoweringRequest:
    """What the codegen must know beside the graph: which inputs keep their addresses between calls, and whether small
    kernels are to be joined (`joining`). looking: whether to find out which other rewrites there would be."""

    static_inputs: tuple[int, ...] = ()
    join_small: bool = False
    looking: bool = False


@dataclass(frozen=True)
class UnderWay:
    """A lowering. rewrites, possible: as `Program` has them, as far as they are known."""

    request: LoweringRequest
    rewrites: set[str] = field(default_factory=set)
    possible: set[str] = field(default_factory=set)


_under_way: contextvars.ContextVar[UnderWay | None] = contextvars.ContextVar("opara_lowering", default=None)


@contextlib.contextmanager
def begun(request: LoweringRequest) -> Iterator[None]:
    """In the block a lowering is under way, in this thread."""
    token = _under_way.set(UnderWay(request))
    try:
        yield
    finally:
        _under_way.reset(token)


def under_way() -> bool:
    """True while a graph that this thread compiles comes out as a program: training's does not."""
    return _under_way.get() is not None


def current() -> UnderWay:
    """The lowering under way; RuntimeError if there is none."""
    here = _under_way.get()
    if here is None:
        raise RuntimeError("no graph is being lowered in this thread")
    return here


def static_inputs() -> tuple[int, ...]:
    """Positions of the inputs of the graph under way that stay where they are: parameters and buffers."""
    return current().request.static_inputs if under_way() else ()


def parameters() -> frozenset[str]:
    """Names of the parameters, buffers and constants of the graph that Inductor is lowering.

    What a subgraph is called with may be anything.
    """
    graph = upstream.V.graph
    places = static_inputs() if graph.name is None else ()
    return frozenset((*(graph.graph_input_names[place] for place in places), *graph.constants))


def note_rewrite(name: str, *, done: bool = True) -> None:
    """Note that the rewrite called `name` found something to do; `done`: and did it."""
    if under_way():
        (current().rewrites if done else current().possible).add(name)


def finds_something(name: str, look: Callable[[], object]) -> bool:
    """Whether `look()`, of a rewrite called `name` that nobody asked for, finds anything; a failure is only said."""
    try:
        return bool(look())
    except Exception as error:
        log.warning("not tried with %s: %s: %s", name, type(error).__name__, error, exc_info=error)
        return False
